"""A recipe says what is wrong with it before anything is computed."""

import argparse
from pathlib import Path

import pytest

from training.commands import Adding
from training.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "training" / "recipes" / "shapes.yaml"


def test_the_bundled_recipe_is_one_and_can_be_changed():
    recipe = load_recipe(SHAPES, ["train.k=8", "anchors=4", "fit.residualize=false"])
    assert (recipe.train.k, recipe.anchors, recipe.fit.residualize) == (8, 4, False)


@pytest.mark.parametrize("change, message", [
    ("train.kk=8", r"train.kk: Extra inputs are not permitted"),
    ("train.k=-1", r"train.k: Input should be greater than 0"),
    ("train.k=many", r"train.k: Input should be a valid integer"),
    ("anchors=1", r"`anchors` must be at least 2 and at most the 25 steps, got 1"),
    ("collect.steps=2", r"`anchors` must be at least 2 and at most the 2 steps, got 3"),
    ("train.num_latents=8", r"`k` 16 is more than the 8 latents there are"),
    ("train.architecture=vanilla", r"train.architecture: .*no 'vanilla', expected one of \['atm', 'batch_topk'"),
    ("sites.a=1", r"Expected a change like train.k=8, got 'sites.a=1'"),
    ("train.k=[", r"Expected a change like train.k=8"),
    ("sites=[]", r"sites: List should have at least 1 item"),
    ("variants.a.kk=1", r"variant 'a' changes 'kk'; it may change"),
    ("variants.a.batch_size=1", r"variant 'a' changes \['batch_size'\], which all variants share"),
])  # fmt: skip
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(SHAPES, [change])


def test_a_file_that_is_no_recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    for content, message in (("[1, 2]", "is no recipe: expected a mapping with"), ("a: [", "is no YAML")):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_recipe(path)


def test_a_variant_changes_only_what_it_names():
    recipe = load_recipe(SHAPES, ["variants.a={k: 8, residualize: false, seed: 3}"])
    variant = recipe.variant("a")
    assert (variant.train.k, variant.fit.residualize, variant.seed) == (8, False, 3)
    assert isinstance(variant, Recipe) and variant.collect == recipe.collect and recipe.train.k == 16


def test_flags_with_several_values_add_up_and_a_key_is_set_once():
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", nargs="*", action=Adding, default=[])
    parser.add_argument("--of", nargs="*", action=Adding, default=[1, 2], type=int)
    found = parser.parse_args(["--set", "train.k=8", "--of", "3", "--set", "train.steps=20", "seed=1", "--of", "4"])
    assert found.set == ["train.k=8", "train.steps=20", "seed=1"] and found.of == [3, 4]
    assert parser.parse_args([]).of == [1, 2]
    with pytest.raises(ValueError, match=r"Expected each key once, got 'train.k' 2 times"):
        load_recipe(SHAPES, ["train.k=8", "seed=1", "train.k=4"])
