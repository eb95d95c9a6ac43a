"""Trajectories depend on more than the denoiser: whatever changes them is named."""

import copy
import json

import pytest
import torch

from training.common.differences import differences
from training.data.fingerprint import fingerprint
from training.data.prompts import Sample
from training.recipe import Recipe

COLLECT = {"prompts": "shapes", "count": 1, "steps": 3, "guidance_scale": 1.0, "batch_size": 1, "tokens_per_image": 1}
TRAIN = {"num_latents": 8, "k": 2, "steps": 1, "batch_size": 4, "learning_rate": 1e-3}
SAMPLES, ANCHORS = [Sample("a cat", 1)], [961, 1]


def made_of(pipe, samples=SAMPLES, anchors=ANCHORS, scorer=None, **collect) -> str:
    recipe = Recipe(pipeline="x", base_model="x", sites=["a"], anchors=2, collect=COLLECT | collect, train=TRAIN)
    return fingerprint(recipe, samples, anchors, pipe, scorer)


@pytest.fixture
def own(pipe):
    """The bundled pipeline with parts that may be changed."""
    parts = {name: copy.deepcopy(part) for name, part in pipe.components.items()}
    return type(pipe)(**parts, requires_safety_checker=False)


def changed(before: str, now: str) -> list[str]:
    return [difference.split()[0] for difference in differences(before, now)]


def nudge(module: torch.nn.Module) -> None:
    next(module.parameters()).data.flatten()[0] += 1


CHANGES = {
    "unet": lambda pipe: nudge(pipe.unet),
    "text_encoder": lambda pipe: nudge(pipe.text_encoder),
    "text_encoder, by its configuration": lambda pipe: setattr(pipe.text_encoder.config, "hidden_act", "gelu"),
    "tokenizer": lambda pipe: pipe.tokenizer.add_tokens(["octarine"]),
    "scheduler.beta_end": lambda pipe: pipe.scheduler.register_to_config(beta_end=0.5),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changed_in_a_pipeline_is_named(own, what):
    before = made_of(own)
    own("a star", num_inference_steps=1, output_type="latent")  # which sets how a text is padded, and timesteps
    assert made_of(own) == before
    CHANGES[what](own)
    assert changed(before, made_of(own)) == [what.split(",")[0]]


def test_what_changed_in_a_recipe_is_named(own):
    before = made_of(own)
    assert differences(before, made_of(own, steps=4)) == ["collect.steps 3 there, 4 now"]
    assert changed(before, made_of(own, guidance_scale=2.0)) == ["collect.guidance_scale"]
    assert changed(before, made_of(own, [Sample("a cat", 2)])) == ["prompts"]
    assert changed(before, made_of(own, anchors=[961, 481])) == ["anchors"]
    assert changed(json.dumps({"trajectories": before}), json.dumps({"trajectories": made_of(own, steps=4)})) == [
        "trajectories.collect.steps"
    ]


def test_decoding_counts_where_pictures_are_read(own, scorer):
    before, read = made_of(own), made_of(own, scorer=scorer)
    assert "scorer" in changed(before, read) and "vae" in changed(before, read)
    nudge(own.vae)
    assert made_of(own) == before and changed(read, made_of(own, scorer=scorer)) == ["vae"]


def test_fingerprints_of_earlier_versions(own):
    for text in (None, "", '{"pipeline": "x"}{"anchors": [1]}'):
        assert differences(text, made_of(own)) is None
