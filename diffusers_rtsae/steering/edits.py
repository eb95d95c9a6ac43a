"""`Edit`: what the user asked for at one site. Its arguments are checked on construction."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from numbers import Real

import numpy as np
import torch
from PIL import Image

from ..models import interpolate
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
        latents (`tuple[int, ...]`): indices of the latents that move together.
        weights (`tuple[float, ...]`): how far each latent moves at strength 1, in units of its typical activation (the
            99th percentile on the training data).
        strength: how far the latents move; 1.0 is the typical full activation. A number; a tuple with one number per
            prompt; or a schedule over denoising: a tensor `(steps,)` or `(steps, prompts)` that is spread evenly from
            pure noise to the image, or a function of the progress from 0 to 1.
        operation (`str`): what becomes of an activation z, with the strength s and u, the typical activation times
            the weight:

            - `"add"`: z + s u
            - `"set"`: s u
            - `"scale"`: s z
            - `"clamp"`: at most s u
            - `"ablate"`: moves the share s (times the weight) of the way to 0
            - `"ablate_to_mean"`: moves the share s of the way to the latent's mean on the training data
            - `"transfer"`: z + l s u, where l is the activation of `source` in units of its typical one; the share s
              of `source` is removed
            - `"replace"`: s u on tokens on which `source` is active; there `source` becomes 0
            - `"erase"`: changes whole tokens instead of activations. Those on which one of the latents has been active
              by more than half of its typical activation, at this step or before, move the share s of the way to the
              mean of the picture's other tokens, stretched to their mean length. A `mask` limits this to a part of the
              picture; with a `mask` and no `latents` all tokens under it move. A picture without other tokens is left
              as it is
        source (`tuple[int, ...]`, *optional*): indices of the latents that `transfer` and `replace` take from.
        where (`tuple[int, ...]`, *optional*): change only tokens on which one of these latents is active.
        mask (`torch.Tensor`, *optional*): factors in [0, 1] of the change: `(1 or prompts, height, width)`, the same
            in every frame of a video; or for each frame, `(frames, height, width)` or
            `(1 or prompts, frames, height, width)`.
        start, end (`float`): the part of denoising in which the edit acts, from 0 at pure noise to 1 at the image.
        apply_to (`str`): the guidance branches that are changed: `"cond"`, the conditional one; `"all"`; or
            `"contrast"`, which adds the change to the conditional branch and subtracts it from the unconditional one.
            By default `"all"` for `"erase"`, which looks at the conditional branch and erases there in all of them,
            and `"contrast"` for all others; at sites in text encoders pipelines ask for `"cond"`.
        injection (`str`): `"trajectory"` adds the whole change that the activation would have if the feature had been
            active from the first anchor on; `"residual"` adds only the part of it that belongs to this step.
        clip (`bool`): keep the edited activations of latents in the range of the training data.
        renormalise (`bool`): afterwards scale each changed token back to the length that it had before the edits of
            this dictionary at the site.
        map (`torch.Tensor`, *optional*): rows of a [`LinearMap`] to apply instead of moving latents; needs
            `clip=False`.
        vectors (`torch.Tensor`, *optional*): what to add to each token of a text at strength 1, `(tokens, d)`,
            instead of moving latents; needs `clip=False`.
        bounds (`tuple[float, float]`, *optional*): range that strengths are clamped to. A fitted label may have
            several parts, such as one for strengths below and one for those above zero; each part responds within its
            bounds only.

    Raises:
        `ValueError`: an argument is invalid; the message says what was expected.
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
    apply_to: str = None  # type: ignore[assignment] # that of the operation
    injection: str = "trajectory"
    clip: bool = True
    renormalise: bool = False
    map: torch.Tensor | None = None
    vectors: torch.Tensor | None = None
    bounds: tuple[float, float] | None = None

    def __post_init__(self):
        _choice("operation", self.operation, OPERATIONS)
        if self.apply_to is None:
            object.__setattr__(self, "apply_to", OPERATIONS[self.operation].apply_to)
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
        for name, own in {"map": self.map, "vectors": self.vectors}.items():
            if own is not None and (self.latents or self.operation != "add" or self.clip):
                raise ValueError(f"An edit with `{name}` takes no latents, and needs operation='add' and clip=False.")
        if self.exchanges and not self.latents and self.mask is None:
            raise ValueError("Erasing everywhere leaves nothing to take tokens from: expected a `mask` of a part.")
        if self.where == () or self.source == ():
            raise ValueError(
                f"`{'where' if self.where == () else 'source'}` names no latent of this site, so the edit would act "
                "nowhere."
            )
        if not _is_finite((self.start, self.end)) or not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"Expected 0 <= start <= end <= 1, got start={self.start!r}, end={self.end!r}.")

    @property
    def is_idle(self) -> bool:
        """Whether the edit changes nothing, whatever the activation."""
        neutral = OPERATIONS[self.operation].neutral
        if callable(self.strength) or neutral is None:
            return False
        if torch.is_tensor(self.strength):
            strengths = self.strength.flatten().tolist()
        else:
            strengths = self.strength if isinstance(self.strength, tuple) else (self.strength,)
        return all(self._bounded(strength) == neutral for strength in strengths)

    @property
    def exchanges(self) -> bool:
        """Whether the edit exchanges whole tokens."""
        return OPERATIONS[self.operation].exchanges

    @property
    def exchanges_all(self) -> bool:
        """Whether it does so in all guidance branches."""
        return self.exchanges and self.apply_to == "all"

    @property
    def moved(self) -> list[int]:
        """Indices of the latents whose activation changes."""
        return [*self.latents, *(self.source or ())]

    @property
    def reads_moved(self) -> bool:
        """Whether the change depends on the present activation of the latents in `moved`."""
        return OPERATIONS[self.operation].reads or self.clip

    @property
    def read(self) -> list[int]:
        """Indices of the latents whose present activation the edit depends on."""
        return [*(self.moved if self.reads_moved else ()), *(self.where or ())]

    def scaled(self, weight: float) -> Edit:
        """This edit with its strength multiplied, if it adds or has `bounds`; all other edits are unchanged."""
        if weight == 1.0 or self.operation != "add" and self.bounds is None:
            return self
        strength = self.strength
        if callable(strength):
            return replace(self, strength=_ScaledSchedule(strength, weight))
        many = isinstance(strength, tuple)
        return replace(self, strength=tuple(s * weight for s in strength) if many else strength * weight)

    def acts_at(self, timestep: float) -> bool:
        """Whether `timestep` is between `start` and `end`. The timestep is in training units, so this is the same for
        all samplers."""
        return self.start * 1000 <= 1000 - timestep <= self.end * 1000

    def strength_at(self, timestep: float) -> tuple[float, ...]:
        """The strength at a timestep in training units: one number, or one per prompt."""
        progress = min(max(1 - timestep / 1000, 0.0), 1.0)
        if torch.is_tensor(self.strength):
            place = progress * (len(self.strength) - 1)
            values = interpolate(self.strength.double(), place)
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
    """A number, list, tuple, array or tensor as a list of numbers."""
    if isinstance(values, np.ndarray | torch.Tensor):
        return values.reshape(-1).tolist()
    return list(values) if isinstance(values, list | tuple) else [values]


def as_strength(strength) -> Strength:
    """A strength in the form that an [`Edit`] takes: lists become tuples, arrays tensors, and 0-d arrays numbers."""
    if isinstance(strength, list):
        return tuple(strength)
    if isinstance(strength, np.ndarray | torch.Tensor) and strength.ndim == 0:
        return strength.item()
    if isinstance(strength, np.ndarray | torch.Tensor):
        return torch.as_tensor(strength).cpu()  # on the CPU, as it is read there at each step
    return strength


def as_mask(mask) -> torch.Tensor | None:
    """
    A mask from a PIL image, array or tensor: float in [0, 1], `(1 or n, height, width)` or
    `(1 or n, frames, height, width)`. An array `(height, width, 1 or 3)` is taken as a picture. An array of bytes is
    divided by 255, unless it holds only 0 and 1.
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
