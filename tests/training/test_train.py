"""Training resumes bit for bit, recovers a known dictionary, and says what is wrong."""

import pytest
import torch

from diffusers_rtsae.models import LinearDynamics
from training.checkpoint import load_checkpoint, save_checkpoint
from training.evaluate import evaluate
from training.train import auxiliary_loss, geometric_median, train_site

D, ANCHORS = 16, [900, 500, 1]


def recipe(**changes) -> dict:
    train = {
        "num_latents": 32, "k": 3, "steps": 40, "batch_size": 128, "learning_rate": 3e-3, "auxiliary": 1 / 32,
        "dead_after": 1000, "prefix": 0.5, "checkpoint_every": 10,
    }  # fmt: skip
    return {"seed": 0, "collect": {}, "fit": {}, "train": train | changes}


def sparse_data(count: int = 4096, features: int = 24, seed: int = 0) -> torch.Tensor:
    """Trajectories that are sums of three of 24 known features."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(
        torch.randn(features, 3 * D, generator=torch.Generator().manual_seed(7)), dim=1
    )
    chosen = torch.rand(count, features, generator=generator).topk(3, dim=1).indices
    code = torch.zeros(count, features).scatter(1, chosen, 4 + torch.rand(count, 3, generator=generator))
    return (code @ directions).unflatten(1, (3, D)).half()


def dynamics_of(data: torch.Tensor) -> LinearDynamics:
    dynamics = LinearDynamics(3, D)
    dynamics.mean.copy_(data.float().mean(0))
    dynamics.scale.copy_((data.float() - dynamics.mean).square().mean((0, 2)).sqrt())
    return dynamics


def test_a_killed_run_continues_bit_for_bit(tmp_path, monkeypatch):
    data = sparse_data()
    known = ("mid_block", ANCHORS, data, data, dynamics_of(data))
    whole = train_site(recipe(), *known, tmp_path / "whole", "cpu", "data")

    class Killed(Exception):
        pass

    saves = []

    def save_then_die(*arguments):
        save_checkpoint(*arguments)
        saves.append(1)
        if len(saves) == 2:
            raise Killed

    monkeypatch.setattr("training.train.save_checkpoint", save_then_die)
    with pytest.raises(Killed):
        train_site(recipe(), *known, tmp_path / "killed", "cpu", "data")
    resumed = train_site(recipe(), *known, tmp_path / "killed", "cpu", "data")
    assert len(saves) == 4  # twenty steps were kept, twenty were made
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_changed_recipe_does_not_continue_another_run(tmp_path):
    data = sparse_data()
    train_site(recipe(steps=10), "mid_block", ANCHORS, data, data, dynamics_of(data), tmp_path, "cpu", "data")
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        train_site(recipe(steps=10, k=4), "mid_block", ANCHORS, data, data, dynamics_of(data), tmp_path, "cpu", "data")


def test_known_features_are_found(tmp_path):
    data = sparse_data()
    rtsae = train_site(
        recipe(steps=600, prefix=0.2), "mid_block", ANCHORS, data, data, dynamics_of(data), tmp_path, "cpu", "data"
    )
    report = evaluate(rtsae, sparse_data(1000, seed=1).float(), k=3)
    assert report["fvu_residual"] < 0.15
    assert report["l0_threshold"] == pytest.approx(3, abs=0.3)
    norms = rtsae.decoder.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-4, rtol=1e-4)
    assert report["prefix_recall"] == sorted(report["prefix_recall"]) and report["prefix_recall"][-1] == 1.0


def test_auxiliary_loss_pulls_dead_latents_towards_the_error(tmp_path):
    data = sparse_data(256)
    rtsae = train_site(recipe(steps=1), "mid_block", ANCHORS, data, data, dynamics_of(data), tmp_path, "cpu", "data")
    rtsae.zero_grad()
    error = torch.randn(64, 3, D)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[5] = True
    pre = rtsae.pre_activations(error)
    before = auxiliary_loss(rtsae, error, pre, dead, k=4)
    before.backward()
    assert rtsae.decoder.grad[5].abs().sum() > 0
    assert (rtsae.decoder.grad[~dead] == 0).all()
    with torch.no_grad():
        rtsae.decoder -= 0.5 * rtsae.decoder.grad
    assert auxiliary_loss(rtsae, error, rtsae.pre_activations(error), dead, k=4) < before


def test_geometric_median_resists_outliers():
    points = torch.cat([torch.zeros(90, 2) + 0.01 * torch.randn(90, 2), torch.full((10, 2), 100.0)])
    assert geometric_median(points).norm() < 0.1 < points.mean(0).norm()


def test_checkpoint_without_file_starts_at_zero(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    assert load_checkpoint(tmp_path / "none", {"p": parameter}, torch.optim.Adam([parameter]), "x") == 0
