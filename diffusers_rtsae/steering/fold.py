"""
Edits of one site as one product of amounts and directions. The same fold steers, measures effects and is fitted: what
it adds can be differentiated with respect to its weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..models import LinearMap, SparseDictionary, Step, TokenGrid
from .edits import Edit
from .operations import OPERATIONS, Latents


@dataclass
class Counts:
    """
    What the edits of a fold did at a step: tensors until somebody asks.

    edited (`torch.Tensor`): the share of tokens that each edit is to change, `(edits,)`.
    out_of_range (`torch.Tensor`, *optional*): the share of these that had to be kept in range, `(edits,)`.
    relative_size (`torch.Tensor`, *optional*): how large all changes of that step were, of the activation.
    """

    timestep: float
    edits: list[Edit]
    edited: torch.Tensor
    out_of_range: torch.Tensor | None
    relative_size: torch.Tensor | None = None

    def rows(self) -> list[dict]:
        edited, outside = self.edited.tolist(), [None] * len(self.edits)
        if self.out_of_range is not None:
            outside = self.out_of_range.tolist()
        size = None if self.relative_size is None else float(self.relative_size)
        return [
            {
                "timestep": self.timestep,
                "latents": edit.latents,
                "edited": share,
                "out_of_range": share_outside,
                "relative_size": size,
            }
            for edit, share, share_outside in zip(self.edits, edited, outside, strict=True)
        ]


class Fold:
    """
    Edits that share their options, as one: a column for each latent (or dimension of a map) of each edit, and then,
    edit by edit, one for each latent that it takes from.

    `weights`, `(latents,)`, are those of the edits. They may require a gradient, and may be changed in place.

    Args:
        edits (`list[Edit]`): that differ in latents, weights and strengths alone; see [`fold_edits`].
        sae (`SparseDictionary`): their dictionary.
        rows (`list[int]`): the latents that are read, see [`read_by`].
        device (`torch.device`): where activations are.

    Raises:
        `ValueError`: the dictionary holds NaN or inf in a row that moves.
    """

    def __init__(self, edits: list[Edit], sae: SparseDictionary, rows: list[int], device: torch.device):
        self.edits, self.options, self.device, self.gain = edits, edits[0], device, sae.gain
        self._strengths: dict[tuple, torch.Tensor] = {}
        self._masks: dict[tuple, torch.Tensor] = {}
        self.weights = torch.tensor([weight for edit in edits for weight in edit.weights], device=device)
        if self.options.where is not None:
            self.where = self._index([rows.index(row) for row in self.options.where])
        if self.options.map is not None:
            self._own([i for i, edit in enumerate(edits) for _ in edit.map])
            self.map = LinearMap(torch.cat([edit.map for edit in edits]).to(device, torch.float32))
            return
        source, place = list(self.options.source or ()), {row: i for i, row in enumerate(rows)}
        moved = [row for edit in edits for row in edit.latents] + source * len(edits)
        self.given, self.sources = len(moved) - len(source) * len(edits), len(source)
        owners = [i for i, edit in enumerate(edits) for _ in edit.latents]
        owners += [i for i in range(len(edits)) for _ in source]
        self._own(owners)
        if self.options.reads_moved:
            read = [place[row] for row in moved]
            self.read = slice(None) if read == list(range(len(rows))) else self._index(read)
        statistics = (sae.typical_activation, sae.mean_activation, sae.max_activation)
        self.typical, self.mean, self.highest = (values[moved].float().to(device) for values in statistics)
        directions = sae.directions(moved, self.options.injection)
        if bad := {row for row, d in zip(moved, directions.paths, strict=True) if not d.isfinite().all()}:
            raise ValueError(f"The dictionary of {sae.config.site} holds NaN or inf in rows {sorted(bad)}.")
        self.directions = directions.to(device)

    def _index(self, values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), device=self.device)

    def _own(self, owners: list[int]) -> None:
        self.owners = self._index(owners)  # which edit a column is of
        self.owned = F.one_hot(self.owners).float() if len(owners) > len(self.edits) else None  # (columns, edits)

    def edits_now(self) -> list[Edit]:
        """The edits with the weights as they are now."""
        weights = iter(self.weights.tolist())
        return [replace(edit, weights=tuple(next(weights) for _ in edit.latents)) for edit in self.edits]

    def change(
        self,
        tokens: torch.Tensor,
        latents: torch.Tensor | None,
        step: Step,
        counts: list[Counts] | None = None,
        in_turns: int | None = None,
        reached: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What to add to the activation: amounts `(B, N or 1, c)` of vectors `(B, c, d)`.

        Args:
            tokens (`torch.Tensor`): the activation, `(B, N, d)`.
            latents (`torch.Tensor`, *optional*): the activations of the latents that are read, `(B, N, rows)`.
            step (`Step`): of denoising; a mask needs its token grid.
            counts (`list`, *optional*): where to write what was done.
            in_turns (`int`, *optional*): how many images there are, where prompts take turns from image to image
                instead of all images of one prompt lying beside one another.
            reached (`torch.Tensor`, *optional*): what the change of each token is multiplied by, `(B, N, 1)`.
        """
        images, present, cut = len(tokens), None, None
        strength = self._strength(step.timestep, images, in_turns)
        if self.options.map is not None:
            wish = change = present = strength * self.map.amounts(tokens, step)
        else:
            present = latents[..., self.read] if self.options.reads_moved else None
            wish = change = self._wish(strength, present)
        if self.options.clip:
            change, cut = self._in_range(present, wish)
        here = self._here(latents, images, step.size, in_turns)
        if reached is not None and reached.shape[:2] == tokens.shape[:2]:
            here = reached if here is None else here * reached
        if counts is not None:
            counts.append(self._count(step.timestep, wish, cut, here))
        gain = self.gain(tokens.float()) if self.options.map is None else None
        if gain is not None:
            here = gain if here is None else here * gain
        vectors = (self.directions if self.options.map is None else self.map.directions).at(step)
        if present is None:  # the same on all tokens: one vector an image
            return torch.ones_like(change[..., :1]) if here is None else here, change @ vectors
        return change if here is None else change * here, vectors.expand(images, *vectors.shape)

    def _in_range(self, present: torch.Tensor, wish: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The change that keeps columns in the range of the training data, and what that cuts off."""
        wanted = present + wish
        # an activation that is outside by itself is no reason to move it
        allowed = wanted.clamp(torch.zeros_like(self.highest), present.maximum(self.highest))
        return allowed - present, wanted - allowed

    def _count(
        self, timestep: float, wish: torch.Tensor, cut: torch.Tensor | None, here: torch.Tensor | None
    ) -> Counts:
        edited, outside = self._any(wish != 0), None
        if here is not None:
            edited = edited & (here != 0)
        share = edited.float().mean((0, 1))
        if cut is not None:
            outside = self._any(cut.abs() > 1e-6 * self.highest) & edited
            outside = outside.float().mean((0, 1)) / share.clamp(min=1e-9)
        return Counts(timestep, self.edits, share, outside)

    def _strength(self, timestep: float, images: int, in_turns: int | None) -> torch.Tensor:
        """Of each image and column, `(B, 1, columns)`."""
        if (images, in_turns) in self._strengths:
            return self._strengths[images, in_turns]
        given = [edit.strength_at(timestep) for edit in self.edits]
        if bad := {len(own) for own in given if images % len(own)}:
            raise ValueError(f"A schedule gives {min(bad)} strengths at t = {timestep:.0f}, for {images} rows.")
        with torch.inference_mode(False):  # what is kept may meet autograd later
            strength = torch.empty(images, len(given), device=self.device)
            for column, own in enumerate(given):  # filled, as sending them would make the device wait at each step
                for image, prompt in enumerate(_of_prompts(len(own), images, in_turns)):
                    strength[image, column].fill_(own[prompt])
            strength = strength[:, None, self.owners]
        if not any(callable(edit.strength) or torch.is_tensor(edit.strength) for edit in self.edits):
            self._strengths[images, in_turns] = strength
        return strength

    def _wish(self, strength: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
        """By how much the columns are to change, before clipping: `(B, N or 1, columns)`."""
        given, columns = slice(self.given), strength[..., : self.given]
        now = taken = level = share = None
        if present is not None:
            now, taken = present[..., given], present[..., self.given :]
        if self.sources:
            own = slice(self.sources)  # all take from the same
            level = (taken[..., own] / self.typical[self.given :][own]).amax(-1, keepdim=True)
            share = strength[..., self.given :]
        full = columns * (self.typical[given] * self.weights)
        latents = Latents(columns, full, self.weights, self.mean[given], now, taken, level, share)
        return OPERATIONS[self.options.operation].change(latents)

    def _here(
        self, latents: torch.Tensor | None, images: int, size: TokenGrid | tuple[int, int] | None, in_turns: int | None
    ) -> torch.Tensor | None:
        """What `where` and the mask leave of the change on each token, `(B, N, 1)`."""
        here = None
        if self.options.where is not None:
            here = (latents[..., self.where] > 0).any(-1, keepdim=True).float()
        if self.options.mask is not None:
            mask = self._mask(TokenGrid(*size), images, in_turns)
            here = mask if here is None else here * mask
        return here

    def _mask(self, size: TokenGrid, rows: int, in_turns: int | None) -> torch.Tensor:
        """The mask on the token grid of so many rows, `(rows, N, 1)`."""
        if (size, rows, in_turns) not in self._masks:
            mask, frames = self.options.mask.to(self.device), size.frames * size.beside
            if mask.ndim == 3 and rows // size.beside % len(mask):
                mask = mask[None]  # one for each frame instead of one for each prompt
            with torch.inference_mode(False):
                if mask.ndim == 3:  # the same in every frame
                    pooled = F.adaptive_avg_pool2d(mask[:, None], size[:2]).expand(-1, size.frames, -1, -1)
                else:
                    pooled = F.adaptive_avg_pool3d(mask[:, None], (frames, *size[:2]))[:, 0]
                    pooled = pooled.unflatten(1, (size.beside, size.frames)).flatten(0, 1)
                each = len(pooled) // len(mask)  # frames beside one another that have a mask of their own
                prompts = _of_prompts(len(mask), rows // each, in_turns)
                own = pooled.flatten(1)[[prompt * each + frame for prompt in prompts for frame in range(each)]]
                self._masks[size, rows, in_turns] = own[..., None]
        return self._masks[size, rows, in_turns]

    def _any(self, columns: torch.Tensor) -> torch.Tensor:
        """Whether any column of an edit is true: `(B, N or 1, columns)` to `(B, N or 1, edits)`."""
        if self.owned is None:
            return columns
        return columns.any(-1, keepdim=True) if len(self.edits) == 1 else columns.float() @ self.owned > 0


def _of_prompts(given: int, rows: int, in_turns: int | None) -> list[int]:
    """Which of as many things as there are prompts belongs to each row: those of one image, and then of one prompt,
    lie beside one another, or the prompts take turns from image to image."""
    if in_turns is None or given >= in_turns:
        return [i for i in range(given) for _ in range(rows // given)]
    return [image % given for image in range(in_turns) for _ in range(rows // in_turns)]


def _shared(edit: Edit) -> tuple:
    """What edits of one fold have in common."""
    names = ("operation", "source", "where", "start", "end", "apply_to", "injection", "clip")
    return *(getattr(edit, name) for name in names), id(edit.mask), None if edit.map is None else edit.map.shape[2]


def fold_edits(edits: Iterable[Edit], sae: SparseDictionary, rows: list[int], device: torch.device) -> list[Fold]:
    """Edits of one dictionary as folds, each of all that share their options. See [`Fold`]."""
    alike: dict[tuple, list[Edit]] = {}
    for edit in edits:
        alike.setdefault(_shared(edit), []).append(edit)
    return [Fold(own, sae, rows, device) for own in alike.values()]


def read_by(edits: Iterable[Edit]) -> list[int]:
    """The latents whose activation some edits depend on."""
    return list(dict.fromkeys(row for edit in edits for row in edit.read))


def total(changes: Sequence[tuple[torch.Tensor, torch.Tensor]], like: torch.Tensor) -> torch.Tensor | None:
    """What [`Fold.change`] gave, added up: `(B, N or 1, d)`, in memory as the activation `like` is; `None` of
    nothing."""
    by_tokens: dict[int, list] = {}
    for amounts, vectors in changes:
        by_tokens.setdefault(amounts.shape[1], []).append((amounts, vectors))
    whole = None
    for group in by_tokens.values():
        amounts, vectors = group[0]
        if len(group) > 1:
            together = zip(zip(*group, strict=True), (-1, 1), strict=True)
            amounts, vectors = (torch.cat(parts, dim) for parts, dim in together)
        product = amounts @ vectors if like.stride(-1) == 1 else (vectors.mT @ amounts.mT).mT
        whole = product if whole is None else whole + product
    return whole
