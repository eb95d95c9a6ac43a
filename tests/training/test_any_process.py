"""Dictionaries of a process that is no denoising, from files and from memory, and what is made with them."""

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from diffusers_rtsae import load_dictionary
from training import fit
from training.commands import evaluate, train
from training.evaluation.reconstruction import evaluate as measured
from training.recipe import load_recipe

SETTINGS = {"num_latents": 24, "k": 3, "steps": 30, "batch_size": 64, "learning_rate": 3e-3, "checkpoint_every": 10}


def noisy_rotations(count: int, seed: int = 0) -> torch.Tensor:
    """Trajectories `(count, 4, 8)` of a linear process that sparse events disturb."""
    generator = torch.Generator().manual_seed(seed)
    turn = 0.9 * torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(7))).Q
    states = [torch.randn(count, 8, generator=generator)]
    for _ in range(3):
        states.append(states[-1] @ turn.T + (torch.randn(count, 8, generator=generator) - 1.5).relu())
    return torch.stack(states, 1)


@pytest.mark.parametrize("kind", ["rtsae", "static", "tide", "mixture"])
def test_a_dictionary_of_another_process_is_saved_and_loaded_and_no_pipeline_takes_it(tmp_path, pipe, kind):
    states = noisy_rotations(600)
    few = {"experts": 2} if kind == "mixture" else {}
    dictionary = fit(states.split(200), kind=kind, base_model="turns", name="turn.0", **SETTINGS, **few)
    assert dictionary.config["anchors"] == [0, 1, 2, 3]
    dictionary.save(tmp_path)
    trained, loaded = dictionary.sites["turn.0"], load_dictionary(tmp_path, dtype=torch.float32).sites["turn.0"]
    held_out = states[-60:]
    torch.testing.assert_close(loaded.encode(held_out), trained.encode(held_out))
    assert loaded.encode(held_out).any()
    assert loaded.encode(held_out[:, :2]).shape == (60, 24)
    torch.testing.assert_close(loaded.reconstruct(held_out), trained.reconstruct(held_out))
    if kind == "rtsae":
        torch.testing.assert_close(loaded.decode(loaded.encode(held_out)), loaded.reconstruct(held_out))
        metrics = dictionary.config["metrics"]["turn.0"]
        assert min(metrics["r2"]) > 0.5 and metrics["fvu_online"] < 1
        # held out: the second half of the last tenth, every other sample
        assert measured(loaded, states[541::2], 3)["fvu_online"] == metrics["fvu_online"]
    card = (tmp_path / "README.md").read_text()
    assert "sequences of turns" in card and "load_rtsae" not in card and "steering" not in card
    with pytest.raises(ValueError, match="turn.0 is of another process, with the steps 0 to 3: no pipeline can be st"):
        pipe.load_rtsae(tmp_path)


def test_a_recipe_trains_on_a_folder_and_a_report_measures_on_one(tmp_path, capsys):
    shards, out = tmp_path / "shards", tmp_path / "out"
    shards.mkdir()
    for i in range(2):
        save_file({"states": noisy_rotations(200, seed=i)}, shards / f"{i}.safetensors")
    recipe = tmp_path / "recipe.yaml"
    variants = {"whole": {}, "steps": {"kind": "static"}}
    content = {"trajectories": str(shards), "base_model": "turns", "train": SETTINGS, "variants": variants}
    recipe.write_text(yaml.safe_dump(content))
    train("train", [str(recipe), "--dry-run"])
    assert "states: 400 trajectories of 4 steps x 8 channels, 0.0 GiB on disk" in capsys.readouterr().out
    train("train", [str(recipe), "--out", str(out), "--work", str(tmp_path / "work"), "--cpu"])
    with pytest.raises(SystemExit):
        train("collect", [str(recipe)], collect_only=True)
    evaluate("evaluate", [str(out / "whole"), str(out / "steps"), "--trajectories", str(shards), "--out", str(out)])
    report = json.loads((out / "report.json").read_text())
    assert list(report) == ["whole states", "steps states"] and report["whole states"]["tokens"] == 400
    # what a continued run is given must be what it began with
    save_file({"states": noisy_rotations(200, seed=5)}, shards / "1.safetensors")
    with pytest.raises(SystemExit):
        train("train", [str(recipe), "--out", str(out), "--work", str(tmp_path / "work"), "--cpu"])
    assert "trajectories.1.safetensors" in capsys.readouterr().err


def test_what_is_asked_of_trajectories_that_exist_is_checked(tmp_path):
    states, recipe = noisy_rotations(200), tmp_path / "recipe.yaml"
    with pytest.raises(ValueError, match=r"fit: train.kk: Extra inputs are not permitted"):
        fit(states, kk=3, **SETTINGS)
    with pytest.raises(ValueError, match="needs a latent for each of the 4 anchors"):
        fit(states, layout="per_step", **SETTINGS | {"num_latents": 3})
    with pytest.raises(ValueError, match="differ at every step, got the same in all at step 1"):
        fit(states.index_fill(1, torch.tensor([1]), 0.0), **SETTINGS)
    recipe.write_text(yaml.safe_dump({"trajectories": "x", "anchors": 3, "base_model": "turns", "train": SETTINGS}))
    with pytest.raises(ValueError, match=r"`trajectories` that exist take no \['anchors'\]"):
        load_recipe(recipe)
    recipe.write_text(yaml.safe_dump({"base_model": "turns", "train": SETTINGS}))
    with pytest.raises(ValueError, match=r"expected \['pipeline', 'sites', 'anchors', 'collect'\], or `trajectories`"):
        load_recipe(recipe)
