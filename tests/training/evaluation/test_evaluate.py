"""Figures of a dictionary: right where the answer is known, and the same however the data is cut."""

import json
from pathlib import Path

import pytest
import torch

from diffusers_rtsae import RTSAE
from training.commands import evaluate as main
from training.evaluation.reconstruction import Unexplained, evaluate, stability, timing
from training.evaluation.replacement import recovered

ANCHORS = [961, 721, 481, 241, 1]
SITE = "up_blocks.1.attentions.1"


def perfect(d: int, anchors: list[int], site: str = SITE) -> RTSAE:
    """A dictionary that reconstructs everything: each coordinate of each anchor up and down has a latent."""
    rtsae = RTSAE(site, d, anchors, num_latents=2 * d * len(anchors), k=d * len(anchors))
    basis = torch.eye(d * len(anchors)).unflatten(1, (len(anchors), d))
    with torch.no_grad():
        for weights in (rtsae.encoder, rtsae.decoder):
            weights.copy_(torch.cat([basis, -basis]))
    rtsae.density.fill_(1.0)
    return rtsae


def test_unexplained_variance_is_a_ratio_of_sums():
    truth, error = 3 + 2 * torch.randn(500, 3, 4), torch.randn(500, 3, 4)
    whole = Unexplained()
    for part in range(0, 500, 90):
        whole.add((truth + error)[part : part + 90], truth[part : part + 90])
    exact = error.square().sum() / (truth - truth.mean(0)).square().sum()
    assert whole.result()[1] == pytest.approx(exact.item(), abs=2e-4)


def test_figures_do_not_depend_on_how_the_data_is_cut(dictionary, monkeypatch):
    rtsae = dictionary.sites[SITE].float()
    data = torch.randn(700, len(rtsae.config.anchors), 160)
    whole = evaluate(rtsae, data, 16)
    original = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda self, size, dim=0: original(self, 100, dim))
    cut = evaluate(rtsae, data, 16)
    for name in whole.keys() - {"l0_batch_topk"}:  # whose batches are the pieces
        assert cut[name] == pytest.approx(whole[name], abs=2e-4), name


def test_a_perfect_dictionary_explains_all():
    found = evaluate(perfect(4, ANCHORS), torch.randn(300, 5, 4), 20)
    assert found["fvu_residual"] == found["fvu_online"] == found["fvu_teacher_forced"] == 0
    assert found["cosine_online"] == 1 and found["l0_threshold"] == 20 and found["prefix_l0"] == [4, 8, 12, 16, 20]


def test_features_act_when_their_trajectory_is_long():
    rtsae = perfect(2, ANCHORS)
    rtsae.dynamics.transition[0] = 0.6 * torch.eye(2)  # what starts at the first anchor lives on until the second
    found = timing(rtsae)
    assert found["peak"] == found["onset"] == [4] * 5
    assert found["lifetime"] == [16, 4, 0, 0, 0]


def test_stability_is_one_for_the_same_features_in_another_order():
    a = RTSAE(SITE, 4, ANCHORS, 32, 4)
    b = RTSAE(SITE, 4, ANCHORS, 32, 4)
    a.density.fill_(0.1), b.density.fill_(0.1)
    assert stability([a, b]) < 0.8
    b.decoder.data = a.decoder.data[torch.randperm(32)]
    assert stability([a, b]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("activation", ["output", "update"])
def test_replacing_by_a_perfect_reconstruction_changes_nothing(pipe, activation):
    rtsae = perfect(160, [801, 401, 1])
    rtsae.register_to_config(activation=activation)
    call = {"num_inference_steps": 5, "guidance_scale": 3.0}
    found = recovered(pipe, rtsae, ["a red star"], [torch.Generator().manual_seed(0)], **call)
    assert found["recovered_online"] == found["recovered_teacher_forced"] == 1.0


def test_the_bundled_dictionary_recovers_most_and_nothing_stays_hooked(pipe, dictionary, draw):
    before = draw(pipe, steps=3)
    call = {"num_inference_steps": 25, "guidance_scale": 3.0}
    rtsae = dictionary.sites[SITE].float()
    found = recovered(
        pipe, rtsae, ["a red star", "a heart"], [torch.Generator().manual_seed(i) for i in range(2)], **call
    )
    assert (
        0.5 < found["recovered_teacher_forced"] < 1 and found["recovered_online"] <= found["recovered_teacher_forced"]
    )
    assert (draw(pipe, steps=3) == before).all()
    with pytest.raises(ValueError, match="not all anchors .*: give its step count"):
        recovered(pipe, rtsae, ["a red star"], **call | {"num_inference_steps": 7})


def test_the_command_writes_a_report(tmp_path, monkeypatch):
    examples = Path(__file__).parents[3] / "examples"
    monkeypatch.setattr("sys.argv", [
        "evaluate", str(examples / "shapes-rtsae"), "--pipeline", str(examples / "shapes-sd"), "--prompts", "shapes",
        "--count", "4", "--batch-size", "4", "--out", str(tmp_path), "--device", "cpu",
    ])  # fmt: skip
    main()
    figures = json.loads((tmp_path / "report.json").read_text())[SITE]
    assert 0 < figures["fvu_teacher_forced"] < figures["fvu_online"] < 0.5 and figures["tokens"] == 256
    assert (
        "| recovered_online |" in (tmp_path / "report.md").read_text()
        and (tmp_path / "report.png").stat().st_size > 5000
    )
