"""The bundled worlds: files by name, pipelines that need a prompt alone, words, and pairs of prompts."""

import copy
import inspect
import pickle
import re
from pathlib import Path

import pytest
import torch

import diffusers_rtsae
from diffusers_rtsae.analysis.scorer import FactorScorer
from diffusers_rtsae.pairs import by_word, judgement, labels_between, left_open, more_pairs, prompts_to_show, unnamed
from diffusers_rtsae.worlds import WORLDS


@pytest.mark.parametrize("name", WORLDS)
def test_a_bundled_pipeline_draws_from_a_prompt_alone(name, tmp_path):
    world = WORLDS[name]
    pipe = diffusers_rtsae.load_bundled(world.pipeline)
    pipe.set_progress_bar_config(disable=True)
    defaults = {k: p.default for k, p in inspect.signature(pipe.__call__).parameters.items()}
    assert world.call.items() <= defaults.items()
    prompt = world.sentence.format(**world.usual)
    call = dict(world.call) | {"num_inference_steps": 2}
    kind = type(pipe).__mro__[1]  # diffusers' own class of this name
    assert kind.__module__.startswith("diffusers.") and kind.__name__ == type(pipe).__name__
    few = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    image = pipe(prompt, **few).images
    few["generator"] = torch.Generator().manual_seed(0)
    same = kind.from_pretrained(diffusers_rtsae.bundled(world.pipeline))(prompt, **call | few).images
    assert torch.equal(image, same)
    assert type(pickle.loads(pickle.dumps(pipe))) is type(copy.deepcopy(pipe)) is type(pipe)


def test_every_public_name_is_listed():
    assert set(diffusers_rtsae.__all__) <= set(dir(diffusers_rtsae))
    with pytest.raises(ValueError, match="No pipeline called 'shapes' comes with the package: .*'shapes-sd'"):
        diffusers_rtsae.load_bundled("shapes")


def test_what_a_world_does_not_know_is_said():
    shapes, people = WORLDS["shapes"], WORLDS["people"]
    assert shapes.remarks("a red star on a yellow background") == [
        "'yellow' is no background here: expected one of white, black, gray, brown, navy."
    ]
    assert shapes.remarks("stars on white") == ["This model was not trained on 'stars' (did you mean star?)."]
    assert people.remarks("a woman with green skin") and people.remarks("a man drawn by disney")
    for world in WORLDS.values():
        prompts = diffusers_rtsae.bundled(world.prompts).read_text().splitlines()
        assert not [prompt for prompt in prompts if world.remarks(prompt)]
        assert {word for prompt in prompts for word in prompt.replace(",", "").split()} <= set(world.words)


def test_more_pairs_bring_in_the_same():
    for world, pair, value in (
        ("shapes", ("a blue star", "a red star"), "red"), ("people", ("a woman cook", "a woman running"), "running"),
    ):  # fmt: skip
        made = more_pairs([pair], WORLDS[world], 8)
        assert len(set(made)) == 8 and pair not in made
        assert all(value in after and value not in before for before, after in made)
        assert not [prompt for pair in made for prompt in pair if WORLDS[world].remarks(prompt)]
    assert more_pairs([("a star", "a tiny star")], WORLDS["shapes"], 8) == []
    dogs = [("a blue dog on grass", "a tiny dog on grass"), ("an orange cat", "a tiny cat")]
    assert more_pairs(dogs, None, 8) == [  # the words of the given pairs, combined
        ("an orange dog on grass", "a tiny dog on grass"), ("a dog on grass", "a tiny dog on grass"),
        ("a blue cat", "a tiny cat"), ("a cat", "a tiny cat"),
    ]  # fmt: skip
    assert left_open("an orange star on white", "a red star on white") == "a star on white"
    assert left_open("a star, on a white", "a star, on a black") == "a star"
    assert prompts_to_show([("a cat", "a tiny cat"), *dogs]) == ["a dog on grass", "a blue dog on grass"]
    assert prompts_to_show([("a cat", "a tiny cat")]) == ["a cat"]


def test_what_a_fit_did_is_told_with_what_it_was_judged_by():
    assert judgement({"effect": 0.8}, 2, {})[1].startswith("Judged on the 2 pairs it was made from, with other noise")
    styles, effects = ("noto", "fluent"), (0.9, 0.8, 0.4, 0.2)
    pairs = [(f"a {who} in {style} style", f"a running {who} in {style} style")
             for style in styles for who in ("man", "woman")]  # fmt: skip
    each = dict(zip(pairs, effects, strict=True))
    means = {"noto": 0.85, "fluent": 0.3, "man": 0.65, "woman": 0.5}
    assert by_word(each) == pytest.approx(means)
    assert judgement({"effect": 0.575, "lowest": 0.1}, 16, each) == (
        [("Effect", "0.57", "of what changing the prompt does; 1 is all of it"),
         ("Lowest effect", "0.10", "on “a woman in fluent style”"),
         ("Harm", "–", "not measured: no prompts that were to stay"),
         ("By other words", "0.30 to 0.85", "the mean: least with “fluent”, most with “noto”")],
        "Judged on the 4 of 16 pairs of prompts that it was not made from.",
    )  # fmt: skip


def test_labels_for_what_prompts_differ_in():
    labels = ("red", "striped", "dark", "medium-dark")
    assert labels_between(labels, ["a star"], ["a striped star"]) == ["striped"]
    assert labels_between(labels, ["a man"], ["a man with medium-dark skin"]) == ["medium-dark"]


def printed() -> list[tuple[str, str]]:
    """The prompts that the pages have bundled pipelines draw, and those that the app opens with."""
    root = Path(__file__).parents[1]
    text = "".join((root / page).read_text() for page in ("README.md", "diffusers_rtsae/README.md"))
    called = re.findall(r'pipe\((?:\[)?((?:"[^"]+"(?:, )?)+)', text) + re.findall(r'rtsae steer ("[^"]+")', text)
    prompts = {prompt for group in called for prompt in re.findall(r'"([^"]+)"', group)} - {"a photo of a car"}
    shown = [(name, scenes[0][0]) for name, w in WORLDS.items() for scenes in [*w.scenes.values()][:3]]
    return [*(("shapes", prompt) for prompt in sorted(prompts)), ("people", "a woman firefighter"), *shown]


@pytest.mark.slow
@pytest.mark.parametrize("name, prompt", printed())
def test_the_prompts_of_the_pages_are_drawn_well(name, prompt):
    world = WORLDS[name]
    pipe = diffusers_rtsae.load_bundled(world.pipeline)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(50)]
    images = pipe([prompt] * 50, generator=generators, output_type="pt").images.clamp(0, 1)
    readings = FactorScorer.from_pretrained(diffusers_rtsae.bundled(world.scorer)).read(images)
    assert sum(reading["valid"] == "yes" for reading in readings) >= 49


def test_what_no_prompt_names_is_named():
    labels = {"dusk": {"factor": "background", "value": "navy"}, "red": {"factor": "colour"}, "mine": {}}
    made = unnamed(labels, ["a red star"], WORLDS["shapes"])
    assert made == ["a large red star in the centre, flat, on a navy background",
                    "a small cyan heart on the right, dotted, on navy"]  # fmt: skip
