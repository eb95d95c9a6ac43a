"""
The change that edits make to an activation, as one matrix product of amounts and directions. Steering, the measurement
of effects and the fitting of labels all use it; the change is differentiable with respect to the edits' weights. Edits
that erase are the exception: they exchange tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..models import LinearMap, SparseDictionary, Step, TokenGrid
from .edits import Edit
from .operations import OPERATIONS, Latents

#: What a fold adds: two factors, see [`Fold.change`], or the whole, `(B, N, d)`, where tokens are exchanged.
Change = tuple[torch.Tensor, torch.Tensor] | torch.Tensor

_SEEN = 0.5  # the share of a latent's typical activation above which it sees what it stands for, measured on shapes


@dataclass
class Counts:
    """
    What the edits of a fold did at a step. The values stay tensors until a report is asked for, so that no step waits
    for the device.

    edited (`torch.Tensor`): share of all tokens that each edit changes, `(edits,)`.
    out_of_range (`torch.Tensor`, *optional*): share of the edited tokens on which clipping reduced the change,
        `(edits,)`.
    relative_size (`torch.Tensor`, *optional*): size of all changes of the dictionary at this step, relative to the
        activation.
    everywhere (`torch.Tensor`, *optional*): share of the pictures that were left as they are, because what is to be
        erased is on all of their tokens.
    """

    timestep: float
    edits: list[Edit]
    edited: torch.Tensor
    out_of_range: torch.Tensor | None
    relative_size: torch.Tensor | None = None
    everywhere: torch.Tensor | None = None

    def rows(self) -> list[dict]:
        edited, outside = self.edited.tolist(), [None] * len(self.edits)
        if self.out_of_range is not None:
            outside = self.out_of_range.tolist()
        size = None if self.relative_size is None else float(self.relative_size)
        own = {} if self.everywhere is None else {"everywhere": float(self.everywhere)}
        return [
            {
                "timestep": self.timestep,
                "latents": edit.latents,
                "edited": share,
                "out_of_range": share_outside,
                "relative_size": size,
            }
            | own
            for edit, share, share_outside in zip(self.edits, edited, outside, strict=True)
        ]


class Fold:
    """
    Edits that share their options, computed together. There is one column for each latent (or dimension of a map) of
    each edit; then, for each edit, one column for each latent of the source.

    `weights`, `(latents,)`, holds the weights of all edits. It may require a gradient, and may be changed in place.

    Args:
        edits (`list[Edit]`): edits that differ in latents, weights and strengths alone; see [`fold_edits`].
        sae (`SparseDictionary`): their dictionary.
        rows (`list[int]`): indices of the latents that are read, see [`read_by`].
        device (`torch.device`): device of the activations.

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
            self._set_owners([i for i, edit in enumerate(edits) for _ in edit.map])
            self.map = LinearMap(torch.cat([edit.map for edit in edits]).to(device, torch.float32))
            return
        source, place = list(self.options.source or ()), {row: i for i, row in enumerate(rows)}
        moved = [row for edit in edits for row in edit.latents] + source * len(edits)
        self.edited, self.sources = len(moved) - len(source) * len(edits), len(source)
        owners = [i for i, edit in enumerate(edits) for _ in edit.latents]
        owners += [i for i in range(len(edits)) for _ in source]
        self._set_owners(owners)
        if self.options.reads_moved:
            read = [place[row] for row in moved]
            self.read = slice(None) if read == list(range(len(rows))) else self._index(read)
        if OPERATIONS[self.options.operation].exchanges:
            return
        statistics = (sae.typical_activation, sae.mean_activation, sae.max_activation)
        self.typical, self.mean, self.highest = (values[moved].float().to(device) for values in statistics)
        directions = sae.directions(moved, self.options.injection)
        if bad := {row for row, d in zip(moved, directions.paths, strict=True) if not d.isfinite().all()}:
            raise ValueError(f"The dictionary of {sae.config.site} holds NaN or inf in rows {sorted(bad)}.")
        self.directions = directions.to(device)

    def _index(self, values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), device=self.device)

    def _set_owners(self, owners: list[int]) -> None:
        self.owners = self._index(owners)  # the edit that each column belongs to
        self.owned = F.one_hot(self.owners).float() if len(owners) > len(self.edits) else None  # (columns, edits)

    def edits_now(self) -> list[Edit]:
        """The edits with the present values of `weights`."""
        weights = iter(self.weights.tolist())
        return [replace(edit, weights=tuple(next(weights) for _ in edit.latents)) for edit in self.edits]

    def change(
        self,
        tokens: torch.Tensor,
        latents: torch.Tensor | None,
        step: Step,
        counts: list[Counts] | None = None,
        in_turns: int | None = None,
        token_scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What to add to the activation, as two factors.

        Args:
            tokens (`torch.Tensor`): the activation, `(B, N, d)`.
            latents (`torch.Tensor`, *optional*): activations of the latents that are read, `(B, N, rows)`.
            step (`Step`): the step of denoising; a mask needs its token grid.
            counts (`list`, *optional*): list to append the counts for the report to.
            in_turns (`int`, *optional*): number of images, if consecutive images are of different prompts in turn; by
                default all images of a prompt are consecutive.
            token_scale (`torch.Tensor`, *optional*): factor of the change of each token, `(B, N, 1)`.

        Returns:
            amounts `(B, N or 1, c)` and vectors `(B, c, d)`; their product is the change.
        """
        images, present, cut = len(tokens), None, None
        strength = self._strength(step.timestep, images, in_turns)
        if self.options.map is not None:
            requested = change = present = strength * self.map.amounts(tokens, step)
        else:
            present = latents[..., self.read] if self.options.reads_moved else None
            requested = change = self._requested(strength, present)
        if self.options.clip:
            change, cut = self._in_range(present, requested)
        factors = self._token_factors(latents, images, step.size, in_turns)
        if token_scale is not None and token_scale.shape[:2] == tokens.shape[:2]:
            factors = token_scale if factors is None else factors * token_scale
        if counts is not None:
            counts.append(self._count(step.timestep, requested, cut, factors))
        gain = self.gain(tokens.float()) if self.options.map is None else None
        if gain is not None:
            factors = gain if factors is None else factors * gain
        vectors = (self.directions if self.options.map is None else self.map.directions).at(step)
        if present is None:  # the change is the same on all tokens: one vector per image
            return torch.ones_like(change[..., :1]) if factors is None else factors, change @ vectors
        return change if factors is None else change * factors, vectors.expand(images, *vectors.shape)

    def _in_range(self, present: torch.Tensor, requested: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The change that keeps latents in the range of the training data, and the part of the requested one that is
        cut off."""
        target = present + requested
        # an activation that is out of range without any edit is not moved back
        allowed = target.clamp(torch.zeros_like(self.highest), present.maximum(self.highest))
        return allowed - present, target - allowed

    def _count(
        self, timestep: float, requested: torch.Tensor, cut: torch.Tensor | None, factors: torch.Tensor | None
    ) -> Counts:
        edited, outside = self._any(requested != 0), None
        if factors is not None:
            edited = edited & (factors != 0)
        share = edited.float().mean((0, 1))
        if cut is not None:
            outside = self._any(cut.abs() > 1e-6 * self.highest) & edited
            outside = outside.float().mean((0, 1)) / share.clamp(min=1e-9)
        return Counts(timestep, self.edits, share, outside)

    def _strength(self, timestep: float, images: int, in_turns: int | None) -> torch.Tensor:
        """The strength for each image and column, `(B, 1, columns)`."""
        if (images, in_turns) in self._strengths:
            return self._strengths[images, in_turns]
        per_edit = [edit.strength_at(timestep) for edit in self.edits]
        if bad := {len(strengths) for strengths in per_edit if images % len(strengths)}:
            raise ValueError(f"A schedule gives {min(bad)} strengths at t = {timestep:.0f}, for {images} rows.")
        with torch.inference_mode(False):  # a cached tensor may be used with autograd later
            strength = torch.empty(images, len(per_edit), device=self.device)
            for column, strengths in enumerate(per_edit):  # `fill_`, as a copy from the host would wait for the device
                for image, prompt in enumerate(_of_prompts(len(strengths), images, in_turns)):
                    strength[image, column].fill_(strengths[prompt])
            strength = strength[:, None, self.owners]
        if not any(callable(edit.strength) or torch.is_tensor(edit.strength) for edit in self.edits):
            self._strengths[images, in_turns] = strength
        return strength

    def _requested(self, strength: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
        """The change of each column before clipping, `(B, N or 1, columns)`."""
        edited, columns = slice(self.edited), strength[..., : self.edited]
        now = taken = level = share = None
        if present is not None:
            now, taken = present[..., edited], present[..., self.edited :]
        if self.sources:
            first = slice(self.sources)  # the source is the same for all edits: take the first one's columns
            level = (taken[..., first] / self.typical[self.edited :][first]).amax(-1, keepdim=True)
            share = strength[..., self.edited :]
        full = columns * (self.typical[edited] * self.weights)
        latents = Latents(columns, full, self.weights, self.mean[edited], now, taken, level, share)
        return OPERATIONS[self.options.operation].change(latents)

    def _token_factors(
        self, latents: torch.Tensor | None, images: int, size: TokenGrid | tuple[int, int] | None, in_turns: int | None
    ) -> torch.Tensor | None:
        """The factors of the change on each token from `where` and the mask, `(B, N, 1)`; `None` without either."""
        factors = None
        if self.options.where is not None:
            factors = (latents[..., self.where] > 0).any(-1, keepdim=True).float()
        if self.options.mask is not None:
            mask = self._mask(TokenGrid(*size), images, in_turns)
            factors = mask if factors is None else factors * mask
        return factors

    def _mask(self, size: TokenGrid, rows: int, in_turns: int | None) -> torch.Tensor:
        """The mask on the token grid, for this many rows of the batch: `(rows, N, 1)`."""
        if (size, rows, in_turns) not in self._masks:
            mask, frames = self.options.mask.to(self.device), size.frames * size.rows_per_video
            if mask.ndim == 3 and rows // size.rows_per_video % len(mask):
                mask = mask[None]  # it has one mask per frame, not one per prompt
            with torch.inference_mode(False):
                if mask.ndim == 3:  # the same in every frame
                    pooled = F.adaptive_avg_pool2d(mask[:, None], size[:2]).expand(-1, size.frames, -1, -1)
                else:
                    pooled = F.adaptive_avg_pool3d(mask[:, None], (frames, *size[:2]))[:, 0]
                    pooled = pooled.unflatten(1, (size.rows_per_video, size.frames)).flatten(0, 1)
                each = len(pooled) // len(
                    mask
                )  # batch rows per mask, if the frames of a video are rows with masks of their own
                prompts = _of_prompts(len(mask), rows // each, in_turns)
                per_row = pooled.flatten(1)[[prompt * each + frame for prompt in prompts for frame in range(each)]]
                self._masks[size, rows, in_turns] = per_row[..., None]
        return self._masks[size, rows, in_turns]

    def _any(self, columns: torch.Tensor) -> torch.Tensor:
        """Whether any column of each edit is true: from `(B, N or 1, columns)` to `(B, N or 1, edits)`."""
        if self.owned is None:
            return columns
        return columns.any(-1, keepdim=True) if len(self.edits) == 1 else columns.float() @ self.owned > 0


@dataclass
class Seen:
    """
    What an [`Erasure`] remembers of one generation.

    Args:
        active (`torch.Tensor`, *optional*): whether each edit's latents have seen a token so far, `(B, N, edits)`.
        share (`torch.Tensor`, *optional*): how far each token is exchanged at this step, `(B, N, 1)`.
        free (`torch.Tensor`, *optional*): 1 on the tokens that the others are replaced by, else 0, `(B, N, 1)`.
    """

    active: torch.Tensor | None = None
    share: torch.Tensor | None = None
    free: torch.Tensor | None = None


class Erasure(Fold):
    """
    Edits that erase what their latents see. A token is *seen* by an edit if one of its latents has been active there
    by more than half of its typical activation, at this or an earlier step of the generation. Seen tokens, or all
    tokens under the mask if an edit has no latents, become the mean of the picture's other tokens, stretched to their
    mean length. A picture that has no other token is left as it is.

    What is seen is decided on the conditional branch of guidance, whose text names things. The other branches of the
    step replace the same tokens, by the mean of their own.

    The arguments are those of [`Fold`].
    """

    def __init__(self, edits: list[Edit], sae: SparseDictionary, rows: list[int], device: torch.device):
        super().__init__(edits, sae, rows, device)
        latents = [row for edit in edits for row in edit.latents]
        self.least = _SEEN * sae.typical_activation[latents].float().to(device)
        self.owners = self._index(range(len(edits)))  # a strength for each edit, not for each latent

    def look(self, latents: torch.Tensor | None, tokens: torch.Tensor, seen: Seen) -> None:
        """Remember which of the tokens `(B, N, d)` of the conditional branch are seen at this step; `latents` is
        `(B, N, rows)`."""
        if not self.options.latents:
            active = tokens.new_ones((*tokens.shape[:2], len(self.edits)), dtype=torch.bool)
        else:
            active = self._any(latents[..., self.read] > self.least)
        is_first = seen.active is None or seen.active.shape != active.shape
        seen.active = active if is_first else seen.active | active

    def change(
        self,
        tokens: torch.Tensor,
        latents: torch.Tensor | None,
        step: Step,
        counts: list[Counts] | None = None,
        in_turns: int | None = None,
        token_scale: torch.Tensor | None = None,
        seen: Seen | None = None,
    ) -> torch.Tensor:
        """
        What to add to the activation of the conditional branch, `(B, N, d)`. The arguments are those of
        [`Fold.change`], and `seen`, what [`look`] remembered; without it, this step alone decides.
        """
        if seen is None:
            self.look(latents, tokens, seen := Seen())
        strength = self._strength(step.timestep, len(tokens), in_turns).clamp(0, 1)
        share = strength * seen.active
        factors = self._token_factors(latents, len(tokens), step.size, in_turns)
        if not self.options.latents:
            share, factors = share * factors, None  # all that the mask leaves out is free
        seen.free = (share == 0).all(-1, keepdim=True).float()
        if token_scale is not None and token_scale.shape[:2] == tokens.shape[:2]:
            seen.free = seen.free * (token_scale > 0)
            factors = token_scale if factors is None else factors * token_scale
        share = share if factors is None else share * factors
        exists = seen.free.any(1, keepdim=True)
        if counts is not None:
            everywhere = ((share != 0).any(1).any(1) & ~exists[:, 0, 0]).float().mean()
            edited = ((share != 0) & exists).float().mean((0, 1))
            counts.append(Counts(step.timestep, self.edits, edited, None, everywhere=everywhere))
        seen.share = share.amax(-1, keepdim=True) * exists
        return self.exchange(tokens, seen)

    def exchange(self, tokens: torch.Tensor, seen: Seen) -> torch.Tensor:
        """
        What to add to the tokens `(B, N, d)` of a guidance branch, once `change` has chosen which to replace.

        Raises:
            `ValueError`: the branch has another number of tokens than the conditional one.
        """
        if seen.share.shape[:2] != tokens.shape[:2]:
            raise ValueError(
                f"Erasing in all guidance branches needs as many tokens in each, got {tokens.shape[1]} and "
                f"{seen.share.shape[1]}. Use apply_to='cond'."
            )
        tokens = tokens.float()
        lengths = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
        free = seen.free / seen.free.sum(1, keepdim=True).clamp(min=1)
        mean, length = ((values * free).sum(1, keepdim=True) for values in (tokens, lengths))
        mean = mean * (length / torch.linalg.vector_norm(mean, dim=-1, keepdim=True).clamp(min=1e-20))
        return seen.share * (mean - tokens)


class Written(Fold):
    """
    Edits that add given vectors to the tokens of a text, place by place.

    The arguments are those of [`Fold`].
    """

    def __init__(self, edits: list[Edit], sae: SparseDictionary, rows: list[int], device: torch.device):
        super().__init__([replace(edit, vectors=None) for edit in edits], sae, rows, device)
        self.site, self.owners = sae.config.site, self._index(range(len(edits)))
        self.vectors = torch.stack([edit.vectors for edit in edits]).to(device, torch.float32)

    def change(
        self,
        tokens: torch.Tensor,
        latents: torch.Tensor | None,
        step: Step,
        counts: list[Counts] | None = None,
        in_turns: int | None = None,
        token_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        What to add to the tokens, `(B, N, d)`. The arguments are those of [`Fold.change`].

        Raises:
            `ValueError`: the text has another number of tokens than the vectors are for.
        """
        if self.vectors.shape[1] != tokens.shape[1]:
            raise ValueError(
                f"What is to be added at {self.site} was read on a text of {self.vectors.shape[1]} tokens, got one of "
                f"{tokens.shape[1]}: read it with the same `max_sequence_length`."
            )
        strength = self._strength(step.timestep, len(tokens), in_turns)
        factors = self._token_factors(latents, len(tokens), step.size, in_turns)
        if counts is not None:
            counts.append(self._count(step.timestep, strength.expand(-1, tokens.shape[1], -1), None, factors))
        change = torch.einsum("bie,end->bnd", strength, self.vectors)
        return change if factors is None else change * factors


def _of_prompts(count: int, rows: int, in_turns: int | None) -> list[int]:
    """Which of `count` strengths or masks, one per prompt, each row takes. The rows of an image are consecutive. So
    are the images of a prompt, unless consecutive images are of different prompts (`in_turns`: number of images)."""
    if in_turns is None or count >= in_turns:
        return [i for i in range(count) for _ in range(rows // count)]
    return [image % count for image in range(in_turns) for _ in range(rows // in_turns)]


def _shared(edit: Edit) -> tuple:
    """The options that all edits of a fold share."""
    names = ("operation", "source", "where", "start", "end", "apply_to", "injection", "clip")
    own = tuple(None if one is None else one.shape[1:] for one in (edit.map, edit.vectors))
    own = own if edit.vectors is None else (*own, len(edit.vectors))
    return *(getattr(edit, name) for name in names), id(edit.mask), own, not edit.latents


def fold_edits(edits: Iterable[Edit], sae: SparseDictionary, rows: list[int], device: torch.device) -> list[Fold]:
    """Group the edits of one dictionary by their options, one [`Fold`] per group."""
    alike: dict[tuple, list[Edit]] = {}
    for edit in edits:
        alike.setdefault(_shared(edit), []).append(edit)
    folds = []
    for group in alike.values():
        kind = Erasure if group[0].exchanges else Fold if group[0].vectors is None else Written
        folds.append(kind(group, sae, rows, device))
    return folds


def read_by(edits: Iterable[Edit]) -> list[int]:
    """Indices of the latents whose activation any of the edits depends on."""
    return list(dict.fromkeys(row for edit in edits for row in edit.read))


def total(changes: Sequence[Change], like: torch.Tensor) -> torch.Tensor | None:
    """The sum of changes from [`Fold.change`], `(B, N or 1, d)`, in the memory layout of the activation `like`; `None`
    if there are none."""
    exchanged = [change for change in changes if torch.is_tensor(change)]
    by_tokens: dict[int, list] = {}
    for amounts, vectors in (change for change in changes if not torch.is_tensor(change)):
        by_tokens.setdefault(amounts.shape[1], []).append((amounts, vectors))
    whole = sum(exchanged[1:], exchanged[0]) if exchanged else None
    for group in by_tokens.values():
        amounts, vectors = group[0]
        if len(group) > 1:
            together = zip(zip(*group, strict=True), (-1, 1), strict=True)
            amounts, vectors = (torch.cat(parts, dim) for parts, dim in together)
        product = amounts @ vectors if like.stride(-1) == 1 else (vectors.mT @ amounts.mT).mT
        whole = product if whole is None else whole + product
    return whole
