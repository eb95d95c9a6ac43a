"""What a run would take, computed at the true geometry of the models from their configuration alone."""

import json
import shutil
from pathlib import Path

import pytest

from training.commands import train as main
from training.data.store import TrajectoryStore
from training.plan import describe, plan
from training.recipe import load_recipe
from training.run import announce

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "training" / "recipes"
UNETS = {
    "sd15.yaml": {
        "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
        "block_out_channels": (320, 640, 1280, 1280),
    },
    "sdxl.yaml": {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
        "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": [1, 2, 10],
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip


def folder(path: Path, **unet) -> str:
    """A pipeline's configuration without its weights."""
    config = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4} | unet
    (path / "unet").mkdir()
    (path / "unet" / "config.json").write_text(json.dumps(config))
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (path / "model_index.json").write_text(json.dumps(index))
    return str(path)


@pytest.mark.parametrize("name, tokens", [("sd15.yaml", 256), ("sdxl.yaml", 1024)])
def test_the_recipes_of_large_models_fit_their_geometry(tmp_path, name, tokens):
    recipe = load_recipe(RECIPES / name, [f"pipeline={folder(tmp_path, **UNETS[name])}"])
    found = plan(recipe, 50.0)
    site = found["sites"][recipe.sites[0]]
    assert (site["tokens"], site["channels"], found["anchors"]) == (tokens, 1280, 5)
    assert site["trajectories_gib"] == pytest.approx(site["trajectories"] * 5 * 1280 * 2 / 2**30, abs=0.01)
    # a picture of Stable Diffusion 1.5 takes about 0.68 teraflop a step and row, one of SDXL about 6
    per_row = found["generation_petaflop"] * 1e3 / (recipe.collect.count * 25 * 2)
    assert per_row == pytest.approx({"sd15.yaml": 0.68, "sdxl.yaml": 6.0}[name], rel=0.2)
    assert recipe.sites[0] in describe(found, 50.0) and "petaflop" in describe(found, 50.0)


def test_the_plan_of_the_bundled_world_is_what_it_takes(tmp_path):
    recipe = load_recipe(RECIPES / "shapes.yaml", [f"pipeline={ROOT / 'examples/shapes-sd'}"])
    site = plan(recipe, 1.0)["sites"]["up_blocks.1.attentions.1"]
    assert (site["tokens"], site["channels"], site["trajectories"]) == (64, 160, 64 * 1536)


def test_a_picture_without_guidance_takes_half(tmp_path):
    taken = {}
    for scales in ("1.0", "3.0", "[1.0, 3.0]"):
        given = [
            f"pipeline={ROOT / 'examples/shapes-sd'}",
            f"collect.guidance_scale={scales}",
            "collect.count=1000000",
        ]
        taken[scales] = plan(load_recipe(RECIPES / "shapes.yaml", given), 1.0)["generation_petaflop"]
    assert taken["1.0"] == pytest.approx(taken["3.0"] / 2, abs=0.1)
    assert taken["[1.0, 3.0]"] == pytest.approx(0.75 * taken["3.0"], abs=0.1)


def test_a_dry_run_prints_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(
        "sys.argv", ["train", "training/recipes/shapes.yaml", "--dry-run", "--work", str(tmp_path / "w")]
    )
    main()
    assert "98,304 trajectories" in capsys.readouterr().out and not (tmp_path / "w").exists()


def test_too_little_disk_is_told_before_the_run(tmp_path, monkeypatch):
    recipe = load_recipe(RECIPES / "sd15.yaml", [f"pipeline={folder(tmp_path, **UNETS['sd15.yaml'])}"])
    usage = shutil.disk_usage(tmp_path)._replace(free=2**30)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"has 1.00 GiB free, 15.26 GiB are needed. Keep fewer `tokens_per_image`"):
        announce(recipe, 20000, TrajectoryStore(tmp_path / "shards", "x"))


def test_a_site_that_is_not_there(tmp_path):
    recipe = load_recipe(RECIPES / "sd15.yaml", [f"pipeline={folder(tmp_path, **UNETS['sd15.yaml'])}", "sites=[up]"])
    with pytest.raises(ValueError, match="has no site 'up'"):
        plan(recipe, 1.0)


def test_denoisers_other_than_unets_are_refused(tmp_path):
    path = tmp_path / "model_index.json"
    path.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(ValueError, match="has no denoiser"):
        plan(load_recipe(RECIPES / "sd15.yaml", [f"pipeline={tmp_path}"]), 1.0)
