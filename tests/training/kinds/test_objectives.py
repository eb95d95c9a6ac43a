"""Every kind recovers a known dictionary, and what is saved reads activations as they are."""

import itertools

import pytest
import torch
from small_training import ANCHORS, D, dynamics_of, recipe, sparse_data, step_data, train

from diffusers_rtsae import MixtureSAE
from diffusers_rtsae.models import Step, places, share_of_guidance
from training.architectures.sparse import decode
from training.common.processes import ALONE
from training.data.store import NOWHERE
from training.evaluation.reconstruction import evaluate
from training.kinds.mixture import RoutedSteps
from training.loop.trainer import DictionaryTrainer, new_dictionary

OF_KIND = [
    *itertools.product(["static"], ["batch_topk", "topk", "jump_relu", "atm"]),
    *itertools.product(["tide", "mixture"], ["batch_topk"]),
    *(
        pytest.param(*both, marks=pytest.mark.slow)
        for both in [("tide", "topk"), *itertools.product(["tide", "mixture"], ["jump_relu", "atm"])]
    ),
]


@pytest.mark.parametrize("kind, architecture", OF_KIND)
def test_known_features_of_single_steps_are_found(tmp_path, kind, architecture):
    own = {"experts": 4, "shared": 0.5, "masked": 0.0} if kind == "mixture" else {}
    sae = train(tmp_path, recipe(kind=kind, architecture=architecture, steps=400, **own), data=step_data)[0]
    assert sae.config.get("sparsity", "threshold") == ("topk" if architecture == "topk" else "threshold")
    report = evaluate(sae, step_data(500, seed=1).float(), k=3)
    assert report["fvu_online"] == report["fvu_teacher_forced"] < 0.3
    assert report["l0_threshold"] == pytest.approx(3, abs=0.3) and "prefix_recall" not in report


def test_a_router_is_told_in_training_what_it_is_told_when_steering():
    torch.manual_seed(0)
    sae, size = MixtureSAE("mid_block", D, ANCHORS, 20, 2, shared_latents=4, num_experts=4), (2, 3)
    view = RoutedSteps(sae, dynamics_of(sparse_data(100)), recipe(kind="mixture").train, ALONE)
    tokens, told = torch.randn(6, 3, D), torch.cat([places(size), share_of_guidance(5.0).expand(6, 1)], 1)
    sae.eval()
    gates, _ = view.gates(tokens.flatten(0, 1), told)
    for g, timestep in enumerate(ANCHORS):
        expected, _ = sae.gates(tokens[:, g], sae.metadata(Step(timestep, g, size, 5.0), 6))
        torch.testing.assert_close(gates.shares.view(6, 3, -1)[:, g], expected)
    assert not torch.allclose(view.gates(tokens.flatten(0, 1))[0].shares, gates.shares)
    nowhere = told.clone()
    nowhere[:, :2] = NOWHERE
    gates, _ = view.gates(tokens.flatten(0, 1), nowhere)
    expected, _ = sae.gates(tokens[:, 0], sae.metadata(Step(ANCHORS[0], 0.0, None, 5.0), 6))
    torch.testing.assert_close(gates.shares.view(6, 3, -1)[:, 0], expected)
    sae.noise.bias.data.fill_(-50.0)  # no noise worth the name: what differs while training is what is left untold
    rows, told = tokens[:1, :1].expand(4000, 3, D).flatten(0, 1), told[:1].expand(4000, 3)
    expected = view.gates(rows, told)[0].shares
    sae.train()
    differs = (view.gates(rows, told)[0].shares - expected).abs().amax(1) > 0.05
    assert 0.1 < differs.float().mean() < 0.45


@pytest.mark.parametrize("kind", ["static", "tide", "mixture"])
def test_a_finished_dictionary_reads_activations_as_they_are(kind):
    data, settings = step_data().float(), recipe(kind=kind, architecture="batch_topk" if kind == "mixture" else "topk")
    dynamics = dynamics_of(data)
    trainer = DictionaryTrainer(
        new_dictionary("mid_block", ANCHORS, settings, dynamics), settings.train, dynamics, data[:512], "cpu"
    )
    for step in range(20):
        trainer.backward(trainer.inputs(data[100 * step :][:100]), None)
        trainer.update(step)
    inputs = trainer.inputs(data[:50])
    trainer.sae.eval()
    with torch.no_grad():
        target, unit, code, *_ = trainer._encode(inputs, None)
        decoded = decode(code, trainer.decoder, len(target)) + trainer.sae.decoder_bias
        expected = inputs + ((decoded - target) / (1 if unit is None else unit)).view_as(inputs)
    sae = trainer.finish()
    if kind == "mixture":
        trainer.objective.calibrate(data[:50])
    found = trainer.inputs(sae.reconstruct(data[:50]))
    near = (found - expected).abs() < 2e-2 * (1 + expected.abs())  # weights were rounded, and with them the threshold
    assert near.float().mean() > (0.97 if kind == "mixture" else 0.9999)
    torch.testing.assert_close(sae.spread, dynamics.scale)


def test_per_step_latents_see_and_write_one_anchor_each(tmp_path):
    rtsae = train(tmp_path, recipe(layout="per_step", num_latents=30))[0]
    for weights in (rtsae.encoder, rtsae.decoder):
        used = weights.abs().sum(2) > 0
        assert (used.sum(1) == 1).all() and used.sum(0).tolist() == [10, 10, 10]
