"""The two small worlds that come with the package: where their files are, how their pipelines are called, and which
words they know. Needs no torch until a pipeline is loaded."""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_PACKAGE = Path(__file__).resolve().parent
#: holds `examples` and `training`: inside an installed package, or around it in a clone
ROOT = _PACKAGE / "bundled" if (_PACKAGE / "bundled").is_dir() else _PACKAGE.parent


def bundled(name: str) -> Path:
    """
    The folder or file of this name that comes with the package.

    Args:
        name (`str`): `"shapes-sd"` and `"people-dit"` are pipelines, `"shapes-rtsae"` and `"people-rtsae"` their
            dictionaries, `"shapes-scorer"` and `"people-scorer"` read the factors back from their pictures.

    Returns:
        `Path`: what `from_pretrained` and `load_rtsae` take, wherever the package is installed.

    Raises:
        `ValueError`: nothing of this name is bundled; the message lists what is.

    Example:
        ```py
        >>> pipe.load_rtsae(diffusers_rtsae.bundled("shapes-rtsae"))
        ```
    """
    folder = ROOT / "examples"
    exists = sorted(path.name for path in folder.glob("*-*") if path.is_dir() or path.suffix == ".txt")
    if name not in exists:
        raise ValueError(f"Nothing called {name!r} comes with the package: expected one of {exists}.")
    return folder / name


def load_bundled(name: str, **kwargs) -> DiffusionPipeline:
    """
    A bundled pipeline that draws well when it is called with a prompt alone.

    It is the class that its folder names, with other defaults of its call: the guidance and the number of steps of its
    world, and for people that PixArt must not look for the size of a published model, at which diffusers raises
    "Invalid sample size" otherwise. Whatever is passed to the call has its effect as ever.

    Args:
        name (`str`): `"shapes-sd"` or `"people-dit"`.
        kwargs: passed to `from_pretrained`, like `dtype`.

    Raises:
        `ValueError`: no pipeline of this name is bundled; the message lists those that are.

    Example:
        ```py
        >>> pipe = diffusers_rtsae.load_bundled("people-dit")
        >>> image = pipe("a woman firefighter").images[0]
        ```
    """
    worlds = {world.pipeline: world for world in WORLDS.values()}
    if name not in worlds:
        raise ValueError(f"No pipeline called {name!r} comes with the package: expected one of {list(worlds)}.")
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # diffusers imports what tells of torchvision, which no bundled pipeline needs
    try:
        from . import bundled_pipelines
    finally:
        logging.set_verbosity(verbosity)
    return bundled_pipelines.CLASSES[name].from_pretrained(bundled(name), **kwargs)


@dataclass(frozen=True)
class World:
    """
    A pipeline whose pictures have known factors, its dictionary, and what reads the factors back.

    Args:
        pipeline, dictionary, scorer, prompts (`str`): names of what is bundled.
        call (`Mapping`): what its pipeline is to be called with, besides the prompt.
        scenes (`Mapping[str, list[tuple[str, str]]]`): for each factor, prompts that say everything but it, each with
            the same that names a value of it, `{}`.
        sentence (`str`): a prompt that names a value of each of these factors.
        usual (`Mapping[str, str]`): values to name where a dictionary has no label.
        phrases (`Mapping[str, str]`): for some factors, a regular expression of the phrases that name its value, which
            is what its groups match.
    """

    pipeline: str
    dictionary: str
    scorer: str
    prompts: str
    call: Mapping[str, float | int | bool]
    scenes: Mapping[str, list[tuple[str, str]]]
    sentence: str
    usual: Mapping[str, str]
    phrases: Mapping[str, str]

    @property
    def values(self) -> dict[str, list[str]]:
        """The values of each factor, as its scorer reads them."""
        return _values(bundled(self.scorer))

    @property
    def words(self) -> list[str]:
        """The words that its pictures were described with, sorted."""
        return _words(bundled(self.prompts), bundled(self.scorer))

    def remarks(self, prompt: str) -> list[str]:
        """What of a prompt this world does not know, a sentence each; empty if it knows all of it."""
        text, found, remarks = prompt.lower(), set(), []
        for factor, phrase in self.phrases.items():
            for match in re.finditer(phrase, text):
                value = next(group for group in match.groups() if group)
                if value not in self.values[factor]:
                    found.add(value)
                    remarks.append(f"{value!r} is no {factor} here: expected one of {', '.join(self.values[factor])}.")
        known = _tokens(bundled(self.pipeline))
        unknown = dict.fromkeys(w for w in re.findall(r"[\w-]+", text) if w not in known and w not in found)
        if unknown:
            near = [n for word in unknown for n in difflib.get_close_matches(word, self.words, n=1, cutoff=0.75)]
            meant = f" (did you mean {', '.join(near)}?)" if near else ""
            remarks.append(f"This model was not trained on {', '.join(map(repr, unknown))}{meant}.")
        return remarks


