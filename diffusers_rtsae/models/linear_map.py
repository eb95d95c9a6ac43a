"""A linear map of a label's own: a change of the activation that depends on what is there, in few dimensions."""

from __future__ import annotations

import torch

from .base import Directions, Step, interpolate


class LinearMap:
    """
    Moves an activation h by Σ_i (reader_i · h + offset_i) direction_i, each interpolated between the anchors: what a
    low-rank intervention does (ReFT: Wu et al. 2024, 2404.03592; affine steering: Singh et al. 2024, 2402.09631).
    Unlike latents it reads below zero, and in any direction.

    Args:
        rows (`torch.Tensor`): `(r, G, 2 d + 1)`, at each anchor reader, offset and direction of each of r dimensions.
    """

    def __init__(self, rows: torch.Tensor):
        width = rows.shape[2] // 2
        self.readers, self.offsets = rows[..., :width], rows[..., width]
        self.directions = Directions(rows[..., width + 1 :])

    @staticmethod
    def rows(readers: torch.Tensor, offsets: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        """What is stored, of readers `(r, G, d)`, offsets `(r, G)` and directions `(r, d)`."""
        return torch.cat([readers, offsets[..., None], directions[:, None].expand_as(readers)], -1)

    def amounts(self, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        """How far tokens `(B, N, d)` are to move along each direction at a step, `(B, N, r)`."""
        readers, offsets = (interpolate(values, step.coordinate, dim=1) for values in (self.readers, self.offsets))
        return tokens.float() @ readers.T + offsets

    def __call__(self, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        """The change of tokens `(B, N, d)` at a step."""
        return self.amounts(tokens, step) @ self.directions.at(step)
