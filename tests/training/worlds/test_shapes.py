"""The bundled world: scenes, captions, scorer and pipeline."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.worlds.pictures import load_pipeline
from training.worlds.scoring import accuracy
from training.worlds.shapes.captions import WORDS, caption
from training.worlds.shapes.evaluate import evaluate
from training.worlds.shapes.pipeline import ALIGNED, factor_cells
from training.worlds.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    FACTORS,
    SHAPES,
    is_held_out,
    render,
    render_layers,
    sample_scenes,
)
from training.worlds.shapes.scorer import held_out_renders

EXAMPLES = Path(__file__).parents[3] / "examples"


def test_same_seed_same_picture():
    assert torch.equal(render(sample_scenes(16, 3)), render(sample_scenes(16, 3)))
    assert not torch.equal(render(sample_scenes(16, 3)), render(sample_scenes(16, 4)))


def test_the_world_is_as_large_as_promised():
    sizes = {name: len(values) for name, values in FACTORS.items()}
    assert sizes == {"shape": 6, "colour": 8, "size": 2, "place": 5, "background": 5, "style": 5}


def test_every_value_occurs_and_objects_of_a_pair_stand_apart():
    scenes = sample_scenes(2000, 0)
    assert scenes.shape.unique().tolist() == list(range(6)) and scenes.colour.unique().tolist() == list(range(8))
    pairs = scenes[scenes.count == 2]
    assert 0.25 < len(pairs) / 2000 < 0.42 and (pairs.place[:, 0] != pairs.place[:, 1]).all()


def test_held_out_combinations_never_appear_in_training():
    assert not is_held_out(sample_scenes(500, 1, held_out=False)).any()
    assert is_held_out(sample_scenes(500, 1, held_out=True)).all()


def test_flat_pictures_have_the_named_colours():
    scenes = sample_scenes(4000, 2, objects=1)
    scenes = scenes[scenes.style == 0][slice(50)]
    images, cover, _ = render_layers(scenes)
    palette, backgrounds = torch.tensor(list(COLOURS.values())), torch.tensor(list(BACKGROUNDS.values()))
    for i in range(len(scenes)):
        inside, outside = images[i][:, cover[i, 0] > 0.99].mean(1), images[i][:, cover[i, 0] == 0].mean(1)
        assert (palette - inside).norm(dim=1).argmin() == scenes.colour[i, 0]
        assert (backgrounds - outside).norm(dim=1).argmin() == scenes.background[i]


def test_captions_say_what_they_claim_to_name_and_nothing_else():
    scenes, rng = sample_scenes(300, 5, objects=1), random.Random(0)
    for i in range(300):
        text, named, world = caption(scenes, i, rng)
        words = f" {text.replace(',', '')} "
        colour, shape = list(COLOURS)[scenes.colour[i, 0]], SHAPES[scenes.shape[i, 0]]
        assert (f" {colour} " in words) == ("colour" in named[0])
        assert (f" {shape} " in words) == ("shape" in named[0])
        sizes = WORDS["size"][FACTORS["size"][scenes.size[i, 0]]]
        assert any(f" {w} " in words for w in sizes) == ("size" in named[0])
        assert (FACTORS["background"][scenes.background[i]] in text) == ("background" in world)


def test_cells_say_what_each_part_of_the_picture_shows():
    scenes = sample_scenes(64, seed=3)
    cells = factor_cells(scenes, render_layers(scenes)[2])
    assert cells.shape == (64, len(ALIGNED), 8, 8) and list(ALIGNED)[0] == "object"
    for i in range(len(scenes)):
        objects = cells[i, 0].bool()
        for name, cell in zip(list(ALIGNED)[1:], cells[i, 1:], strict=True):
            code = getattr(scenes, name)[i]
            if code.ndim == 0:
                assert (cell == code).all()
            else:
                assert set(cell[objects].tolist()) == set(code[: scenes.count[i]].tolist())
                assert (cell[~objects] == -1).all()


def test_the_bundled_scorer_reads_held_out_renders(scorer):
    right = accuracy(scorer, *held_out_renders(count=600, seed=123))
    assert right.pop("invalid") > 0.95  # a corrupted picture may by chance still be a scene
    assert min(right.values()) > 0.99, right


def test_the_bundled_pipeline_loads_without_this_package():
    program = (
        "import sys\nfrom diffusers import StableDiffusionPipeline\n"
        f"pipe = StableDiffusionPipeline.from_pretrained({str(EXAMPLES / 'shapes-sd')!r})\n"
        "assert type(pipe.scheduler).__name__ == 'DDIMScheduler'\n"
        "assert pipe('a red star', num_inference_steps=2, output_type='np').images.shape == (1, 64, 64, 3)\n"
        "assert not any(name.startswith('diffusers_rtsae') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")


@pytest.mark.slow
def test_the_bundled_pipeline_draws_what_it_is_told(scorer):
    """Floors under the committed weights: examples/shapes-sd/metrics.json has their figures; raise both together."""
    result, _ = evaluate(
        load_pipeline(EXAMPLES / "shapes-sd", "cpu"), scorer, 48, steps=15, guidance=3.0, batch_size=24
    )
    one = result["1 object"]
    assert min(one["background"], one["place"]) > 0.95 and min(one.values()) > 0.8, result
    assert result["2 objects"]["binding"] > 0.85 and result["valid"] > 0.9, result
