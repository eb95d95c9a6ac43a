"""Edits of one site folded to tensors: a reader of the latents that must be known, and what to add to the
activation."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from ..denoiser import TimeGrid
from ..models import LinearMap, Memory, SparseDictionary, Step, TokenGrid
from .edits import APPLY_TO, Edit
from .operations import OPERATIONS, Latents

_loading = threading.Lock()


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


@dataclass
class PlanState:
    """What a plan remembers of one running generation."""

    grid: TimeGrid | None = None  # of this generation's noise schedule, if that is not the plan's
    guidance: float | None = None  # its scale, if that is known
    images: int | None = None  # where these are of each prompt in turn, instead of one prompt's beside one another
    denoised: torch.Tensor | None = None  # 0 on tokens that are given and left as they are, `(B, N, 1)`
    memories: dict[int | None, Memory] = field(default_factory=dict)  # of streams that are read, conditional: None
    tokens: dict[int | None, int] = field(default_factory=dict)  # of these, how many
    timestep: float | None = None  # of the conditional call whose change is kept for calls that follow it
    on_conditional: torch.Tensor | None = None
    contrast: torch.Tensor | None = None
    counts: list[Counts] = field(default_factory=list)

    def copy(self) -> PlanState:
        """The same at this moment, which goes on by itself."""
        return replace(self, memories={key: memory.copy() for key, memory in self.memories.items()}, counts=[])

    @property
    def report(self) -> list[dict]:
        """What each edit did at each step: `timestep`, `latents`, the shares `edited` and `out_of_range`, and the
        `relative_size` of all of them."""
        return [row for counts in self.counts for row in counts.rows()]


class _Fold:
    """
    Edits of one plan that share their options, as one: a column for each latent (or dimension of a map) of each edit,
    and then, edit by edit, one for each latent that it takes from.

    Args:
        edits (`list[Edit]`): of one `_shared`.
        sae (`SparseDictionary`): their dictionary.
        rows (`list[int]`): the latents that are read.
        device (`torch.device`): where activations are.

    Raises:
        `ValueError`: the dictionary holds NaN or inf in a row that moves.
    """

    def __init__(self, edits: list[Edit], sae: SparseDictionary, rows: list[int], device: torch.device):
        self.edits, self.options, self.device, self.gain = edits, edits[0], device, sae.gain
        self._strengths: dict[tuple, torch.Tensor] = {}
        self._masks: dict[tuple, torch.Tensor] = {}
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
        self.weights = torch.tensor([weight for edit in edits for weight in edit.weights], device=device)
        self.full = self.typical[: self.given] * self.weights
        directions = sae.directions(moved, self.options.injection)
        if bad := {row for row, d in zip(moved, directions.paths, strict=True) if not d.isfinite().all()}:
            raise ValueError(f"The dictionary of {sae.config.site} holds NaN or inf in rows {sorted(bad)}.")
        self.directions = directions.to(device)

    def _index(self, values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values), device=self.device)

    def _own(self, owners: list[int]) -> None:
        self.owners = self._index(owners)  # which edit a column is of
        self.owned = F.one_hot(self.owners).float() if len(owners) > len(self.edits) else None  # (columns, edits)

    def change(
        self,
        tokens: torch.Tensor,
        latents: torch.Tensor | None,
        step: Step,
        size: TokenGrid | tuple[int, int] | None,
        counts: list[Counts] | None,
        state: PlanState | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        What to add to the activation: amounts `(B, N or 1, c)` of vectors `(B, c, d)`.

        Args:
            tokens (`torch.Tensor`): the activation, `(B, N, d)`.
            latents (`torch.Tensor`, *optional*): what is read, `(B, N, rows)`.
            size (`TokenGrid`, *optional*): token grid, needed for a mask.
            counts (`list`, *optional*): where to tell what was done.
            state (`PlanState`, *optional*): of the generation: how its images lie, and which tokens are given.
        """
        images, present, in_turns = len(tokens), None, state and state.images
        strength = self._strength(step.timestep, images, in_turns)
        if self.options.map is not None:
            wish = change = present = strength * self.map.amounts(tokens, step)
        else:
            present = latents[..., self.read] if self.options.reads_moved else None
            wish = change = self._wish(strength, present)
        if self.options.clip:
            wanted = present + wish
            # an activation that is outside by itself is no reason to move it
            allowed = wanted.clamp(torch.zeros_like(self.highest), present.maximum(self.highest))
            change = allowed - present
        here = self._here(latents, images, size, in_turns)
        if state is not None and state.denoised is not None and state.denoised.shape[:2] == tokens.shape[:2]:
            here = state.denoised if here is None else here * state.denoised
        if counts is not None:
            edited, outside = self._any(wish != 0), None
            if here is not None:
                edited = edited & (here != 0)
            share = edited.float().mean((0, 1))
            if self.options.clip:
                outside = self._any((wanted - allowed).abs() > 1e-6 * self.highest) & edited
                outside = outside.float().mean((0, 1)) / share.clamp(min=1e-9)
            counts.append(Counts(step.timestep, self.edits, share, outside))
        gain = self.gain(tokens.float()) if self.options.map is None else None
        if gain is not None:
            here = gain if here is None else here * gain
        vectors = (self.directions if self.options.map is None else self.map.directions).at(step)
        if present is None:  # the same on all tokens: one vector an image
            return torch.ones_like(change[..., :1]) if here is None else here, change @ vectors
        return change if here is None else change * here, vectors.expand(images, *vectors.shape)

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
        latents = Latents(
            columns, columns * self.full, self.weights, self.mean[given], now, taken, level, share
        )  # fmt: skip
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


