"""The effect of an edit on the prediction: its definition, its gradient, and that it is of what steering does."""

import pytest
import torch

from diffusers_rtsae.analysis.effect import Intervention, States, adding, check_pairs, first_order, frozen
from diffusers_rtsae.steering import Edit

SITE = "up_blocks.1.attentions.1"
CALL = {"num_inference_steps": 3, "guidance_scale": 3.0}
PAIR = ("a large blue star on the left, flat, on white", "a large red star on the left, flat, on white")
SAME = ("a large red star at the top, flat, on white",) * 2


@pytest.fixture(scope="module")
def states(_pipeline, dictionary):
    _pipeline.load_rtsae(dictionary)
    try:
        yield States(_pipeline, [PAIR, SAME], seed=3, **CALL)
    finally:
        _pipeline.unload_rtsae()


def test_no_edit_has_no_effect_and_no_harm(states):
    model = adding(SITE, 3, states, strength=0.0)
    torch.testing.assert_close(states.effects(model), torch.zeros(2), atol=1e-4, rtol=0)
    assert sum(1 for _ in states.all()) == 3 and [len(state) for state in states.all()] == [3, 3, 3]


def test_what_changes_a_prompt_that_is_to_stay_is_harm(states, latent):
    effects = states.effects(adding(SITE, latent("navy"), states, strength=3.0))
    assert effects[1] < -0.01


def test_the_gradient_is_that_of_the_effect(states, latent):
    index, generator = latent("red"), torch.Generator().manual_seed(0)
    with frozen(states.pipeline):
        slope = first_order(Intervention({}, states), 60, generator)[SITE].added[index]
    step = 0.02
    counts = torch.tensor([2.0, 1.0])  # draws weigh states evenly, of which the first pair has twice as many
    ends = [
        (states.effects(adding(SITE, index, states, strength=w)) * counts).sum() / counts.sum() for w in (-step, step)
    ]
    expected = float((ends[1] - ends[0]) / (2 * step))
    assert float(slope) == pytest.approx(expected, rel=0.3)


def test_an_intervention_is_what_steering_does(states, _pipeline, latent):
    """The first step of a steered run, before anything else can differ."""
    added, removed = latent("red"), latent("blue")
    edits = [
        Edit(latents=(added,), weights=(1.5,), strength=1.0, where=(removed,), clip=False),
        Edit(latents=(removed,), weights=(0.7,), strength=1.0, operation="ablate", clip=False),
    ]
    model = Intervention({SITE: edits}, states)
    state = next(iter(states.all()))
    expected = states.predict(state, [0], model(state, [0]))
    plain = states.predict(state, [0], {})
    features = [
        {"site": SITE, "latents": [added], "weights": [1.5], "where": [removed], "bounds": [0, 1]},
        {"site": SITE, "latents": [removed], "weights": [0.7], "where": None, "operation": "ablate", "bounds": [0, 1]},
    ]
    kept = []
    hook = _pipeline.unet.register_forward_hook(lambda m, a, output: kept.append(output[0][1:2]))
    states.dictionary.add_label("test", {"features": features, "edit": {"apply_to": "cond"}}, {})
    try:
        with _pipeline.rtsae_steering({"test": 1.0}):
            _pipeline(PAIR[0], generator=torch.Generator().manual_seed(3), output_type="latent", **CALL)
    finally:
        hook.remove()
        del states.dictionary.labels["test"]
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(kept[0], expected, atol=1e-3, rtol=1e-3)


def test_erasing_is_measured_as_it_is_done(states, _pipeline):
    state, sae = next(iter(states.all())), states.dictionary.sites[SITE]
    seen = state.codes[SITE].dense(list(range(sae.config.num_latents)))[0] > 0.5 * sae.typical_activation
    latent = int((seen.any(0) & ~seen.all(0)).nonzero()[0])
    edit = Edit(latents=(latent,), weights=(1.0,), strength=1.0, operation="erase", apply_to="cond", clip=False)
    expected = states.predict(state, [0], Intervention({SITE: [edit]}, states)(state, [0]))
    kept = []
    hook = _pipeline.unet.register_forward_hook(lambda m, a, output: kept.append(output[0][1:2]))
    try:
        with _pipeline.rtsae_steering({(SITE, latent): 1.0}, operation="erase", apply_to="cond"):
            _pipeline(PAIR[0], generator=torch.Generator().manual_seed(3), output_type="latent", **CALL)
    finally:
        hook.remove()
    assert (expected - states.predict(state, [0], {})).abs().max() > 1e-3
    torch.testing.assert_close(kept[0], expected, atol=1e-3, rtol=1e-3)


def test_reversed_pairs_want_what_was_there(states):
    backwards = states.reversed()
    there, back = next(iter(states.all())), next(iter(backwards.all()))
    assert torch.equal(there.target, back.prediction) and torch.equal(there.prediction, back.target)
    assert torch.equal(there.goal[SITE], back.present[SITE])
    assert backwards.pairs[0] == PAIR[::-1] and backwards.differs.tolist() == [True, False]


def test_what_is_no_pair_is_said():
    for pairs, message in {
        (): "got none",
        ("a star",): "got 'a star'",
        (("a star", "a star"),): "Expected the two prompts of a pair to differ",
        (("a star", 3),): "Expected pairs",
    }.items():
        with pytest.raises(ValueError, match=message):
            check_pairs(pairs)


def test_a_frozen_denoiser_is_as_before(_pipeline):
    before = [parameter.requires_grad for parameter in _pipeline.unet.parameters()]
    with frozen(_pipeline):
        assert not any(parameter.requires_grad for parameter in _pipeline.unet.parameters())
    assert [parameter.requires_grad for parameter in _pipeline.unet.parameters()] == before
    plain = _pipeline.unet
    try:
        _pipeline.unet = torch.compile(plain)
        with pytest.raises(ValueError, match="compiled"), frozen(_pipeline):
            pass
    finally:
        _pipeline.unet = plain