@functools.cache
def _values(scorer: Path) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for name, own in json.loads((scorer / "config.json").read_text(encoding="utf-8"))["factors"].items():
        factor = name.rpartition(".")[2]  # of an object, that of its place stands before the point
        values[factor] = [*dict.fromkeys([*values.get(factor, []), *own])]
    return values


@functools.cache
def _words(prompts: Path, scorer: Path) -> list[str]:
    texts = [prompts.read_text(encoding="utf-8")]
    texts += [value for factor, own in _values(scorer).items() if factor != "valid" for value in own]
    return sorted({*re.findall(r"[\w-]+", " ".join(texts))} - {"none"})


@functools.cache
def _tokens(pipeline: Path) -> set[str]:
    """The words that a bundled tokenizer has whole, which are those that its model was trained on."""
    model = json.loads((pipeline / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    if model["type"] == "Unigram":
        return {token[1:] for token, _ in model["vocab"] if token.startswith("\u2581")}
    return {token.removesuffix("</w>") for token in model["vocab"] if token.endswith("</w>")}


WORLDS = {
    "shapes": World(
        pipeline="shapes-sd",
        dictionary="shapes-rtsae",
        scorer="shapes-scorer",
        prompts="shapes-prompts.txt",
        call={"num_inference_steps": 25, "guidance_scale": 3.0},
        scenes={
            "colour": [
                (
                    "a large heart on the left, flat, on a gray background",
                    "a large {} heart on the left, flat, on a gray background",
                ),
                ("a small star at the top, striped, on white", "a small {} star at the top, striped, on white"),
            ],
            "shape": [
                (
                    "a large blue object in the centre, flat, on a white background",
                    "a large blue {} in the centre, flat, on a white background",
                ),
                ("a large pink thing on the right, dotted, on navy", "a large pink {} on the right, dotted, on navy"),
            ],
            "background": [
                ("a large red star in the centre, flat", "a large red star in the centre, flat, on a {} background"),
                ("a small cyan heart on the right, dotted", "a small cyan heart on the right, dotted, on {}"),
            ],
            "style": [
                (
                    "a large green circle in the centre, on a white background",
                    "a large green circle in the centre, {}, on a white background",
                ),
                ("a large orange star at the bottom, on black", "a large orange star at the bottom, {}, on black"),
            ],
        },
        sentence="a large {colour} {shape} on the left, {style}, on a {background} background",
        usual={"colour": "red", "shape": "star", "style": "flat", "background": "white"},
        phrases={"background": r"\b(?:on|against)(?: an?)? (?!the\b|an?\b)([\w-]+)"},
    ),
    "people": World(
        pipeline="people-dit",
        dictionary="people-rtsae",
        scorer="people-scorer",
        prompts="people-prompts.txt",
        call={
            "num_inference_steps": 20,
            "guidance_scale": 3.0,
            "use_resolution_binning": False,
            "clean_caption": False,
        },
        scenes={
            "style": [
                ("a woman firefighter with medium skin", "a woman firefighter with medium skin in {} style"),
                ("a man teacher with dark skin tone", "a man teacher with dark skin tone drawn by {}"),
            ],
            "tone": [
                ("a woman judge in noto style", "a woman judge with {} skin in noto style"),
                ("a man cook, drawn by fluent", "a man cook, with {} skin tone, drawn by fluent"),
            ],
            "who": [
                (
                    "a police officer with light skin in twemoji style",
                    "a {} police officer with light skin in twemoji style",
                ),
                ("an astronaut with dark skin in fluent style", "a {} astronaut with dark skin in fluent style"),
            ],
            "role": [
                ("a woman with medium skin in noto style", "a woman {} with medium skin in noto style"),
                ("a man with light skin tone, drawn by fluent", "a man {} with light skin tone, drawn by fluent"),
            ],
        },
        sentence="a {who} {role} with {tone} skin in {style} style",
        usual={"who": "woman", "role": "firefighter", "tone": "medium", "style": "noto"},
        phrases={
            "tone": r"\bwith ([\w-]+) skin\b",
            "style": r"\bin (?!the\b)([\w-]+) style\b|\bdrawn by ([\w-]+)|\bin the style of ([\w-]+)",
        },
    ),
}
