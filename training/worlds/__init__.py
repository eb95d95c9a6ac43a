"""Worlds: small text-to-image pipelines whose pictures have known factors that can be read back.

A world is a folder here with a `world.py` that defines `WORLD`. Experiments use a world only through the interface of
`World`, so that another world is another folder and not another set of scripts.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

Scene = dict[str, str]  # a picture of one object: the value of each factor
KINDS = ("open", "contradicted")  # a prompt leaves the steered factor open, or names another value of it


@dataclass
class Probe:
    """Prompts for steering to one value of one factor. They name all other factors."""

    factor: str
    value: str
    scenes: list[Scene]  # what the prompts describe
    prompts: list[str]
    prompted: list[str]  # the prompts edited to name the target: the upper bound of steering
    seeds: list[int]
    mask: torch.Tensor  # where to steer, (prompts, size, size): everywhere for global factors, else on the object


class World(ABC):
    """The interface of a world: its factors, its prompts, and the paths of its models."""

    name: str
    factors: dict[str, tuple[str, ...]]  # the values of each
    local: tuple[str, ...]  # factors of an object; the others are of the whole picture
    targets: tuple[tuple[str, str], ...]  # (factor, value) that can be steered to; all values of a factor, or some
    domains: tuple[str, str]  # the two factors whose values are unlearned
    image_size: int  # height and width of a picture in pixels

    pipeline: Path
    scorer: Path  # reads factors back from pictures; used for all choices
    judge: Path  # a scorer of another architecture and training, only for final tables
    dictionary: Path
    steps: int  # of denoising, as a user would choose
    guidance: float

    @abstractmethod
    def prompts(self, count: int, seed: int, held_out: bool = False) -> list[str]:
        """Captions as in training, with factors left out at random, of combinations that are (not) trained on."""

    @abstractmethod
    def sample(self, count: int, seed: int, held_out: bool) -> list[Scene]:
        """Scenes of one object each, of combinations that are (not) trained on."""

    @abstractmethod
    def describe(self, scenes: list[Scene], seed: int, leave_open: Collection[str] = ()) -> list[str]:
        """Prompts that name all factors of each scene but those that are left open."""

    @abstractmethod
    def masks(self, scenes: list[Scene], size: int) -> torch.Tensor:
        """`(scenes, size, size)` float, 1 where the object of each scene is."""

    @abstractmethod
    def objects(self, reading: dict[str, str | None]) -> list[Scene]:
        """The objects in a scorer's reading of a picture, each with its `local` factors."""

    def is_empty(self, image: torch.Tensor, scene: Scene, full: torch.Tensor) -> bool:
        """Whether a picture `(3, height, width)` shows nothing but the background of `full`, a picture of a scene:
        at most 1 % of the pixels have a colour that is not to be seen there outside the object. Scorers know no empty
        pictures."""
        outside = F.max_pool2d(self.masks([scene], self.image_size), 7, 1, 3)[0] == 0
        unlike = torch.cdist(image.flatten(1).T, full[:, outside].T).amin(1) > 0.2  # a fifth of a channel's range
        return float(unlike.float().mean()) <= 0.01

    def read_as(self, factor: str, scene: Scene) -> str:
        """The name that a scorer has for a factor of the object of a scene."""
        return factor

    def two(self, count: int, seed: int) -> tuple[list[tuple[Scene, Scene]], list[str]]:
        """Pictures of two objects, of combinations that are never trained on: the objects, and prompts that name all
        factors of both. None in a world whose pictures have one."""
        return [], []

    def plainly(self, scene: Scene) -> str:
        """A prompt that says all factors of a scene, always in the same words."""
        return self.describe([scene], 0)[0]

    def rewordings(self, scene: Scene, factor: str) -> list[tuple[str, str]]:
        """Prompts that say a scene in words that the tokenizer sees otherwise, above all the value of `factor`, each
        with the kind of rewording. None in a world without any."""
        return []

    @property
    def steered(self) -> list[str]:
        """The factors of which values can be steered to."""
        return list(dict.fromkeys(factor for factor, _ in self.targets))

    @property
    def many_valued(self) -> list[tuple[str, str]]:
        """The targets of factors with more than two values: one of two is soon right by chance."""
        return [(factor, value) for factor, value in self.targets if len(self.factors[factor]) > 2]

    def seen(self, reading: dict[str, str | None]) -> dict[str, str | bool | None]:
        """All factors in a scorer's reading of a picture. Those of an object are `None` unless there is exactly one.
        `valid` (bool): it is a picture of this world, with one object."""
        objects = self.objects(reading)
        one = objects[0] if len(objects) == 1 else {}
        seen = {name: one.get(name) if name in self.local else reading[name] for name in self.factors}
        return seen | {"valid": reading["valid"] == "yes" and len(objects) == 1}

    def probe(self, factor: str, value: str, kind: str, count: int, seed: int) -> Probe:
        """
        `count` prompts of held-out scenes with another value than `value`, of one of the `KINDS`.

        Raises:
            `ValueError`: if too few of the scenes that are sampled have another value.
        """
        index = self.targets.index((factor, value))
        scenes = self.sample(count * 4, seed=9000 + 97 * index + seed, held_out=True)
        scenes = [scene for scene in scenes if scene[factor] != value][:count]
        if len(scenes) < count:
            raise ValueError(
                f"Expected {count} of {4 * count} scenes with another {factor} than {value}; ask for more."
            )
        return Probe(
            factor,
            value,
            scenes,
            prompts=self.describe(scenes, index + seed, leave_open=(factor,) if kind == "open" else ()),
            prompted=self.describe([scene | {factor: value} for scene in scenes], len(scenes)),
            seeds=[100_000 * (1 + seed) + 1000 * index + i for i in range(len(scenes))],
            mask=self.masks(scenes, self.image_size)
            if factor in self.local
            else torch.ones(len(scenes), self.image_size, self.image_size),
        )


def worlds() -> list[str]:
    """Names of the worlds that exist."""
    return sorted(path.parent.name for folder in __path__ for path in Path(folder).glob("*/world.py"))


def load_world(name: str) -> World:
    """The world `name`; raises `ValueError` with those that exist if there is none."""
    if name not in worlds():
        raise ValueError(f"There is no world {name!r}; there are {worlds()}.")
    return importlib.import_module(f".{name}.world", __name__).WORLD
