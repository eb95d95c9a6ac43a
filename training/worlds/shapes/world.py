"""What the world of shapes offers to experiments."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from .. import Scene, World
from .captions import captions
from .scenes import FACTORS, IMAGE_SIZE, OBJECT_FACTORS, PLACES, SIZES, Scenes, sample_scenes

_STEERED = ("background", "style", "colour", "shape", "size")


class Shapes(World):
    """Rendered scenes, drawn by a Stable Diffusion; for experiments of one object each."""

    name = "shapes"
    factors = FACTORS
    local = tuple(OBJECT_FACTORS)
    targets = tuple((factor, value) for factor in _STEERED for value in FACTORS[factor])
    domains = ("style", "shape")
    image_size = IMAGE_SIZE

    pipeline = Path("examples/shapes-sd")
    scorer = Path("examples/shapes-scorer")
    judge = Path("examples/shapes-judge")
    dictionary = Path("examples/shapes-rtsae")
    steps = 25
    guidance = 3.0

    def prompts(self, count: int, seed: int, held_out: bool = False) -> list[str]:
        return captions(sample_scenes(count, 40_000_000 + seed, held_out=held_out), seed)

    def sample(self, count: int, seed: int, held_out: bool) -> list[Scene]:
        scenes = sample_scenes(count, seed, held_out=held_out, objects=1)
        codes = {name: getattr(scenes, name) for name in FACTORS}
        codes = {name: (code[:, 0] if code.ndim == 2 else code).tolist() for name, code in codes.items()}
        return [{name: FACTORS[name][code[i]] for name, code in codes.items()} for i in range(count)]

    def describe(self, scenes: list[Scene], seed: int, leave_open: Collection[str] = ()) -> list[str]:
        return captions(_encode(scenes), seed, {name: float(name not in leave_open) for name in FACTORS})

    def read_as(self, factor: str, scene: Scene) -> str:
        return f"{scene['place']}.{factor}" if factor in self.local else factor

    def two(self, count: int, seed: int) -> tuple[list[tuple[Scene, Scene]], list[str]]:
        scenes = sample_scenes(count, seed, held_out=True, objects=2)
        codes = {name: getattr(scenes, name) for name in FACTORS}
        codes = {name: code if code.ndim == 2 else torch.stack([code] * 2, 1) for name, code in codes.items()}
        first, second = (
            [{name: FACTORS[name][code[i, which]] for name, code in codes.items()} for i in range(count)]
            for which in (0, 1)
        )
        return list(zip(first, second, strict=True)), captions(scenes, seed, dict.fromkeys(FACTORS, 1.0))

    def masks(self, scenes: list[Scene], size: int) -> torch.Tensor:
        """A disc over the place and size of each object."""
        centre = torch.tensor([PLACES[scene["place"]] for scene in scenes]).float().reshape(-1, 2)
        radius = 1.1 * torch.tensor([SIZES[scene["size"]] for scene in scenes])
        axis = (torch.arange(size) + 0.5) * IMAGE_SIZE / size
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        distance = ((x - centre[:, 0, None, None]) ** 2 + (y - centre[:, 1, None, None]) ** 2).sqrt()
        return (distance < radius[:, None, None]).float()

    def objects(self, reading: dict[str, str | None]) -> list[Scene]:
        return [
            {"place": place} | {name: reading[f"{place}.{name}"] for name in ("shape", "colour", "size")}
            for place in PLACES
            if reading[f"{place}.shape"] is not None
        ]


def _encode(scenes: list[Scene]) -> Scenes:
    """Scenes of one object as tensors, without jitter: what their captions are made from."""
    codes = {name: torch.tensor([FACTORS[name].index(scene[name]) for scene in scenes]) for name in FACTORS}
    codes |= {name: torch.stack([codes[name]] * 2, 1) for name in OBJECT_FACTORS}
    count = len(scenes)
    jitter = {"jitter": torch.zeros(count, 2, 7), "global_jitter": torch.zeros(count, 6)}
    return Scenes(count=torch.ones(count, dtype=torch.long), **codes, **jitter)


WORLD = Shapes()
