"""What the user asked for: one `Edit` per feature and site, checked on construction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from numbers import Real

import numpy as np
import torch
from PIL import Image

from .operations import OPERATIONS

APPLY_TO = ("cond", "all", "contrast")
INJECTIONS = ("trajectory", "residual")

Strength = float | tuple[float, ...] | torch.Tensor | Callable[[float], "float | list[float]"]


def _choice(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {list(known)}, got {value!r}.")


def _is_finite(values) -> bool:
    return len(values) > 0 and all(isinstance(v, Real) and math.isfinite(v) for v in values)


@dataclass(frozen=True, kw_only=True, eq=False)
class Edit:
    """
    A change of some latents of one site's dictionary.

    Args:
        latents (`tuple[int, ...]`): rows of the dictionary that move together.
        weights (`tuple[float, ...]`): how much each moves, in units of its own typical full activation.
        strength: how far; 1.0 is the typical full activation (99th percentile on the training data). A number; a
            tuple of one per prompt; a schedule over denoising, as a tensor `(steps,)` or `(steps, prompts)` spread
            evenly from pure noise to the image, or as a function of the progress from 0 to 1.
        operation (`str`): with z the present activation, s the strength and u the typical one,

            - `"add"`: z + s u
            - `"set"`: s u
            - `"scale"`: s z
            - `"clamp"`: at most s u
            - `"ablate"`, `"ablate_to_mean"`: the share s (times the weight) of the way to 0, or the share s of that to
              the mean over the training data
            - `"transfer"`: the share s of what `source` has of its own typical activation, taken from there
            - `"replace"`: s u on tokens on which `source` is active, and `source` to 0 there
        source (`tuple[int, ...]`, *optional*): rows that `transfer` and `replace` take from.
        where (`tuple[int, ...]`, *optional*): only tokens on which one of these latents is active.
        mask (`torch.Tensor`, *optional*): `(1 or prompts, height, width)` in [0, 1], multiplies the change, of a video
            in every frame; or for each frame, `(frames, height, width)` or `(1 or prompts, frames, height, width)`.
        start, end (`float`): the part of denoising time, 0 at pure noise and 1 at the image, in which it acts.
        apply_to (`str`): `"cond"`, the text-conditional half; `"all"`; or `"contrast"`, + on it and − on the other
            half.
        injection (`str`): `"trajectory"` moves to where the activation would be were the feature active all along;
            `"residual"` adds only this step's innovation.
        clip (`bool`): keep edited activations inside the range of the training data.
        renormalise (`bool`): afterwards scale each token that the edits of this dictionary changed at the site back to
            the length it had.
        map (`torch.Tensor`, *optional*): rows of a [`LinearMap`], instead of latents; unclipped.
        bounds (`tuple[float, float]`, *optional*): strengths are kept inside. What a fitted label is made of answers
            one strength each in its own range.

    Raises:
        `ValueError`: if anything is out of its range; the message says what was expected.
    """

    latents: tuple[int, ...]
    weights: tuple[float, ...]
    strength: Strength
    operation: str = "add"
    source: tuple[int, ...] | None = None
    where: tuple[int, ...] | None = None
    mask: torch.Tensor | None = None
    start: float = 0.0
    end: float = 1.0
    apply_to: str = "contrast"
    injection: str = "trajectory"
    clip: bool = True
    renormalise: bool = False
    map: torch.Tensor | None = None
    bounds: tuple[float, float] | None = None

    def __post_init__(self):
        _choice("operation", self.operation, OPERATIONS)
        _choice("apply_to", self.apply_to, APPLY_TO)
        _choice("injection", self.injection, INJECTIONS)
        if torch.is_tensor(self.strength):
            if self.strength.ndim not in (1, 2) or not self.strength.numel():
                shape = tuple(self.strength.shape)
                raise ValueError(f"A schedule must be a tensor (steps,) or (steps, prompts), got shape {shape}.")
            if not self.strength.isfinite().all():
                raise ValueError("A schedule must hold finite numbers, got NaN or inf.")
        elif not callable(self.strength):
            strengths = self.strength if isinstance(self.strength, tuple) else (self.strength,)
            if not _is_finite(strengths):
                raise ValueError(
                    f"A strength must be a finite number or a list of them, one per prompt; got {self.strength!r}."
                )
        if (self.source is None) == OPERATIONS[self.operation].takes:
            takers = " and ".join(repr(name) for name, operation in OPERATIONS.items() if operation.takes)
            raise ValueError(
                f"{self.operation!r} needs a `source` feature at the same site to take from."
                if self.source is None
                else f"`source` is for {takers}, not for {self.operation!r}."
            )
        if self.map is not None and (self.latents or self.operation != "add" or self.clip):
            raise ValueError("A map adds, unclipped, and to no latents.")
        if self.where == () or self.source == ():
            raise ValueError(
                f"`{'where' if self.where == () else 'source'}` names no latent of this site, so the edit would act "
                "nowhere."
            )
        if not _is_finite((self.start, self.end)) or not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"Expected 0 <= start <= end <= 1, got start={self.start!r}, end={self.end!r}.")

    @property
    def is_idle(self) -> bool:
        """Whether the edit changes nothing at all."""
        neutral = OPERATIONS[self.operation].neutral
        if callable(self.strength) or neutral is None:
            return False
        if torch.is_tensor(self.strength):
            strengths = self.strength.flatten().tolist()
        else:
            strengths = self.strength if isinstance(self.strength, tuple) else (self.strength,)
        return all(self._bounded(strength) == neutral for strength in strengths)

    @property
    def moved(self) -> list[int]:
        """Rows whose activation changes."""
        return [*self.latents, *(self.source or ())]

    @property
    def reads_moved(self) -> bool:
        """Whether the change depends on the present activation of what moves."""
        return OPERATIONS[self.operation].reads or self.clip

    @property
    def read(self) -> list[int]:
        """Rows whose present activation must be known."""
        return [*(self.moved if self.reads_moved else ()), *(self.where or ())]

    def scaled(self, weight: float) -> Edit:
        """The same with the strength of what it adds multiplied."""
        if weight == 1.0 or self.operation != "add" and self.bounds is None:
            return self
        strength = self.strength
        if callable(strength):
            return replace(self, strength=_ScaledSchedule(strength, weight))
        many = isinstance(strength, tuple)
        return replace(self, strength=tuple(s * weight for s in strength) if many else strength * weight)

    def acts_at(self, timestep: float) -> bool:
        """Whether the edit's window contains `timestep`; windows are in training time, so all samplers agree on
        them."""
        return self.start * 1000 <= 1000 - timestep <= self.end * 1000

    def strength_at(self, timestep: float) -> tuple[float, ...]:
        """One strength, or one per prompt, at a training timestep."""
        progress = min(max(1 - timestep / 1000, 0.0), 1.0)
        if torch.is_tensor(self.strength):
            place = progress * (len(self.strength) - 1)
            low = min(int(place), max(len(self.strength) - 2, 0))
            high = min(low + 1, len(self.strength) - 1)
            values = torch.lerp(self.strength[low].double(), self.strength[high].double(), place - low)
            return tuple(map(self._bounded, values.reshape(-1).tolist()))
        strength = self.strength(progress) if callable(self.strength) else self.strength
        strengths = tuple(numbers(strength))
        if not _is_finite(strengths):
            raise ValueError(f"The schedule gave {strength!r} at progress {progress:.3g}, expected finite numbers.")
        return tuple(map(self._bounded, strengths))

    def _bounded(self, strength: float) -> float:
        return strength if self.bounds is None else min(max(strength, self.bounds[0]), self.bounds[1])


@dataclass(frozen=True)
class _ScaledSchedule:
    schedule: Callable[[float], float | list[float]]
    weight: float

    def __call__(self, progress: float) -> list[float]:
        return [value * self.weight for value in numbers(self.schedule(progress))]


def numbers(values) -> list:
    """The numbers in a number, a list, a tuple, an array or a tensor."""
    if isinstance(values, np.ndarray | torch.Tensor):
        return values.reshape(-1).tolist()
    return list(values) if isinstance(values, list | tuple) else [values]


def as_strength(strength) -> Strength:
    """A strength as an [`Edit`] takes it: a list as a tuple, an array as a tensor, and of one number the number."""
    if isinstance(strength, list):
        return tuple(strength)
    if isinstance(strength, np.ndarray | torch.Tensor) and strength.ndim == 0:
        return strength.item()
    if isinstance(strength, np.ndarray | torch.Tensor):
        return torch.as_tensor(strength).cpu()  # looked at on the host, at each step
    return strength


def as_mask(mask) -> torch.Tensor | None:
    """
    A PIL image, array or tensor as `(1 or n, height, width)`, or `(1 or n, frames, height, width)`, float in [0, 1].
    An array `(height, width, 1 or 3)` is a picture, as is one of bytes that are not all 0 or 1.
    """
    if mask is None:
        return None
    if not isinstance(mask, Image.Image | np.ndarray | torch.Tensor):
        raise ValueError(f"A mask must be a PIL image, an array or a tensor, got {type(mask).__name__}.")
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L"), dtype=np.float32) / 255
    if isinstance(mask, np.ndarray) and mask.ndim == 3 and mask.shape[-1] in (1, 3):
        mask = mask.mean(-1, dtype=np.float32).astype(mask.dtype)
    if isinstance(mask, np.ndarray) and mask.dtype == np.uint8 and mask.size and mask.max() > 1:
        mask = mask / np.float32(255)
    mask = torch.as_tensor(np.asarray(mask) if not torch.is_tensor(mask) else mask).float().cpu()
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    mask = mask[None] if mask.ndim == 2 else mask
    if mask.ndim not in (3, 4) or mask.numel() == 0:
        raise ValueError(
            "A mask must be (height, width), (prompts or frames, height, width) or (prompts, frames, height, width), "
            f"got shape {tuple(mask.shape)}."
        )
    if not torch.isfinite(mask).all() or mask.min() < 0 or mask.max() > 1:
        raise ValueError(f"A mask must lie in [0, 1], got values from {mask.min():.3g} to {mask.max():.3g}.")
    return mask
