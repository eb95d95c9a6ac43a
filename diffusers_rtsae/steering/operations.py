"""The operations of edits on latents: one entry of a table each. All code that depends on the operation asks it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Latents:
    """
    The inputs of an operation: one column for each of the c edited latents, and one for each latent of the source.

    Args:
        strength (`torch.Tensor`): strengths s, `(B, 1, c)`.
        full (`torch.Tensor`): s u, with u the typical activation of the latent times its weight, `(B, 1, c)`.
        weights (`torch.Tensor`): weights of the latents in their edits, `(c,)`.
        mean (`torch.Tensor`): mean activations of the latents on the training data, `(c,)`.
        now (`torch.Tensor`, *optional*): present activations z of the latents, `(B, N, c)`; `None` if no latent is
            read.
        taken (`torch.Tensor`, *optional*): present activations of the source's latents, `(B, N, sources)`.
        level (`torch.Tensor`, *optional*): present activation of the source, in units of its typical one, `(B, N, 1)`.
        share (`torch.Tensor`, *optional*): strengths for the source's latents, `(B, 1, sources)`.
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
    One operation.

    Args:
        change (`Callable[[Latents], torch.Tensor]`, *optional*): the change of each latent's activation before
            clipping, `(B, N or 1, c)`; an operation with a source appends the changes of the source's latents. `None`
            if tokens are exchanged instead, see [`Erasure`].
        neutral (`float`, *optional*): the strength that changes nothing; `None` if there is none.
        reads (`bool`): whether the change depends on the present activations, even without clipping.
        takes (`bool`): whether the operation needs a source.
        apply_to (`str`): the guidance branches that are changed if the edit does not say.
    """

    change: Callable[[Latents], torch.Tensor] | None
    neutral: float | None = None
    reads: bool = True
    takes: bool = False
    apply_to: str = "contrast"

    @property
    def exchanges(self) -> bool:
        """Whether whole tokens are exchanged, instead of activations of latents changed."""
        return self.change is None


def _transfer(z: Latents) -> torch.Tensor:
    return torch.cat([z.level * z.full, -z.share.clamp(0, 1) * z.taken], -1)


def _replace(z: Latents) -> torch.Tensor:
    return torch.cat([(z.level > 0).to(z.now.dtype) * (z.full - z.now), -z.taken], -1)


#: The operations by name; [`Edit`] describes them in words.
OPERATIONS: dict[str, Operation] = {
    "add": Operation(lambda z: z.full, neutral=0.0, reads=False),
    "set": Operation(lambda z: z.full - z.now),
    "scale": Operation(lambda z: (z.strength - 1) * z.now, neutral=1.0),
    "clamp": Operation(lambda z: z.now.minimum(z.full) - z.now),
    "ablate": Operation(lambda z: -z.strength * z.weights * z.now, neutral=0.0),
    "ablate_to_mean": Operation(lambda z: z.strength * (z.mean - z.now), neutral=0.0),
    "transfer": Operation(_transfer, neutral=0.0, takes=True),
    "replace": Operation(_replace, takes=True),
    "erase": Operation(None, neutral=0.0, apply_to="all"),
}
