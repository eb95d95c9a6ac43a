"""What an edit may do to latents: one entry each. Everything that must know operations asks this table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Latents:
    """
    What an operation is computed from, for the latents that are edited (c columns) and those of its source.

    Args:
        strength (`torch.Tensor`): s, `(B, 1, c)`.
        full (`torch.Tensor`): s u, with u the typical activation times the weight, `(B, 1, c)`.
        weights, mean (`torch.Tensor`): of each column, and its mean over the training data, `(c,)`.
        now (`torch.Tensor`, *optional*): z, the present activations, `(B, N, c)`; `None` where nothing is read.
        taken (`torch.Tensor`, *optional*): those of the source, `(B, N, sources)`.
        level (`torch.Tensor`, *optional*): of the source, 1 where it has its typical activation, `(B, N, 1)`.
        share (`torch.Tensor`, *optional*): the strength of the source's columns, `(B, 1, sources)`.
    """

    strength: torch.Tensor
    full: torch.Tensor
    weights: torch.Tensor
    mean: torch.Tensor
    now: torch.Tensor | None = None
    taken: torch.Tensor | None = None
    level: torch.Tensor | None = None
    share: torch.Tensor | None = None


@dataclass(frozen=True)
class Operation:
    """
    Args:
        change (`Callable[[Latents], torch.Tensor]`): by how much latents change before clipping, `(B, N or 1, c)`;
            with a source followed by that of its latents.
        neutral (`float`, *optional*): the strength that changes nothing; `None` if there is none.
        reads (`bool`): it depends on the present activations even where nothing is clipped.
        takes (`bool`): it needs a source.
    """

    change: Callable[[Latents], torch.Tensor]
    neutral: float | None = None
    reads: bool = True
    takes: bool = False


def _transfer(z: Latents) -> torch.Tensor:
    return torch.cat([z.level * z.full, -z.share.clamp(0, 1) * z.taken], -1)


def _replace(z: Latents) -> torch.Tensor:
    return torch.cat([(z.level > 0).to(z.now.dtype) * (z.full - z.now), -z.taken], -1)


#: Name of an operation → what it does; [`Edit`] says it in words.
OPERATIONS: dict[str, Operation] = {
    "add": Operation(lambda z: z.full, neutral=0.0, reads=False),
    "set": Operation(lambda z: z.full - z.now),
    "scale": Operation(lambda z: (z.strength - 1) * z.now, neutral=1.0),
    "clamp": Operation(lambda z: z.now.minimum(z.full) - z.now),
    "ablate": Operation(lambda z: -z.strength * z.weights * z.now, neutral=0.0),
    "ablate_to_mean": Operation(lambda z: z.strength * (z.mean - z.now), neutral=0.0),
    "transfer": Operation(_transfer, neutral=0.0, takes=True),
    "replace": Operation(_replace, takes=True),
}
