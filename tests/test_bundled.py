"""What the commands know of the bundled worlds is so."""

import json
import string
from pathlib import Path

import pytest

from diffusers_rtsae.worlds import WORLDS

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_is_bundled_and_its_prompts_name_its_factors(name):
    world = WORLDS[name]
    for bundled in (world.pipeline, world.dictionary, world.scorer, world.prompts):
        assert (EXAMPLES / bundled).exists()
    read = json.loads((EXAMPLES / world.scorer / "config.json").read_text())["factors"]
    values = {}
    for factor, own in read.items():
        values.setdefault(factor.rpartition(".")[2], set()).update(own)
    labels = json.loads((EXAMPLES / world.dictionary / "labels.json").read_text())
    for factor, scenes in world.scenes.items():
        labelled = {label["value"] for label in labels.values() if label["factor"] == factor}
        assert len(labelled) > 1 and labelled <= values[factor]
        for is_open, naming in scenes:
            assert "{}" not in is_open and naming.count("{}") == 1
            assert not values[factor] & {*is_open.replace(",", "").split()}
    fields = {field for _, field, _, _ in string.Formatter().parse(world.sentence) if field}
    assert fields == {*world.usual} == {*world.scenes}
    assert all(value in values[factor] for factor, value in world.usual.items())
