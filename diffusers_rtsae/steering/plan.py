"""`SitePlan`: all edits of one dictionary at one site, ready to be applied, and what they remember of a generation."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass, field, replace

import torch

from ..denoiser import TimeGrid
from ..models import Memory, SparseDictionary, TokenGrid
from .edits import APPLY_TO, Edit
from .fold import Change, Counts, Erasure, Fold, Seen, fold_edits, read_by, total

_loading = threading.Lock()


@dataclass
class PlanState:
    """What a plan remembers of one running generation."""

    grid: TimeGrid | None = None  # for this generation's noise schedule, if it is not the plan's
    guidance: float | None = None  # the guidance scale, if it is known
    images: int | None = None  # their number, if consecutive images are of different prompts in turn
    denoised: torch.Tensor | None = None  # 1, and 0 on tokens that are given instead of denoised, `(B, N, 1)`
    memories: dict[int | None, Memory] = field(default_factory=dict)  # by guidance branch, the conditional: None
    tokens: dict[int | None, int] = field(default_factory=dict)  # number of tokens by guidance branch
    timestep: float | None = None  # of the conditional call, whose changes the other branches of a step use:
    on_conditional: torch.Tensor | None = None
    contrast: torch.Tensor | None = None
    seen: dict[int, Seen] = field(default_factory=dict)  # by index of the fold
    counts: list[Counts] = field(default_factory=list)
    ahead: tuple[float, ...] = ()  # the timesteps of the generation, if they are known

    def copy(self) -> PlanState:
        """An independent copy of the present state, with an empty report."""
        memories = {key: memory.copy() for key, memory in self.memories.items()}
        seen = {key: replace(one) for key, one in self.seen.items()}
        return replace(self, memories=memories, seen=seen, counts=[])

    @property
    def report(self) -> list[dict]:
        """What each edit did at each step; see `rtsae_report` for the keys."""
        return [row for counts in self.counts for row in counts.rows()]


class SitePlan:
    """
    All edits of one dictionary at one site, ready to be applied. The state of a generation is in a [`PlanState`].

    Args:
        sae (`SparseDictionary`): the dictionary. Only the rows that are edited or read are taken from it, if its kind
            can read latents alone.
        edits (`list[Edit]`): what to change; idle edits are dropped.
        alphas_cumprod (`torch.Tensor`, *optional*): noise schedule for calls that no pipeline makes; see `begin` for
            all others.
    """

    def __init__(self, sae: SparseDictionary, edits: list[Edit], alphas_cumprod: torch.Tensor | None):
        self.sae, self.edits = sae, [edit for edit in edits if not edit.is_idle]
        self.grid = TimeGrid(sae.config.anchors, alphas_cumprod)
        self.rows = read_by(self.edits)
        self.apply_to = {edit.apply_to for edit in self.edits}
        self.reads_of = {"cond" if edit.exchanges else edit.apply_to for edit in self.edits if edit.read}
        self.follows = any(edit.apply_to == "contrast" or edit.exchanges_all for edit in self.edits)
        self.renormalises = any(edit.renormalise for edit in self.edits)
        self.device: torch.device | None = None
        self._prepared: tuple[float, ...] = ()  # timesteps

    @torch.inference_mode(False)  # cached tensors may be used with autograd later
    @torch.no_grad()
    def _load(self, device: torch.device) -> None:
        self.reader = self.sae.reader(self.rows, device) if self.rows else None
        if self.reader is not None and self.reader.computes is not None:
            config = self.sae.config
            warnings.warn(
                f"To read some latents of {config.site} all {self.reader.computes:,} are computed, as only the "
                f"largest are active: {self.reader.computes * config.in_channels / 1e6:.3g} million "
                "multiplications per token and step. An `add` edit with clip=False and without `where` reads none.",
                stacklevel=2,
            )
        self.folds = fold_edits(self.edits, self.sae, self.rows, device)
        self.device, self._prepared = device, ()

    def begin(
        self, alphas_cumprod: torch.Tensor | None, guidance: float | None, ahead: tuple[float, ...] = ()
    ) -> PlanState:
        """The state of a new generation with its own noise schedule and guidance scale; `ahead` are its timesteps."""
        return PlanState(TimeGrid(self.sae.config.anchors, alphas_cumprod), guidance, ahead=ahead)

    def reads(self, role: str) -> bool:
        """Whether latents are read on rows with this role."""
        return bool(self.reads_of) if role == "cond" else "all" in self.reads_of

    def recall(
        self, state: PlanState, branch: int | None, tokens: torch.Tensor, timestep: float, size: TokenGrid | None
    ) -> None:
        """Remember the activation `(B, N, d)` of a guidance branch at a timestep before the first step."""
        self._ready(tokens.device)
        memory = state.memories.setdefault(branch, self.reader.begin())
        self.reader.read(memory, tokens, (state.grid or self.grid).step(timestep, size, state.guidance))
        memory.continue_with(tokens)

    def _ready(self, device: torch.device) -> None:
        if self.device != device:
            with _loading:  # all threads use what one of them loads
                if self.device != device:
                    self._load(device)

    def _prepare(self, state: PlanState) -> None:
        """Have on the device what the steps of a generation need to read latents, before the second one."""
        if state.ahead != self._prepared:
            grid = state.grid or self.grid
            self.reader.prepare([grid.coordinate(timestep) for timestep in state.ahead])
            self._prepared = state.ahead

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
            state (`PlanState`): the state of the generation.
            tokens (`torch.Tensor`): activations that the dictionary reads on these rows, `(B, N, d)`.
            timestep (`float`): in training units.
            size (`TokenGrid`, *optional*): token grid; needed for masks and by some kinds of dictionary.
            written (`torch.Tensor`, *optional*): the activation that is changed, if another one is read; by default
                `tokens`.

        Returns:
            the change `(B, N or 1, d)` in float32, or `None` if there is none.
        """
        changes = self._changes(state, None, tokens, timestep, size, APPLY_TO, state.counts)
        state.timestep = timestep
        state.contrast = total([change for fold, change in changes if fold.options.apply_to == "contrast"], tokens)
        others = total([change for fold, change in changes if fold.options.apply_to != "contrast"], tokens)
        parts = [part for part in (state.contrast, others) if part is not None]
        state.on_conditional = self._renormalised(sum(parts[1:], parts[0]), tokens, written) if parts else None
        return state.on_conditional

    def unconditional(
        self,
        state: PlanState,
        branch: int,
        tokens: torch.Tensor,
        timestep: float,
        size: TokenGrid | tuple[int, int] | None,
        written: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """What to add to the rows of an unconditional guidance branch. Call `conditional` for the step first."""
        if self.follows:
            self._check_order(state, timestep)
        changes = self._changes(state, branch, tokens, timestep, size, ("all",)) if "all" in self.apply_to else []
        direct = total([change for _, change in changes], tokens)
        parts = [part for part in (direct, None if state.contrast is None else -state.contrast) if part is not None]
        return self._renormalised(sum(parts[1:], parts[0]), tokens, written) if parts else None

    def _renormalised(self, change: torch.Tensor, tokens: torch.Tensor, written: torch.Tensor | None) -> torch.Tensor:
        """The change, altered so that tokens keep their length, if an edit asks to renormalise."""
        if not self.renormalises:
            return change
        tokens = (tokens if written is None else written).float()
        edited = tokens + change
        length = torch.linalg.vector_norm(edited, dim=-1, keepdim=True).clamp(min=1e-20)
        return edited * (torch.linalg.vector_norm(tokens, dim=-1, keepdim=True) / length) - tokens

    def perturbed(self, state: PlanState, timestep: float) -> torch.Tensor | None:
        """What to add to the rows of a perturbed guidance branch: the same change as to the conditional rows."""
        self._check_order(state, timestep)
        return state.on_conditional

    def _check_order(self, state: PlanState, timestep: float) -> None:
        """Raise `ValueError` unless `conditional` was called for this step."""
        if state.timestep != timestep:
            raise ValueError(
                "This pipeline calls the denoiser for another guidance branch before the conditional one, which "
                "apply_to='contrast' and operation='erase' need first. Use apply_to='cond'."
            )

    def _changes(
        self,
        state: PlanState,
        branch: int | None,
        tokens: torch.Tensor,
        timestep: float,
        size: TokenGrid | tuple[int, int] | None,
        apply_to: tuple[str, ...],
        counts: list[Counts] | None = None,
    ) -> list[tuple[Fold, Change]]:
        """What the folds with one of these `apply_to` add to a guidance branch at this step."""
        self._ready(tokens.device)
        step, latents = (state.grid or self.grid).step(timestep, size, state.guidance), None
        if self.reads_of & set(apply_to):
            if self.sae.reads_past and state.tokens.setdefault(branch, tokens.shape[1]) != tokens.shape[1]:
                raise ValueError(
                    f"Expected {state.tokens[branch]} tokens at {self.sae.config.site} as at the step before, got "
                    f"{tokens.shape[1]}: this dictionary reads a token's latents from its earlier activations."
                )
            if branch not in state.memories:
                state.memories[branch] = self.reader.begin()
                self._prepare(state)
            latents = self.reader.read(state.memories[branch], tokens, step)
        changes: list[tuple[Fold, Change]] = []
        for index, fold in enumerate(self.folds):
            if fold.options.apply_to not in apply_to:
                continue
            own = {}
            if isinstance(fold, Erasure):
                own = {"seen": state.seen.setdefault(index, Seen())}
                if branch is None:
                    fold.look(latents, tokens, **own)  # before the edit's window, too
            if not fold.options.acts_at(timestep):
                continue
            if own and branch is not None:
                changes.append((fold, fold.exchange(tokens, **own)))
            else:
                change = fold.change(tokens, latents, step, counts, state.images, state.denoised, **own)
                changes.append((fold, change))
        return changes
