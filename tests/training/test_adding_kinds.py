"""A kind and an architecture that are added from outside: one module and one line each."""

import torch
from small_training import RECIPE

from diffusers_rtsae import SparseAutoencoder, load_dictionary, models
from training.architectures.batch_topk import BatchTopK
from training.kinds.static import Steps
from training.plan import plan
from training.recipe import Recipe
from training.registry import ARCHITECTURES, KINDS, Kind
from training.run import run

SITE = RECIPE["sites"][0]


class Denoising(SparseAutoencoder):
    """An autoencoder that was trained on activations with noise."""

    summary = "An autoencoder that was trained on activations with noise."


class NoisySteps(Steps):
    """Single steps, of which the encoder sees half the channels while it trains."""

    model, draws = Denoising, True

    def hide(self, centred, unit):
        return centred * (torch.rand_like(centred) < 0.5), unit


class Penalised(BatchTopK):
    """BatchTopK with a penalty on the length of the code."""

    def loss(self, target, code, decoder, centre, unit):
        loss, error, reconstruction = super().loss(target, code, decoder, centre, unit)
        return loss + 10 * code.values.mean(), error, reconstruction


def test_a_kind_and_an_architecture_are_trained_saved_loaded_and_steered(tmp_path, monkeypatch, pipe, draw):
    monkeypatch.setitem(models.KINDS, "Denoising", Denoising)
    monkeypatch.setitem(KINDS, "noisy", Kind(f"{__name__}:NoisySteps"))
    monkeypatch.setitem(ARCHITECTURES, "penalised", f"{__name__}:Penalised")
    train = RECIPE["train"] | {"kind": "noisy"}
    recipe = Recipe(**RECIPE | {"train": train, "variants": {"plain": {}, "short": {"architecture": "penalised"}}})
    assert plan(recipe, 1.0)["sites"][SITE]["dictionary_gib"] >= 0
    run(recipe, tmp_path / "out", tmp_path / "work")
    plain, short = (load_dictionary(tmp_path / "out" / name).sites[SITE] for name in ("plain", "short"))
    assert type(plain) is Denoising and plain.threshold.min() > 0
    norms = plain.decoder.float().norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-3, rtol=1e-3)
    assert short.mean_activation.mean() < plain.mean_activation.mean()
    pipe.load_rtsae(tmp_path / "out" / "plain")
    unsteered = draw(pipe, steps=2)
    pipe.set_rtsae_features({2: 30.0}, clip=False)
    assert (draw(pipe, steps=2) != unsteered).any()
