"""The small worlds that come with the package: what of theirs a command uses when it is told nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class World:
    """
    A pipeline whose pictures have known factors, its dictionary, and what reads the factors back.

    Args:
        pipeline, dictionary, scorer, prompts (`str`): names of what is bundled.
        scenes (`Mapping[str, list[tuple[str, str]]]`): for each factor, prompts that say everything but it, each with
            the same that names a value of it, `{}`.
        sentence (`str`): a prompt that names a value of each of these factors.
        usual (`Mapping[str, str]`): values to name where a dictionary has no label.
    """

    pipeline: str
    dictionary: str
    scorer: str
    prompts: str
    scenes: Mapping[str, list[tuple[str, str]]]
    sentence: str
    usual: Mapping[str, str]


WORLDS = {
    "shapes": World(
        pipeline="shapes-sd",
        dictionary="shapes-rtsae",
        scorer="shapes-scorer",
        prompts="shapes-prompts.txt",
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
    ),
    "people": World(
        pipeline="people-dit",
        dictionary="people-rtsae",
        scorer="people-scorer",
        prompts="people-prompts.txt",
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
    ),
}
