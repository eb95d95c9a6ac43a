"""A low-rank linear map that a label may have instead of latents: its change depends linearly on the activation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .base import Directions, Step, TokenGrid, interpolate, places

_FREQUENCIES = 4  # of the waves along each axis: 0 to 3 half periods across the picture
PLACES = _FREQUENCIES**2 - 1


def waves(size: TokenGrid | tuple[int, int]) -> torch.Tensor:
    """The position of each token of a grid as products of cosines, `(N, PLACES)`. These are smooth, so a map can be
    used on grids of other sizes."""
    rows, columns = ((math.pi * at[:, None] * torch.arange(_FREQUENCIES)).cos() for at in places(size).T)
    return (rows[:, :, None] * columns[:, None]).flatten(1)[:, 1:]  # without the constant one


class LinearMap:
    """
    Moves an activation h by Σ_i (reader_i · h + offset_i) direction_i, a low-rank intervention (ReFT: Wu et al. 2024,
    2404.03592; affine steering: Singh et al. 2024, 2402.09631). Readers, offsets and directions are interpolated
    between the anchors. Unlike the activation of a latent, the factor of a direction may be negative. It may also
    depend on the position of the token in the picture.

    Args:
        rows (`torch.Tensor`): `(r, G, 2 d + 1)`: for each of r dimensions and each anchor the reader, the offset and
            the direction; or `(r, G, 2 d + 1 + PLACES)`, with a reader of `waves` between offset and direction.
    """

    def __init__(self, rows: torch.Tensor):
        places = 0 if rows.shape[2] % 2 else PLACES  # 2 d + 1 and PLACES are both odd
        width = (rows.shape[2] - places) // 2
        self.sizes = [width, 1, places]  # of what is read: the activation, 1, the position
        self.read, directions = rows.split([width + 1 + places, width], 2)
        self.directions = Directions(directions)
        self._waves: dict[TokenGrid | tuple[int, int], torch.Tensor] = {}

    @staticmethod
    def shapes(anchors: int, width: int) -> list[tuple[int, int]]:
        """The shapes that each of the r entries of `rows` may have."""
        return [(anchors, 2 * width + 1 + places) for places in (0, PLACES)]

    @staticmethod
    def rows(
        readers: torch.Tensor, offsets: torch.Tensor, directions: torch.Tensor, places: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The `rows` of a map with these readers `(r, G, d)`, offsets `(r, G)`, directions `(r, d)` and, if it depends
        on the position, readers of it `(r, G, PLACES)`."""
        parts = [readers, offsets[..., None], *(() if places is None else (places,))]
        return torch.cat([*parts, directions[:, None].expand_as(readers)], -1)

    def with_directions(self, directions: torch.Tensor) -> torch.Tensor:
        """The `rows` of a map with the same readers and offsets, and these directions `(r, d)`."""
        return torch.cat([self.read, directions[:, None].expand(-1, self.read.shape[1], -1)], -1)

    def amounts(self, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        """
        The factor of each direction `(B, N, r)`, for tokens `(B, N, d)` at a step.

        Raises:
            `ValueError`: the map depends on the position of tokens, and the step has no token grid.
        """
        readers, offsets, of_place = interpolate(self.read, step.coordinate, dim=1).split(self.sizes, 1)
        amounts = F.linear(tokens.float(), readers, offsets[:, 0])
        if not of_place.shape[1]:
            return amounts
        if step.size is None:
            raise ValueError(
                f"A label's map reads where in the picture a token is, and these {tokens.shape[1]} lie on no grid."
            )
        if step.size not in self._waves:
            self._waves[step.size] = waves(step.size).to(of_place)
        return amounts + self._waves[step.size] @ of_place.T

    def __call__(self, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        """The change of tokens `(B, N, d)` at a step."""
        return self.amounts(tokens, step) @ self.directions.at(step)
