"""What the measurement on language models compares, and how it is counted."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from training.experiments.sequences import (
    CONTEXT,
    DYNAMICS,
    NETWORKS,
    Held,
    Layered,
    contexts,
    differences,
    markdown,
    recipe,
)

IDS = contexts(["A text that is read by both networks, over and over again.\n" * 20])


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_network_reads_its_own_trajectories(name):
    """What is read from them is what it predicts, at the places whose next characters come with them."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    states, following = network.trajectories(IDS)
    read = network.read(states)
    assert states.shape[1:] == (network.steps, 64) and read.shape[:2] == following.shape
    every = slice(8, None, 8) if isinstance(network, Layered) else slice(8, None)
    predicted = network(IDS[:, :-1])[:, every].flatten(0, 1)
    torch.testing.assert_close(read.flatten(0, 1), predicted, atol=1e-5, rtol=1e-5)
    assert torch.equal(following.flatten(), IDS[:, 1:][:, every].flatten()) and IDS.shape[1] == CONTEXT + 1


@torch.no_grad()
def test_what_is_unexplained_and_recovered_of_the_mean_and_of_the_states():
    torch.manual_seed(0)
    held = Held(NETWORKS["recurrent"](), IDS)
    mean = held.mean.expand_as(held.states)
    assert held.unexplained(held.states) == 0 and held.unexplained(mean) == pytest.approx(1)
    assert held.recovered(held.states) == 1 and held.recovered(mean) == 0
    torch.testing.assert_close(differences(held.states).cumsum(1), held.states, atol=1e-6, rtol=1e-5)
    found = held.of_dynamics(held.states)
    # the dynamics know the first state, and of each later one what they predict from the one before
    steps = held.states.shape[1]
    assert found["fvu_teacher_forced"] == pytest.approx(sum(1 - r2 for r2 in found["r2"]) / steps, abs=1e-3)
    assert found["fvu_teacher_forced"] <= found["fvu_online"] < 1


def test_all_kinds_have_as_many_active_latents_in_a_trajectory():
    a = Namespace(each=[1, 8], seeds=[0, 1], latents=64, training_steps=5)
    settings = recipe(Path("x"), ["rtsae", "per-step", "topk"], 7, a)
    trained = {name: settings.variant(name).train for name in settings.variants}
    assert [trained[f"{kind}-8-1"].k for kind in ("rtsae", "per-step", "topk")] == [56, 56, 8]
    assert settings.variant("rtsae-8-1").seed == 1 and not settings.trajectories.startswith("runs")


def test_a_table_for_each_number_of_active_latents():
    figures = {"l0": 8.1, "fvu_causal": 0.6, "fvu_teacher_forced": 0.5, "recovered": 0.4}
    rows = [
        {"process": "recurrent", "kind": "topk", "each": 1, "seed": seed, "fvu_online": value} | figures
        for seed, value in enumerate((0.5, 0.7))
    ]
    alone = {"loss": 2.0, "loss_of_mean": 3.0, "r2": [0.5], "fvu_online": 0.8, "steps": 8}
    rows.append({"process": "recurrent", "kind": DYNAMICS} | figures | alone)
    text = markdown(rows)
    assert "Recurrent, 8 active latents in a trajectory of 8 steps" in text and "| recurrent | 2.00 | 3.00 |" in text
    assert "| `topk` | 8.1 | 0.600 ± 0.141 | 0.600 ± 0.000 |" in text
