"""A linear map of a label's own: a change of the activation that depends on what is there, in few dimensions."""

from __future__ import annotations

import math

import torch

from .base import Directions, Step, TokenGrid, interpolate, places

_FREQUENCIES = 4  # of the waves in each direction, from none to three half ones across the picture
PLACES = _FREQUENCIES**2 - 1


def waves(size: TokenGrid | tuple[int, int]) -> torch.Tensor:
    """The place of each token of a grid as products of cosines, `(N, PLACES)`: smooth, so that a map may be used on a
    grid of another size."""
    rows, columns = ((math.pi * at[:, None] * torch.arange(_FREQUENCIES)).cos() for at in places(size).T)
    return (rows[:, :, None] * columns[:, None]).flatten(1)[:, 1:]  # the first is the same everywhere


class LinearMap:
    """
    Moves an activation h by Σ_i (reader_i · h + offset_i) direction_i, each interpolated between the anchors: what a
    low-rank intervention does (ReFT: Wu et al. 2024, 2404.03592; affine steering: Singh et al. 2024, 2402.09631).
    Unlike latents it reads below zero, and in any direction. It may also read where in the picture a token is.

    Args:
        rows (`torch.Tensor`): `(r, G, 2 d + 1)`, at each anchor reader, offset and direction of each of r dimensions;
            or `(r, G, 2 d + 1 + PLACES)`, with a reader of `waves` before the direction.
    """

    def __init__(self, rows: torch.Tensor):
        told = 0 if rows.shape[2] % 2 else PLACES  # 2 d + 1 is odd, as PLACES is
        width = (rows.shape[2] - told) // 2
        self.readers, offsets, self.places, directions = rows.split([width, 1, told, width], 2)
        self.offsets, self.directions = offsets[..., 0], Directions(directions)
        self._waves: dict[TokenGrid | tuple[int, int], torch.Tensor] = {}

    @staticmethod
    def shapes(anchors: int, width: int) -> list[tuple[int, int]]:
        """What may follow the first dimension of `rows`."""
        return [(anchors, 2 * width + 1 + told) for told in (0, PLACES)]

    @staticmethod
    def rows(
        readers: torch.Tensor, offsets: torch.Tensor, directions: torch.Tensor, places: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What is stored, of readers `(r, G, d)`, offsets `(r, G)`, directions `(r, d)` and, if it reads the place,
        `(r, G, PLACES)`."""
        parts = [readers, offsets[..., None], *(() if places is None else (places,))]
        return torch.cat([*parts, directions[:, None].expand_as(readers)], -1)

    def with_directions(self, directions: torch.Tensor) -> torch.Tensor:
        """Rows of a map that reads the same and moves along others, `(r, d)`."""
        return self.rows(self.readers, self.offsets, directions, self.places)

    def amounts(self, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        """
        How far tokens `(B, N, d)` are to move along each direction at a step, `(B, N, r)`.

        Raises:
            `ValueError`: it reads the place of tokens, and these lie on no grid.
        """
        read = (self.readers, self.offsets, self.places)
        readers, offsets, of_place = (interpolate(values, step.coordinate, dim=1) for values in read)
        amounts = tokens.float() @ readers.T + offsets
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
