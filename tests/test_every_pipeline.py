"""Some classes in the table of every pipeline, measured again; the rest by `python -m tests.every_pipeline`."""

import json
from pathlib import Path

import diffusers
import pytest
from every_pipeline.__main__ import PAGE, ROWS, pipeline_classes, row_of
from every_pipeline.builds import BUILDS, UNBUILT, load_all
from every_pipeline.page import page, sentence

#: One of each way of calling a denoiser, and of what blocks return.
CLASSES = [
    "StableDiffusionPAGPipeline",  # a third part of the batch
    "StableDiffusionXLInstructPix2PixPipeline",  # three parts, the conditional one first
    "FluxPipeline",  # packed tokens, a call for each part, (text, image)
    "CogVideoXPipeline",  # (image, text)
    "AuraFlowPipeline",  # a first call at t / 1000 = 1
    "LTXImageToVideoPipeline",  # a time for each token, tokens that are given
    "WanPipeline",  # two denoisers that take turns
    "Ideogram4Pipeline",  # a denoiser for each part; time runs backwards
    "ZImagePipeline",  # lists of latents and texts
    "ErnieImagePipeline",  # blocks of (tokens, rows, channels)
    "LuminaPipeline",  # the conditional half first; time runs backwards
    "Kandinsky5T2VPipeline",  # channels last
    "QwenImageModularPipeline",  # a guider
    "StableAudioPipeline",  # noise levels
    "AnimateDiffPipeline",  # frames beside one another
]


@pytest.mark.parametrize("name", CLASSES)
def test_a_pipeline_is_steered_as_the_table_says(name):
    row = {row["class"]: row for row in json.loads(ROWS.read_text())}[name]
    found = row_of(name, most=3)
    assert found["verdict"] == row["verdict"] == "exact", found


def test_the_table_has_every_class_and_nothing_in_it_is_silently_wrong():
    load_all()
    rows = json.loads(ROWS.read_text())
    assert not {row["class"] for row in rows if row["verdict"] in ("wrong", "crash")}
    assert {row["class"] for row in rows} <= BUILDS.keys() | UNBUILT.keys()
    if diffusers.__version__ == "0.42.1":
        assert {row["class"] for row in rows} == pipeline_classes().keys()
        assert PAGE.read_text() == page(rows)
        readme = (Path(__file__).parents[1] / "README.md").read_text()
        assert sentence(rows) in " ".join(readme.split())
