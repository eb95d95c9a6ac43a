"""A world that is added from outside: a folder whose `world.py` defines `WORLD`."""

import json
import sys

import pytest
from small_training import RECIPE

from diffusers_rtsae import load_dictionary
from training import worlds
from training.data.prompts import read_samples
from training.experiments import capacity
from training.recipe import Recipe
from training.run import run

(SITE,) = RECIPE["sites"]
STARS = """
import random
from pathlib import Path

import torch

from .. import World


class Stars(World):
    name = "stars"
    factors = {"colour": ("red", "blue"), "style": ("flat", "dotted"), "background": ("white", "navy")}
    local = ("colour",)
    targets = (("colour", "red"), ("style", "dotted"))
    domains = ("colour", "style")
    image_size = 64

    pipeline = Path("examples/shapes-sd")
    scorer = judge = Path("examples/shapes-scorer")
    dictionary = Path("examples/shapes-rtsae")
    steps = 2
    guidance = 3.0

    def prompts(self, count, seed, held_out=False):
        return self.describe(self.sample(count, seed, held_out), seed)

    def sample(self, count, seed, held_out):
        draw = random.Random(2 * seed + held_out)
        return [{factor: draw.choice(values) for factor, values in self.factors.items()} for _ in range(count)]

    def describe(self, scenes, seed, leave_open=()):
        words = [{f: "" if f in leave_open else value for f, value in scene.items()} for scene in scenes]
        return [f"a large {w['colour']} star in the centre, {w['style']}, on {w['background']}" for w in words]

    def masks(self, scenes, size):
        middle = torch.zeros(len(scenes), size, size)
        middle[:, size // 4 : -size // 4, size // 4 : -size // 4] = 1
        return middle

    def objects(self, reading):
        return [{"colour": reading["centre.colour"]}] if reading["centre.shape"] == "star" else []


WORLD = Stars()
"""


@pytest.fixture
def stars(tmp_path, monkeypatch):
    folder = tmp_path / "worlds" / "stars"
    folder.mkdir(parents=True)
    (folder / "world.py").write_text(STARS)
    monkeypatch.setattr(worlds, "__path__", [*worlds.__path__, str(folder.parent)])
    yield worlds.load_world("stars")
    for name in [name for name in sys.modules if name.startswith("training.worlds.stars")]:
        del sys.modules[name]


def test_a_world_is_listed_trained_on_steered_and_read(stars, tmp_path, monkeypatch, capsys):
    assert worlds.worlds() == ["people", "shapes", "stars"]
    recipe = Recipe(**RECIPE | {"collect": RECIPE["collect"] | {"prompts": "stars", "count": 4}})
    assert {sample.prompt for sample in read_samples(recipe.collect, seed=1)} == {*stars.prompts(4, seed=1)}
    run(recipe, tmp_path / "stars-rtsae", tmp_path / "work")
    sae = load_dictionary(tmp_path / "stars-rtsae").sites[SITE]
    assert sae.typical_activation.max() > 0

    out = tmp_path / "capacity.json"
    told = f"capacity --world stars --sites {SITE} --strengths 4 --apply-to cond --kinds open --images 2 --samples 16"
    monkeypatch.setattr(sys, "argv", [*told.split(), "--out", str(out)])
    capacity.main()
    content = json.loads(out.read_text())
    assert content["settings"]["steps"] == "2"
    unsteered, steered = content["rows"]
    assert {"colour", "style"} < steered.keys() and steered["sites"] == SITE
    assert all(0 <= steered[factor]["success"] <= 1 for factor in stars.steered)
    assert capacity.markdown(content["rows"]) in capsys.readouterr().out