def _sum(changes: list[tuple[torch.Tensor, torch.Tensor]], like: torch.Tensor) -> torch.Tensor | None:
    """What `_Fold.change` gave, added up: `(B, N or 1, d)`, in memory as the activation `like` is."""
    by_tokens: dict[int, list] = {}
    for amounts, vectors in changes:
        by_tokens.setdefault(amounts.shape[1], []).append((amounts, vectors))
    total = None
    for group in by_tokens.values():
        amounts, vectors = group[0]
        if len(group) > 1:
            amounts, vectors = (
                torch.cat(parts, dim) for parts, dim in zip(zip(*group, strict=True), (-1, 1), strict=True)
            )
        product = amounts @ vectors if like.stride(-1) == 1 else (vectors.mT @ amounts.mT).mT
        total = product if total is None else total + product
    return total


class SitePlan:
    """
    All edits of one dictionary at one site, ready to be applied. What belongs to a run is in a [`PlanState`].

    Args:
        sae (`SparseDictionary`): the dictionary; only rows that are edited or read are taken from it, where its kind
            can read them alone.
        edits (`list[Edit]`): what to change; idle edits are left out.
        alphas_cumprod (`torch.Tensor`, *optional*): of the noise schedule, where no pipeline says it; see `begin`.
    """

    def __init__(self, sae: SparseDictionary, edits: list[Edit], alphas_cumprod: torch.Tensor | None):
        self.sae, self.edits = sae, [edit for edit in edits if not edit.is_idle]
        self.grid = TimeGrid(sae.config.anchors, alphas_cumprod)
        self.rows = list(dict.fromkeys(row for edit in self.edits for row in edit.read))
        self.apply_to = {edit.apply_to for edit in self.edits}
        self.reads_of = {edit.apply_to for edit in self.edits if edit.read}
        self.renormalises = any(edit.renormalise for edit in self.edits)
        self.device: torch.device | None = None

    @torch.inference_mode(False)  # what is kept may meet autograd later
    @torch.no_grad()
    def _load(self, device: torch.device) -> None:
        self.reader = self.sae.reader(self.rows, device) if self.rows else None
        if self.reader is not None and self.reader.computes is not None:
            config = self.sae.config
            warnings.warn(
                f"To read some latents of {config.site} all {self.reader.computes:,} are computed, as only the "
                f"largest are active: {self.reader.computes * config.in_channels / 1e6:.3g} million "
                "multiplications a token and step. What is added with clip=False and without `where` reads none.",
                stacklevel=2,
            )
        alike: dict[tuple, list[Edit]] = {}
        for edit in self.edits:
            alike.setdefault(_shared(edit), []).append(edit)
        self.folds = [_Fold(edits, self.sae, self.rows, device) for edits in alike.values()]
        self.device = device

    def begin(self, alphas_cumprod: torch.Tensor | None, guidance: float | None) -> PlanState:
        """A new generation on another noise schedule, with this scale of guidance."""
        return PlanState(TimeGrid(self.sae.config.anchors, alphas_cumprod), guidance)

    def reads(self, role: str) -> bool:
        """Whether latents of rows with this role are read."""
        return bool(self.reads_of) if role == "cond" else "all" in self.reads_of

    def recall(
        self, state: PlanState, branch: int | None, tokens: torch.Tensor, timestep: float, size: TokenGrid | None
    ) -> None:
        """Remember tokens `(B, N, d)` of a step that was before the first one."""
        self._ready(tokens.device)
        memory = state.memories.setdefault(branch, self.reader.begin())
        self.reader.read(memory, tokens, (state.grid or self.grid).step(timestep, size, state.guidance))
        memory.continue_with(tokens)

    def _ready(self, device: torch.device) -> None:
        if self.device != device:
            with _loading:  # one thread loads what all of them use
                if self.device != device:
                    self._load(device)

    def conditional(
        self,
        state: PlanState,
        tokens: torch.Tensor,
        timestep: float,
        size: TokenGrid | tuple[int, int] | None,
        written: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """
        What to add to the conditional rows at this step.

        Args:
            state (`PlanState`): of this generation.
            tokens (`torch.Tensor`): their activations `(B, N, d)`.
            timestep (`float`): in training units.
            size (`TokenGrid`, *optional*): token grid, needed for masks; some kinds read it.
            written (`torch.Tensor`, *optional*): what the change is of, if that is not what is read.

        Returns:
            the change `(B, N or 1, d)` float32, or `None`.
        """
        changes = self._changes(state, None, tokens, timestep, size, APPLY_TO, state.counts)
        state.timestep = timestep
        state.contrast = _sum([change for fold, change in changes if fold.options.apply_to == "contrast"], tokens)
        others = _sum([change for fold, change in changes if fold.options.apply_to != "contrast"], tokens)
        parts = [part for part in (state.contrast, others) if part is not None]
        state.on_conditional = self._renormalised(sum(parts[1:], parts[0]), tokens, written) if parts else None
        return state.on_conditional

    def unconditional(
        self,
        state: PlanState,
        stream: int,
        tokens: torch.Tensor,
        timestep: float,
        size: TokenGrid | tuple[int, int] | None,
        written: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """What to add to the rows of an unconditional stream, after `conditional` of the same step."""
        if "contrast" in self.apply_to:
            self._follows(state, timestep)
        changes = self._changes(state, stream, tokens, timestep, size, ("all",)) if "all" in self.apply_to else []
        own = _sum([change for _, change in changes], tokens)
        parts = [part for part in (own, None if state.contrast is None else -state.contrast) if part is not None]
        return self._renormalised(sum(parts[1:], parts[0]), tokens, written) if parts else None

    def _renormalised(self, change: torch.Tensor, tokens: torch.Tensor, written: torch.Tensor | None) -> torch.Tensor:
        """The change after which tokens have the length they had before, if an edit wants that."""
        if not self.renormalises:
            return change
        tokens = (tokens if written is None else written).float()
        edited = tokens + change
        length = torch.linalg.vector_norm(edited, dim=-1, keepdim=True).clamp(min=1e-20)
        return edited * (torch.linalg.vector_norm(tokens, dim=-1, keepdim=True) / length) - tokens

    def perturbed(self, state: PlanState, timestep: float) -> torch.Tensor | None:
        """What to add to rows that guidance made worse on purpose: what the conditional rows got."""
        self._follows(state, timestep)
        return state.on_conditional

    def _follows(self, state: PlanState, timestep: float) -> None:
        if state.timestep != timestep:
            raise ValueError(
                "This pipeline calls the denoiser for another part of guidance before the conditional one, which "
                "apply_to='contrast' follows. Use apply_to='cond'."
            )

    def _changes(
        self,
        state: PlanState,
        stream: int | None,
        tokens: torch.Tensor,
        timestep: float,
        size: TokenGrid | tuple[int, int] | None,
        apply_to: tuple[str, ...],
        counts: list[Counts] | None = None,
    ) -> list[tuple[_Fold, tuple[torch.Tensor, torch.Tensor]]]:
        """What the folds whose `apply_to` is among these add at this step."""
        self._ready(tokens.device)
        folds = [fold for fold in self.folds if fold.options.apply_to in apply_to]
        step, latents = (state.grid or self.grid).step(timestep, size, state.guidance), None
        if self.reads_of & set(apply_to):
            if self.sae.reads_past and state.tokens.setdefault(stream, tokens.shape[1]) != tokens.shape[1]:
                raise ValueError(
                    f"There were {state.tokens[stream]} tokens at {self.sae.config.site} and are {tokens.shape[1]} "
                    "now: latents that are read from the past of each token cannot follow that."
                )
            if stream not in state.memories:
                state.memories[stream] = self.reader.begin()
            latents = self.reader.read(state.memories[stream], tokens, step)
        acting = [fold for fold in folds if fold.options.acts_at(timestep)]
        return [(fold, fold.change(tokens, latents, step, size, counts, state)) for fold in acting]
