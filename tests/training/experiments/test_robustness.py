"""What is said in other words, what an adversary does, and what counts as no longer shown."""

from argparse import Namespace

import pytest
import torch

from training.experiments import robustness
from training.experiments.robustness import TEXT, WAYS, Drawing, concepts_of, counted, markdown, text_dictionary
from training.worlds import load_world
from training.worlds.people.rewordings import KINDS
from training.worlds.pictures import load_pipeline

WORLD = load_world("people")


@pytest.fixture(scope="module")
def people():
    from diffusers_rtsae import load_dictionary

    pipe, dictionary = load_pipeline(WORLD.pipeline, "cpu"), load_dictionary(WORLD.dictionary, dtype=torch.float32)
    pipe.load_rtsae(dictionary)
    names = {(label["factor"], label["value"]): name for name, label in dictionary.labels.items()}
    return pipe, concepts_of(WORLD, names, seed=0)


def test_the_tokenizer_sees_every_rewording_as_other_tokens(people):
    pipe, concepts = people
    assert len(concepts) == 15
    for one in concepts:
        said = WORLD.rewordings(one.scene, one.factor)
        prompts = [WORLD.plainly(one.scene), *(prompt for _, prompt in said)]
        tokens = pipe.tokenizer([prompt.lower() for prompt in prompts]).input_ids  # as the pipeline does
        assert len({tuple(ids) for ids in tokens}) == 11 and {kind for kind, _ in said} == set(KINDS)
        assert one.value in prompts[0] and one.value in one.negative


def test_an_adversary_comes_nearer_to_the_picture_without_the_edit(people):
    pipe, concepts = people
    concepts = [concepts[0], concepts[5]]
    a = Namespace(guidance=3.0, attack_steps=2, updates=4, rate=0.03, batch_size=8, steps=2)
    drawing, way = Drawing(pipe, a), WAYS["label at −1"]
    prompts = [WORLD.plainly(one.scene) for one in concepts]
    told = drawing.encode(prompts, way, concepts)
    with torch.no_grad():
        wanted, kept_out = (drawing.latents(told, one, concepts, 2) for one in (None, way))
        brought_back = drawing.latents(drawing.bring_back(prompts, way, concepts), way, concepts, 2)
    before, after = ((one - wanted).square().mean((1, 2, 3)) for one in (kept_out, brought_back))
    assert (before > 0.01).all() and (after < before).all()
    assert all(not parameter.grad for parameter in pipe.transformer.parameters())


def test_only_pictures_that_showed_it_count(people):
    _, concepts = people
    one = concepts[3]
    shown = [((True, True), (False, True)), ((True, True), (True, True)), ((False, True), (False, True))]
    rows = counted(0, "erased", ((one, "plain", 0, *pair) for pair in shown))
    assert rows == [
        {"factor": "role", "way": "erased", "kind": "plain", "wording": 0, "seed": 0}
        | {"n": 3, "shown": 2, "gone": 1, "valid": 1}
    ]  # fmt: skip
    text = markdown(rows + [row | {"way": "another way", "gone": 2} for row in rows])
    assert "| plain | 3 | 0.67 | 0.500 | 1.000 |" in text and "| another way | 2 | 0.50 |" in text


def test_ways_in_the_text_encoder_change_what_the_denoiser_is_told(people, monkeypatch):
    pipe, concepts = people
    concepts, drawing = [concepts[0], concepts[5]], Drawing(pipe, Namespace())
    monkeypatch.setattr(robustness, "CAPTIONS", 64)
    monkeypatch.setattr(robustness, "TRAINED", 20)
    pipe.load_rtsae(text_dictionary(pipe, WORLD), adapter_name=TEXT)
    prompts = [WORLD.plainly(one.scene) for one in concepts]
    ways = [way for way in WAYS.values() if way.in_text]
    plain, *told = (drawing.encode(prompts, way, concepts) for way in (None, *ways))
    assert len(ways) == 3
    for way, one in zip(ways, told, strict=True):
        moved = {name: (one[name] - plain[name]).abs().flatten(1).amax(1) > 1e-3 for name in plain}
        assert moved["prompt_embeds"].all() and not moved["prompt_attention_mask"].any()
        assert bool(moved["negative_prompt_embeds"].any()) == (way.options.get("apply_to") == "contrast")
