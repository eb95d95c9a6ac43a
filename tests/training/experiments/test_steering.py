"""Measuring steering, and every experiment from its command to its rows, at a size that means nothing."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from small_analysis import fit_less

from diffusers_rtsae import Dictionary, load_dictionary
from diffusers_rtsae.analysis.effect import States, frozen
from diffusers_rtsae.models import interpolate
from training.experiments import even, rivals, samplers
from training.experiments.constants import axes, concern, free_direction, mean_change
from training.experiments.rivals import subset
from training.experiments.steering import difference_of_means, measure, tokens_on
from training.experiments.table import changed
from training.worlds import load_world

ROOT = Path(__file__).parents[3]
SITE = "up_blocks.1.attentions.1"


def test_measure_counts_success_and_leakage():
    plain = {
        "shape": "star",
        "colour": "blue",
        "size": "small",
        "place": "left",
        "background": "white",
        "style": "flat",
    }
    plain["valid"] = True
    red, leaking = plain | {"colour": "red"}, plain | {"colour": "red", "style": "dotted"}
    invalid = dict.fromkeys(plain) | {"valid": False}
    cell = measure([red, leaking, invalid, plain], [plain] * 4, "colour", "red")
    assert cell == {"success": 0.5, "leakage": 0.5, "leakage_mean": (0.2 + 1.0) / 4, "valid": 0.75}


def test_what_a_label_changes_besides_is_told_by_factor():
    was = [[{"shape": "star", "colour": "blue", "size": "small", "valid": True}] * 2]
    now = [[was[0][0] | {"colour": "red"}, was[0][0] | {"colour": "red", "size": "large"}]]
    assert changed(now, was, "colour") == {"shape": 0.0, "size": 0.5}


def test_tokens_lie_on_what_a_mask_covers():
    mask = torch.zeros(2, 8, 8)
    mask[0, :4, :4] = 1
    mask[1, :, 0] = 1
    assert tokens_on(mask, 2).tolist() == [[True, False, False, False], [False] * 4]


def test_differences_of_means_add_up_to_nothing(pipe):
    world = load_world("shapes")
    found = difference_of_means(world, pipe, [SITE], 16, steps=2, guidance=3.0, batch_size=16).sites[SITE]
    directions = found.feature_trajectories().detach()
    assert directions.shape == (len(world.targets), 2, 160)
    for factor in world.steered:
        own = directions[[f == factor for f, _ in world.targets]]
        assert own.abs().max() > 0.1 and own.sum(0).abs().max() < 1e-3 * own.abs().max() * len(own)


def test_constants_of_a_pair_do_some_of_what_its_prompt_does_and_the_fitted_one_most(pipe, dictionary):
    pairs = [("a blue star in the centre, flat, on white", "a red star in the centre, flat, on white")]
    ((site, sae),) = dictionary.sites.items()
    pipe.load_rtsae(axes(sae))
    states = States(pipe, pairs, num_inference_steps=4, guidance_scale=3.0)
    where = concern(states, site)
    with frozen(pipe):
        fitted = free_direction(states, 80)
    pipe.unload_rtsae()

    def effect(found):
        assert found.shape == (3, 160)

        def constant(state, rows):
            at = interpolate(found, states.grids[site].coordinate(state.timestep))
            return {site: at.expand(len(rows), 1, -1) * where[id(state)][list(rows)][..., None]}

        return float(states.effects(constant))

    assert 0.1 < effect(mean_change(states, site)) < effect(fitted) < 1


def test_a_subset_reads_what_the_whole_reads(dictionary):
    ((_, whole),) = dictionary.sites.items()
    some = subset(whole, [7, 3])
    trajectories = torch.randn(4, 3, whole.config.in_channels)
    assert torch.equal(some.encode(trajectories), whole.encode(trajectories)[:, [7, 3]])
    assert torch.equal(some.typical_activation, whole.typical_activation[[7, 3]])


LABELS = ("red", "blue", "dotted")
TINY = ["--steps", "2", "--batch-size", "32"]
COMMANDS = {  # `capacity` is in worlds/test_adding_a_world.py
    "even": "--prompts 1",
    "hard": "--prompts 1 --strengths 1 --methods swap transfer",
    "samplers": "--prompts 1 --step-counts 3",
    "table": "--prompts 1 --seeds 0 --kinds open --methods prompt means feature random --samples 32",
    "unlearn": "--prompts 1 --features 2 --scales 0",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_experiment_runs_and_continues(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    out, command = tmp_path / f"{name}.json", [name, *TINY, *COMMANDS[name].split()]
    few = load_dictionary("examples/shapes-rtsae")
    few.labels = {label: few.labels[label] for label in (few.labels if name in ("even", "unlearn") else LABELS)}
    few.save(tmp_path / "few")
    command += ["--dictionary", str(tmp_path / "few")]
    known = {sampler: samplers.NOISE.known[sampler] for sampler in ("DDIM", "Heun", "DPM++ 2M")}
    monkeypatch.setattr(samplers, "NOISE", samplers.NOISE._replace(known=known))
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(out)])
    experiment = import_module(f"training.experiments.{name}")
    experiment.main()
    found = json.loads(out.read_text())
    assert found["rows"] and found["settings"]["pipeline"] == "examples/shapes-sd"
    assert experiment.markdown(found["rows"]) in capsys.readouterr().out

    if name in ("samplers", "table"):  # the others generate what they compare with before they look

        def never(*args, **options):
            raise AssertionError("measured again")

        monkeypatch.setattr(experiment, "run", never)
        experiment.main()
        assert json.loads(out.read_text()) == found


PAIRS = [("a blue star on white", "a red star on gray"), ("a green star on white", "a red star on black")]


@pytest.mark.slow
def test_rivals_of_several_values_are_fitted_and_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    fit_less(monkeypatch, steps=2, last=2)
    monkeypatch.setattr(rivals, "STEPS", 2)
    monkeypatch.setattr(rivals, "pairs", lambda *given, **asked: (PAIRS, []))
    whole = 64  # latents
    few = subset(load_dictionary("examples/shapes-rtsae").sites[SITE], list(range(whole)))
    Dictionary({SITE: few}).save(tmp_path / "few")
    command = ["rivals", "--dictionary", str(tmp_path / "few"), "--steps", "2", "--every", "13", "--latents", "2"]
    command += ["--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    rivals.main()
    for name in rivals.RIVALS:
        labels = load_dictionary(tmp_path / name).labels
        assert labels.keys() == {"white", "green"}
        latents = [latent for label in labels.values() for entry in label["features"] for latent in entry["latents"]]
        assert latents and max(latents) < (2 if name in rivals.CONSTANT else whole)
    random = load_dictionary(tmp_path / "random latents").labels
    assert {j for entry in random["white"]["features"] for j in entry["latents"]} <= set(drawn(0, whole))
    assert {j for entry in random["green"]["features"] for j in entry["latents"]} <= set(drawn(1, whole))


def drawn(i: int, whole: int) -> list[int]:
    return torch.randperm(whole, generator=torch.Generator().manual_seed(i))[:2].tolist()


def test_shares_are_of_valid_pictures_and_uneven_if_one_is_missing():
    seen = [{"valid": v, "colour": c} for v, c in ((True, "red"), (True, "red"), (True, "blue"), (False, "blue"))]
    found = even.shares(seen, ["red", "blue"], "colour")
    assert found == {"red": 0.6667, "blue": 0.3333} and even.ratio(found) == "2.00"
    assert even.ratio(even.shares(seen, ["red", "green"], "colour")) == "∞"


def test_an_unknown_world_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["table", "--world", "nowhere"])
    with pytest.raises(SystemExit):
        import_module("training.experiments.table").main()
    assert "invalid choice: 'nowhere'" in capsys.readouterr().err
