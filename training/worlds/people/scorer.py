"""Train the scorer of the world of people: who is drawn, how and doing what, and is it a picture of this world at all?

    python -m training.worlds.people.scorer            # examples/people-scorer
    python -m training.worlds.people.scorer --judge    # examples/people-judge

Both are trained on the combinations that the pipeline is trained on and measured on those that are held out.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from ..scoring import Truth, new_parser, run, soften
from .scenes import FACTORS as WORLD_FACTORS
from .scenes import People, load
from .world import WORLD

FACTORS = {name: list(values) for name, values in WORLD_FACTORS.items()} | {"valid": ["no", "yes"]}
SHIFT = 3  # pixels


def targets(people: People) -> Truth:
    """Class `(batch,)` of every factor; -100 where it does not apply."""
    codes = {name: getattr(people, name) for name in WORLD_FACTORS}
    return {name: torch.where(code < 0, -100, code) for name, code in codes.items()} | {
        "valid": torch.ones_like(people.style)
    }


def flaws(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Small flaws that a generated picture may have: not quite sharp, not quite in its place."""
    n, _, height, width = images.shape
    padded = F.pad(images, (SHIFT,) * 4, value=1.0)
    x, y = torch.randint(2 * SHIFT + 1, (2, n), generator=generator, device=images.device).tolist()
    moved = [padded[i, :, y[i] : y[i] + height, x[i] : x[i] + width] for i in range(n)]
    return soften(torch.stack(moved), generator)


def main() -> None:
    parser = new_parser(__doc__, steps=800)
    parser.add_argument("--pictures", type=Path, default=Path("runs/people"), help="what `scenes` built")
    a = parser.parse_args()

    def training(seed: int) -> tuple[torch.Tensor, Truth]:
        images, people = load(a.pictures, held_out=False)
        return images.to(a.device), {name: code.to(a.device) for name, code in targets(people).items()}

    def test() -> tuple[torch.Tensor, Truth]:
        images, people = load(a.pictures, held_out=True)
        return images.to(a.device) / 255, {name: code.to(a.device) for name, code in targets(people).items()}

    run(WORLD, a, FACTORS, training, test, flaws)


if __name__ == "__main__":
    main()
