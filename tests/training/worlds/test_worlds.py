"""What every world offers, and that the prompts of committed tables stay what they were."""

import hashlib
import json

import pytest
import torch

from training.data.prompts import read_samples
from training.recipe import Collect
from training.worlds import KINDS, load_world, worlds


def test_there_is_the_bundled_world_and_no_other_by_chance():
    assert "shapes" in worlds()
    with pytest.raises(ValueError, match=r"no world 'shape'; there are \[.*'shapes'"):
        load_world("shape")


@pytest.mark.parametrize("name", worlds())
def test_a_world_keeps_its_promises(name):
    world = load_world(name)
    assert world.name == name and set(world.local) < set(world.factors)
    assert all(value in world.factors[factor] for factor, value in world.targets)
    assert set(world.domains) <= set(world.steered) and world.domains[0] != world.domains[1]
    scenes = world.sample(20, seed=1, held_out=True)
    assert scenes == world.sample(20, seed=1, held_out=True) != world.sample(20, seed=2, held_out=True)
    assert all(scene[factor] in values for scene in scenes for factor, values in world.factors.items())
    told = world.describe(scenes, 3)
    assert told == world.describe(scenes, 3) and len(told) == 20
    assert len(world.prompts(5, seed=0)) == 5 != world.prompts(5, seed=0, held_out=True)
    masks = world.masks(scenes, 16)
    assert masks.shape == (20, 16, 16) and set(masks.unique().tolist()) <= {0.0, 1.0} and masks.any((1, 2)).all()


@pytest.mark.parametrize("name", worlds())
def test_probes_leave_the_factor_open_or_contradict_it(name):
    world = load_world(name)
    for factor, value in world.targets:
        unsaid, against = (world.probe(factor, value, kind, 4, seed=0) for kind in KINDS)
        assert unsaid.scenes == against.scenes and unsaid.prompts != against.prompts
        assert unsaid.prompted == against.prompted and unsaid.seeds == against.seeds
        assert len(set(unsaid.seeds)) == len(unsaid.prompts) == 4
        assert all(scene[factor] != value for scene in unsaid.scenes)
        size = world.image_size
        assert against.mask.shape == (4, size, size) and bool(against.mask.all()) == (factor not in world.local)


def test_prompts_of_shapes_say_what_they_should():
    world = load_world("shapes")
    for factor, value in world.targets:
        if factor in ("colour", "shape", "background"):
            unsaid, against = (world.probe(factor, value, kind, 6, seed=0) for kind in KINDS)
            assert all(value in text for text in against.prompted)
            assert not any(f"{value} " in f"{text} " for text in unsaid.prompts + against.prompts)
            assert all(s[factor] in text for s, text in zip(against.scenes, against.prompts, strict=True))
            assert not any(f"{s[factor]} " in f"{t} " for s, t in zip(unsaid.scenes, unsaid.prompts, strict=True))


def test_the_prompts_behind_committed_results_are_the_same_as_ever():
    world, told = load_world("shapes"), []
    asked = (("open", 8, 0), ("open", 4, 300), ("contradicted", 32, 101), ("contradicted", 4, 501))
    for target in world.targets:
        for kind, count, seed in asked:
            one = world.probe(*target, kind, count, seed)
            mask = hashlib.sha256(one.mask.numpy().tobytes()).hexdigest()
            told.append([one.prompts, one.prompted, one.seeds, one.scenes, mask])
    collect = Collect(prompts="shapes", count=50, steps=5, guidance_scale=3, batch_size=10, tokens_per_image=64)
    told += [world.describe(world.sample(64, 60_000_064, held_out=False), 64), read_samples(collect, 3)]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    assert digest == "065a435086d3e85990cdc0286fe608e84118f7af1f7df11fb37304e683217936"


def test_what_is_seen_in_a_picture_of_shapes():
    world = load_world("shapes")
    empty = {f"{p}.{f}": None for p in world.factors["place"] for f in ("shape", "colour", "size")}
    reading = empty | {"background": "navy", "style": "flat", "valid": "yes"}
    star = {"left.shape": "star", "left.colour": "red", "left.size": "small"}
    heart = {"right.shape": "heart", "right.colour": "blue", "right.size": "large"}
    one = {"shape": "star", "colour": "red", "size": "small", "place": "left", "background": "navy", "style": "flat"}
    assert world.seen(reading | star) == one | {"valid": True}
    assert world.seen(reading | star | {"valid": "no"}) == one | {"valid": False}
    nothing = dict.fromkeys(world.local) | {"background": "navy", "style": "flat", "valid": False}
    assert world.seen(reading) == nothing == world.seen(reading | star | heart)
    assert [o["place"] for o in world.objects(reading | star | heart)] == ["left", "right"]


def test_masks_lie_on_the_objects_of_shapes():
    world = load_world("shapes")
    scene = world.sample(1, 0, held_out=False)[0] | {"place": "left", "size": "small"}
    small, large = world.masks([scene, scene | {"size": "large"}], 64)
    assert (small <= large).all() and 1.3 < (large.sum() / small.sum()).sqrt() < 1.7
    y, x = torch.nonzero(small, as_tuple=True)
    assert abs(x.float().mean() + 0.5 - 16) < 0.5 and abs(y.float().mean() + 0.5 - 32) < 0.5
