"""Dictionaries of every kind are recorded, ranked, fitted, plotted, reported, and measured like an RTSAE."""

import pytest
import torch
from kinds import OTHERS, random_dictionary
from small_analysis import find_less, fit_less

from diffusers_rtsae import TIDE, Dictionary, load_dictionary
from diffusers_rtsae.analysis.find import find_features, top_features
from diffusers_rtsae.analysis.fit import fit_feature
from diffusers_rtsae.analysis.plots import plot_feature_trajectories, plot_presence
from diffusers_rtsae.analysis.record import record
from diffusers_rtsae.analysis.report import write_report
from training.evaluation.reconstruction import evaluate, stability, timing
from training.evaluation.replacement import recovered

SITE = "up_blocks.1.attentions.1"
CALL = {"num_inference_steps": 3, "guidance_scale": 3.0}
PAIRS = [("a star", "a star on a white background"), ("a heart", "a heart on a white background")]


TOPK = pytest.param("SparseAutoencoder, TopK", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[*(kind for kind in OTHERS if "TopK" not in kind), TOPK])
def sae(request):
    sae = random_dictionary(request.param, SITE, 160, [667, 334, 1], 32, 4)
    for name, factor in (("decoder_bias", 0.0), ("modulation.weight", 0.05), ("typical_activation", 5.0)):
        if name in sae.state_dict():
            sae.state_dict()[name].mul_(factor)
    sae.max_activation.copy_(100 * sae.typical_activation)
    return sae


@pytest.fixture
def steered(pipe, sae):
    pipe.load_rtsae({SITE: sae})
    return pipe


def test_what_is_recorded_is_what_steering_reads(steered, sae):
    recording = record(steered, ["a red star"], generator=torch.Generator().manual_seed(0), **CALL)
    read = list(recording.latents(SITE, [5, 9]))
    assert torch.stack(read).max() > 0 and recording.maps([5, 9]).shape == (1, 2, 3, 8, 8)
    with steered.rtsae_steering({5: 0.0}, operation="set", where=5, apply_to="cond"):
        steered(["a red star"], generator=torch.Generator().manual_seed(0), **CALL)
        first = steered.rtsae_report()[SITE][0]
    assert first["edited"] == pytest.approx((read[0][..., 0] > 0).float().mean().item(), abs=1e-6)
    assert len(top_features(recording, count=3)) > 0
    assert plot_presence(recording, [5]) and plot_feature_trajectories(recording.dictionary, [5, 9])


def test_features_are_found_and_verified(steered, monkeypatch):
    find_less(monkeypatch)
    with_it, without = [pair[1] for pair in PAIRS], [pair[0] for pair in PAIRS]
    table = find_features(steered, with_it, without, count=3, seeds=1, verify=1, **CALL)
    assert len(table) == 3 and {"effect", "image_distance"} <= table[0].verified.keys()
    assert table[0].verified["image_distance"] > 0


def test_a_feature_is_fitted_kept_and_steers(steered, sae, draw, tmp_path, monkeypatch):
    fit_less(monkeypatch)
    fitted = fit_feature(steered, PAIRS[:1], 4, rank=4 if type(sae) is TIDE else None, progress=False, **CALL)
    steered.add_rtsae_label("mine", fitted)
    steered.save_rtsae(tmp_path)
    assert type(load_dictionary(tmp_path).sites[SITE]) is type(sae)
    plain = draw(steered, steps=3)
    with steered.rtsae_steering({"mine": 1.0}):
        assert abs(draw(steered, steps=3) - plain).max() > 1e-4


def test_a_report_is_written(steered, tmp_path):
    write_report(steered, tmp_path / "report.html", ["a star"], count=4, steered=1, top=1, **CALL)
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_it_is_measured(pipe, sae):
    found = evaluate(sae, torch.randn(100, 3, 160), 4)
    assert found["fvu_online"] == found["fvu_teacher_forced"] > 0 and len(found["l0_per_anchor"]) == 3
    assert stability([sae, sae]) == pytest.approx(1, abs=1e-4) and sum(timing(sae)["peak"]) == 32
    shares = recovered(pipe, sae, ["a star"], [torch.Generator().manual_seed(0)], **CALL)
    assert shares["recovered_online"] == shares["recovered_teacher_forced"] < 1
    assert Dictionary({SITE: sae}).trajectory(3).shape == (3, 160)
