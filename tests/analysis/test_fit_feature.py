"""Features fitted by their effect: what is fitted acts, is saved, and answers its strength."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_analysis import fit_less

from diffusers_rtsae import RTSAE, Dictionary, load_dictionary
from diffusers_rtsae.analysis import fit
from diffusers_rtsae.analysis.effect import States
from diffusers_rtsae.analysis.fit import fit_feature
from diffusers_rtsae.analysis.record import Recorder
from diffusers_rtsae.dictionary import check_label
from diffusers_rtsae.models import PLACES, LinearMap

EXAMPLES = Path(__file__).parents[2] / "examples"
SITE = "up_blocks.1.attentions.1"
CALL = {"num_inference_steps": 5, "guidance_scale": 3.0}
PAIRS = [
    ("a large star in the centre, flat, on black", "a large star in the centre, flat, on white"),
    ("a large star in the centre, flat", "a large star in the centre, flat, on white"),
]
UNCHANGED = ["a small red heart on the left, on a white background"]


@pytest.fixture(scope="module")
def quick():
    """The same with less of everything."""
    patch = pytest.MonkeyPatch()
    fit_less(patch, pictures=3, steps=6, last=10, choice=3, ridges=(0.003,))
    yield
    patch.undo()


class Bar(fit.tqdm):
    """A progress bar that keeps what it was told."""

    made: list["Bar"] = []

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.made.append(self)
        self.told, self.steps = [], []

    def set_description(self, text, *arguments):
        self.told.append(text)

    def update(self, n=1):
        self.steps.append(n)
        return super().update(n)


@pytest.fixture(scope="module")
def fitted(_pipeline, dictionary, quick):
    """Latents, and a linear map, on a clock on which the first pictures take ten seconds."""
    _pipeline.load_rtsae(dictionary)
    patch = pytest.MonkeyPatch()
    patch.setattr(fit, "tqdm", Bar)
    found = []
    try:
        for rank in (None, 4):
            patch.setattr(fit, "time", SimpleNamespace(monotonic=iter((0, 10)).__next__))
            found.append(fit_feature(_pipeline, PAIRS, 6, UNCHANGED, rank, **CALL))
        return found
    finally:
        patch.undo()
        _pipeline.unload_rtsae()


def test_what_is_fitted_has_an_effect_and_says_so(fitted):
    for one in fitted:
        assert one.measured["effect"] > 0.2 and one.measured["lowest"] <= one.measured["effect"] <= 1
        assert one.measured["ceiling"] == pytest.approx(1, abs=1e-3) and one.measured["pairs"] == len(PAIRS)
        assert set(one.effects) == set(PAIRS)  # drawn several times, and told once
        mean = sum(one.effects.values()) / len(PAIRS)
        assert one.measured["effect"] == pytest.approx(mean, abs=1e-3)
        assert one.measured["lowest"] == pytest.approx(min(one.effects.values()), abs=1e-3)
        assert 0 <= one.measured["harm"] < one.measured["effect"]
        assert f"effect {one.measured['effect']:.3g}" in repr(one)
    assert 0 < fitted[0].measured["latents"] <= 6 and not fitted[0].maps
    assert fitted[1].measured["effect"] > 0.7 and fitted[1].measured["rank"] == 4
    assert {rows.shape for rows in fitted[1].maps.values()} == {(4, 3, 321 + PLACES)}


def test_a_fitted_label_is_saved_and_steers_as_before(fitted, pipe, draw, tmp_path):
    pipe.load_rtsae(load_dictionary(EXAMPLES / "shapes-rtsae"))
    for name, one in zip(("sum", "map"), fitted, strict=True):
        pipe.add_rtsae_label(name, one)
    pipe.save_rtsae(tmp_path)
    pictures = []
    for source in (None, tmp_path):
        if source:
            pipe.unload_rtsae()
            pipe.load_rtsae(source)
        pipe.set_rtsae_features({"sum": 1.0, "map": [0.0, -0.5]})
        pictures.append(draw(pipe, steps=3))
    assert abs(pictures[0] - pictures[1]).max() < 2e-3  # stored as float16
    moved = pipe.get_rtsae_features()
    assert (SITE, None) in moved["map"] and (SITE, None) not in moved["sum"]
    card = (tmp_path / "README.md").read_text()
    assert "a linear map of its own" in card


def test_the_bar_says_how_long_a_fit_takes_and_comes_to_its_end(fitted):
    """The total is what is done: the last stage ends where the bar does."""
    assert len(Bar.made) == 2 * len(fitted)
    for beginning, bar in zip(Bar.made[::2], Bar.made[1::2], strict=True):
        about = 10 * bar.total / bar.steps[0]
        assert bar.desc == f"about {about:.0f} s: pictures"
        assert bar.told == [f"about {about:.0f} s: {stage}" for stage in ("towards", "away")]
        assert sum(bar.steps[:-1]) == pytest.approx(bar.total) == bar.n and not beginning.steps


def test_each_part_answers_strengths_of_its_sign_within_its_bounds(fitted):
    for one in fitted:
        entries = one.label["features"]
        assert all(low <= 0 <= high and low != high for low, high in (entry["bounds"] for entry in entries))
        assert any(entry["bounds"][1] >= 1 for entry in entries) and any(entry["bounds"][0] <= -1 for entry in entries)
        for entry in entries:
            if entry.get("operation") == "ablate":  # nothing is taken away more than was fitted
                assert entry["bounds"] in ([0.0, 1.0], [-1.0, 0.0]) and entry["where"] is None


def test_strengths_beyond_the_bounds_are_kept_inside_unless_clip_is_lifted(fitted, pipe, draw):
    pipe.load_rtsae(load_dictionary(EXAMPLES / "shapes-rtsae"))
    pipe.add_rtsae_label("sum", fitted[0])
    highest = max(entry["bounds"][1] for entry in fitted[0].label["features"])

    def at(strength, **options):
        with pipe.rtsae_steering({"sum": strength}, **options):
            return draw(pipe, steps=2)

    assert (at(highest) == at(50.0)).all() and (at(highest) != at(50.0, clip=False)).any()
    assert (at(0.0) == draw(pipe, steps=2)).all()


def test_a_feature_acts_at_the_steps_at_which_it_helps():
    """Where it would do harm it is left out; what little can be gained by that does not count."""
    assert fit._window({900.0: 0.3, 500.0: 0.2, 100.0: 0.1}) == {}
    assert fit._window({900.0: -0.2, 500.0: 0.4, 100.0: 0.3}) == {"start": 0.3}
    assert fit._window({900.0: 0.2, 500.0: 0.4, 100.0: -0.3}) == {"end": 0.7}
    assert fit._window({900.0: -0.2, 700.0: 0.4, 500.0: -0.1, 300.0: 0.3, 100.0: -0.1}) == {"start": 0.2, "end": 0.8}
    assert fit._window({900.0: 0.4, 500.0: 0.4, 100.0: -0.005}) == {}


def test_a_window_leaves_out_what_does_harm(_pipeline, dictionary, quick, monkeypatch):
    """Fitted wrongly at the first step: that step is left out, and the effect told is that of the others."""
    right = LinearMap.amounts

    def wrong(self, tokens, step):
        return right(self, tokens, step) * (-3 if step.timestep > 700 else 1)

    monkeypatch.setattr(LinearMap, "amounts", wrong)
    _pipeline.load_rtsae(dictionary)
    try:
        one = fit_feature(_pipeline, PAIRS, 6, UNCHANGED, 4, progress=False, **CALL)
    finally:
        _pipeline.unload_rtsae()
    assert 0 < one.label["edit"]["start"] < 0.5 and "end" not in one.label["edit"]
    assert one.measured["effect"] > 0


def test_maps_are_measured_as_they_steer_and_move_as_far_as_the_prompt(_pipeline, quick):
    """At two sites, of which the second reads what the first has moved; the first step of a steered run."""
    sites = ["down_blocks.1.attentions.0", SITE]
    with Recorder(_pipeline, sites) as recorder:
        _pipeline("", output_type="latent", **CALL)
    widths = {site: recorder.trajectories(site).shape[-1] for site in sites}
    sites = {s: RTSAE(s, width, [900, 100], num_latents=8, k=1) for s, width in widths.items()}
    _pipeline.load_rtsae(Dictionary(sites))
    kept = []
    try:
        states = States(_pipeline, PAIRS, seed=3, moments=True, **CALL)
        maps = fit._stretched(fit._fit_maps(states, states, 4)[0], states)
        entries, rows = fit._Fit(maps, 1.0, torch.zeros(1)).entries(1)
        label = {"features": entries, "edit": {"apply_to": "cond"}}
        _pipeline.add_rtsae_label("white", fit.FittedFeature(label, rows))
        state = next(states.all())
        with torch.no_grad():
            expected, plain = (states.predict(state, [0], c) for c in (maps(state, [0]), {}))
        hook = _pipeline.unet.register_forward_hook(lambda m, a, output: kept.append(output[0][1:2]))
        with hook, _pipeline.rtsae_steering({"white": 1.0}):
            _pipeline(PAIRS[0][0], generator=torch.Generator().manual_seed(3), output_type="latent", **CALL)
    finally:
        _pipeline.unload_rtsae()
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(kept[0], expected, atol=2e-3, rtol=2e-3)
    found = states.measure([maps])[0]
    assert found.effects.mean() > 0.9 and float(found.moved.mean()) == pytest.approx(1, abs=0.1)


def test_what_cannot_be_fitted_is_one_sentence(steered):
    with pytest.raises(ValueError, match="Expected the two prompts of a pair to differ"):
        fit_feature(steered, [("a star", "a star")], **CALL)
    for wrong in ({"latents": 0}, {"rank": 0}):
        with pytest.raises(ValueError, match="at least one"):
            fit_feature(steered, PAIRS, **wrong, **CALL)
    entry = {"site": SITE, "latents": [], "weights": [], "bounds": [0, 1], "map": "missing"}
    with pytest.raises(ValueError, match="name one of the maps"):
        check_label(Path("labels.json"), "x", {"features": [entry]}, {SITE: 2048}, {})


def test_nothing_stays_behind(steered, fitted, draw):
    """A fit leaves no hook, no gradient and no edit."""
    parameters = list(steered.unet.parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in parameters)
    assert not any(module._forward_hooks for module in steered.unet.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("rank", [None, 4])
def test_a_device_that_runs_out_of_memory_is_one_sentence_and_leaves_nothing(_pipeline, dictionary, quick, rank):
    """In the middle: while pictures are drawn, and while the fit asks the denoiser again."""
    _pipeline.load_rtsae(dictionary)
    parameters = [parameter.requires_grad for parameter in _pipeline.unet.parameters()]
    for calls in (2, 20):
        left = iter(range(calls))

        def full(module, args, left=left):
            if next(left, None) is None:
                raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")

        with (
            _pipeline.unet.mid_block.register_forward_pre_hook(full),
            pytest.raises(torch.OutOfMemoryError, match="batch_size=16: a smaller batch needs less"),
        ):
            fit_feature(_pipeline, PAIRS, 4, UNCHANGED, rank, progress=False, **CALL | {"num_inference_steps": 2})
        assert [parameter.requires_grad for parameter in _pipeline.unet.parameters()] == parameters
        assert not any(
            module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
            for module in _pipeline.unet.modules()
        )
    _pipeline.unload_rtsae()
