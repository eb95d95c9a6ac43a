"""What the world of people offers to experiments."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from .. import Scene, World
from .captions import captions
from .rewordings import plain, rewordings
from .scenes import FACTORS, IMAGE_SIZE, TONELESS, WHO_OF, People, combinations, is_held_out

_ROLES = ("astronaut", "cook", "firefighter", "guard", "judge", "mage", "police officer", "superhero", "supervillain",
          "surfing", "teacher", "vampire")  # fmt: skip


class Persons(World):
    """Emoji of one person each by three foundries, drawn by a PixArt transformer."""

    name = "people"
    factors = FACTORS
    local = ()  # a person fills the picture
    targets = tuple((factor, value) for factor in ("style", "tone", "who") for value in FACTORS[factor]) + tuple(
        ("role", role) for role in _ROLES
    )
    domains = ("style", "role")
    image_size = IMAGE_SIZE

    pipeline = Path("examples/people-dit")
    scorer = Path("examples/people-scorer")
    judge = Path("examples/people-judge")
    dictionary = Path("examples/people-rtsae")
    steps = 20
    guidance = 3.0

    def prompts(self, count: int, seed: int, held_out: bool = False) -> list[str]:
        everyone = combinations()
        return captions(_draw(everyone[is_held_out(everyone) == held_out], count, seed), seed)

    def sample(self, count: int, seed: int, held_out: bool) -> list[Scene]:
        """People whose every factor may have any value, so that each can be changed alone."""
        everyone = combinations()
        fixed = torch.tensor([FACTORS["role"].index(role) for role in {*WHO_OF, *TONELESS}])
        drawn = _draw(everyone[(is_held_out(everyone) == held_out) & ~torch.isin(everyone.role, fixed)], count, seed)
        return [drawn.values(i) for i in range(count)]

    def describe(self, scenes: list[Scene], seed: int, leave_open: Collection[str] = ()) -> list[str]:
        codes = [[FACTORS[name].index(scene[name]) for scene in scenes] for name in FACTORS]
        return captions(People(*torch.tensor(codes)), seed, {name: float(name not in leave_open) for name in FACTORS})

    def plainly(self, scene: Scene) -> str:
        return plain(scene)

    def rewordings(self, scene: Scene, factor: str) -> list[tuple[str, str]]:
        return rewordings(scene, factor)

    def masks(self, scenes: list[Scene], size: int) -> torch.Tensor:
        return torch.ones(len(scenes), size, size)

    def objects(self, reading: dict[str, str | None]) -> list[Scene]:
        return [{}]


def _draw(people: People, count: int, seed: int) -> People:
    """`count` of them in random order, again and again if there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(people), generator=generator) for _ in range(-(-count // len(people)))]
    return people[torch.cat(orders)[:count]]


WORLD = Persons()
