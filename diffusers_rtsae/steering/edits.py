"""What the user asked for: one `Edit` per feature and site, checked on construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from PIL import Image

OPERATIONS = ("add", "set", "scale")
APPLY_TO = ("cond", "all", "contrast")
INJECTIONS = ("trajectory", "residual")


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {list(known)}, got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class Edit:
    """
    A change of some latents of one site's dictionary.

    Args:
        latents (`tuple[int, ...]`): rows of the dictionary that move together.
        weights (`tuple[float, ...]`): how much each moves, in units of its own typical full activation.
        strength (`float` or `tuple[float, ...]`): how far; 1.0 is the typical full activation (99th percentile on the
            training data). A tuple holds one value per prompt.
        operation (`str`): `"add"` to the activation, `"set"` it to the strength, or `"scale"` it by the strength (0
            ablates); `set` and `scale` read the present activation, `add` does not.
        where (`tuple[int, ...]`, *optional*): only tokens on which one of these latents is active.
        mask (`torch.Tensor`, *optional*): `(1 or prompts, height, width)` in [0, 1], multiplies the change.
        start, end (`float`): the part of denoising time, 0 at pure noise and 1 at the image, in which it acts.
        apply_to (`str`): `"cond"`, the text-conditional half; `"all"`; or `"contrast"`, + on it and − on the other
        half.
        injection (`str`): `"trajectory"` moves to where the activation would be were the feature active all along;
            `"residual"` adds only this step's innovation.
    """

    latents: tuple[int, ...]
    weights: tuple[float, ...]
    strength: float | tuple[float, ...]
    operation: str = "add"
    where: tuple[int, ...] | None = None
    mask: torch.Tensor | None = None
    start: float = 0.0
    end: float = 1.0
    apply_to: str = "contrast"
    injection: str = "trajectory"

    def __post_init__(self):
        _choice("operation", self.operation, OPERATIONS)
        _choice("apply_to", self.apply_to, APPLY_TO)
        _choice("injection", self.injection, INJECTIONS)
        strengths = self.strength if isinstance(self.strength, tuple) else (self.strength,)
        if not strengths or not all(isinstance(s, Real) and math.isfinite(s) for s in strengths):
            raise ValueError(
                f"A strength must be a finite number or a list of them, one per prompt; got {self.strength!r}."
            )
        if self.where == ():
            raise ValueError("`where` names no latent of this site, so the edit would act nowhere.")
        if self.operation != "add" and self.apply_to == "all":
            raise ValueError(
                f"{self.operation!r} reads the conditional activation: use apply_to='cond' or 'contrast'."
            )
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"Expected 0 <= start <= end <= 1, got start={self.start}, end={self.end}.")

    @property
    def is_idle(self) -> bool:
        """Whether the edit changes nothing at all."""
        neutral = 1.0 if self.operation == "scale" else 0.0
        strengths = self.strength if isinstance(self.strength, tuple) else (self.strength,)
        return self.operation != "set" and all(s == neutral for s in strengths)

    def acts_at(self, timestep: float) -> bool:
        """Whether the edit's window contains `timestep`; windows are in training time, so all samplers agree on
        them."""
        return self.start * 1000 <= 1000 - timestep <= self.end * 1000


def as_mask(mask) -> torch.Tensor | None:
    """A PIL image, array or tensor as `(1 or n, height, width)` float in [0, 1]."""
    if mask is None:
        return None
    if not isinstance(mask, Image.Image | np.ndarray | torch.Tensor):
        raise ValueError(f"A mask must be a PIL image, an array or a tensor, got {type(mask).__name__}.")
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L"), dtype=np.float32) / 255
    mask = torch.as_tensor(np.asarray(mask) if not torch.is_tensor(mask) else mask).float().cpu()
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim != 3 or mask.numel() == 0:
        raise ValueError(f"A mask must be (height, width) or (prompts, height, width), got shape {tuple(mask.shape)}.")
    if not torch.isfinite(mask).all() or mask.min() < 0 or mask.max() > 1:
        raise ValueError(f"A mask must lie in [0, 1], got values from {mask.min():.3g} to {mask.max():.3g}.")
    return mask
