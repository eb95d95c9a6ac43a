"""Every architecture recovers a known dictionary, and does what it alone promises."""

import math

import pytest
import torch
from small_training import ANCHORS, dynamics_of, recipe, sparse_data, train

from training.architectures.atm import AdaptiveMasking
from training.architectures.sparse import decode
from training.common.processes import ALONE
from training.evaluation.reconstruction import evaluate
from training.loop.trainer import DictionaryTrainer, new_dictionary
from training.registry import ARCHITECTURES


@pytest.mark.parametrize("name", [*ARCHITECTURES, "bf16"])
def test_known_features_are_found(tmp_path, name):
    changes = {"precision": "bf16"} if name == "bf16" else {"architecture": name}
    rtsae = train(tmp_path, recipe(steps=600, prefix=0.2, **changes))[0]
    report = evaluate(rtsae, sparse_data(1000, seed=1).float(), k=3)
    assert report["fvu_residual"] < 0.15
    assert report["l0_threshold"] == pytest.approx(3, abs=0.3)
    if name != "jump_relu":  # which measures each latent in units of its threshold
        norms = rtsae.decoder.flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-3, rtol=1e-3)
    assert report["prefix_recall"] == sorted(report["prefix_recall"]) and report["prefix_recall"][-1] == 1.0


@pytest.mark.parametrize("importance", ["mean", "product"])
def test_what_matters_less_is_masked_more_often(importance):
    settings = recipe(architecture="atm", importance=importance, mask_above=0.5, mask_rate=2.0).train
    architecture = AdaptiveMasking(settings, "cpu", ALONE)
    architecture.running[:] = torch.linspace(0, 3, settings.num_latents)[:, None]
    chance = architecture.chance()
    mattering = architecture.running[:, 0] / architecture.running[:, 0].mean()
    threshold = mattering.mean() + 0.5 * mattering.std(correction=0)
    expected = 1 - torch.exp(-2.0 * (threshold - mattering) / threshold)
    torch.testing.assert_close(chance, expected.clamp(min=0), atol=1e-5, rtol=1e-4)
    assert chance[0] == pytest.approx(1 - math.exp(-2)) and chance[-1] == 0


def test_masked_latents_are_silent_while_training_and_what_the_others_do_is_noted():
    data, settings = sparse_data(256), recipe(architecture="atm", mask_above=1.0, mask_rate=50.0)
    dynamics = dynamics_of(data)
    sae = new_dictionary("mid_block", ANCHORS, settings, dynamics)
    trainer = DictionaryTrainer(sae, settings.train, dynamics, data.float(), "cpu")
    architecture, inputs = trainer.architecture, trainer.inputs(data.float())
    trainer.backward(inputs, None)
    with torch.no_grad():
        target, _, code, *_ = trainer._encode(inputs, None)
        decoder = sae.decoder.flatten(1)
        left = target - decode(code, trainer.decoder, len(target)) - sae.decoder_bias.flatten()
        latent = int(code.latents.mode().values)
        of = code.where(code.latents == latent)
        more = (left[of.rows] + of.values[:, None] * decoder[latent]).square().sum(1) - left[of.rows].square().sum(1)
    expected = torch.stack([of.values.mean(), torch.tensor(len(of.rows) / len(target)), more.sum() / len(target)])
    torch.testing.assert_close(architecture.running[latent], expected.clamp(min=0), atol=1e-4, rtol=1e-4)
    architecture.running[:] = 1.0
    architecture.running[latent], architecture.seen[:] = 0.0, 1000
    assert trainer._encode(inputs, None)[2].latents.ne(latent).all()
    sae.eval()
    assert trainer._encode(inputs, None)[2].latents.eq(latent).any()


def test_the_first_latents_of_a_matryoshka_reconstruct_alone(tmp_path):
    data = sparse_data(1000, seed=1).float()
    arms = recipe(steps=400, architecture="matryoshka", nested=[0.25, 1.0], prefix=0), recipe(steps=400, prefix=0)
    left = []
    for rtsae in train(tmp_path, *arms):
        with torch.no_grad():
            latents = rtsae.encode(data)
            latents[:, 8:] = 0
            residuals = rtsae.dynamics.residuals(data)
            left.append((rtsae.decode_residuals(latents) - residuals).square().mean().item())
    assert left[0] < 0.95 * left[1]
