"""Train the scorer of the bundled world: which factors does this picture show, and is it a valid scene at all?

python -m training.worlds.shapes.scorer            # examples/shapes-scorer
python -m training.worlds.shapes.scorer --judge    # examples/shapes-judge
"""

from __future__ import annotations

import torch

from ..scoring import Truth, new_parser, run
from .scenes import COLOURS, GLOBAL_FACTORS, PLACES, SHAPES, SIZES, Scenes, render, render_pictures, sample_scenes
from .world import WORLD

SLOT_FACTORS = {"shape": ("none", *SHAPES), "colour": tuple(COLOURS), "size": tuple(SIZES)}
FACTORS = {f"{place}.{name}": list(values) for place in PLACES for name, values in SLOT_FACTORS.items()}
FACTORS |= {name: list(values) for name, values in GLOBAL_FACTORS.items()} | {"valid": ["no", "yes"]}


def targets(scenes: Scenes) -> Truth:
    """Class `(batch,)` of every factor; -100 where it does not apply (colour and size of an empty slot)."""
    n, device = len(scenes), scenes.count.device
    result = {
        "style": scenes.style,
        "background": scenes.background,
        "valid": torch.ones(n, dtype=torch.long, device=device),
    }
    for p, place in enumerate(PLACES):
        here = scenes.place == p
        here[:, 1] &= scenes.count == 2
        filled, which = here.any(1), here.long().argmax(1, keepdim=True)
        for name in SLOT_FACTORS:
            value = getattr(scenes, name).gather(1, which)[:, 0]
            if name == "shape":
                result[f"{place}.shape"] = torch.where(filled, value + 1, 0)
            else:
                result[f"{place}.{name}"] = torch.where(filled, value, -100)
    return result


def held_out_renders(count: int = 2000, seed: int = 999, device: str = "cpu") -> tuple[torch.Tensor, Truth]:
    """Renders that no scorer was trained on, float in [0, 1], and their truth."""
    scenes = sample_scenes(count, seed).to(device)
    return render(scenes), targets(scenes)


def main() -> None:
    a = new_parser(__doc__, steps=4000).parse_args()

    def training(seed: int) -> tuple[torch.Tensor, Truth]:
        pictures, _, scenes = render_pictures(40_000, seed=10_000 + seed, device=a.device)
        return pictures, targets(scenes)

    run(WORLD, a, FACTORS, training, lambda: held_out_renders(device=a.device))


if __name__ == "__main__":
    main()
