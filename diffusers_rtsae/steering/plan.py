"""All edits of one dictionary at one site, and what they remember of a running generation."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass, field, replace

import torch

from ..denoiser import TimeGrid
from ..models import Memory, SparseDictionary, TokenGrid
from .edits import APPLY_TO, Edit
from .fold import Counts, Fold, fold_edits, read_by, total

_loading = threading.Lock()


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
        self.rows = read_by(self.edits)
        self.apply_to = {edit.apply_to for edit in self.edits}
        self.reads_of = {edit.apply_to for edit in self.edits if edit.read}
        self.renormalises = any(edit.renormalise for edit in self.edits)
        self.device: torch.device | None = None

    @torch.inference_mode(False)  # what is kept may meet autograd later
    @torch.no_grad()
    def _load(self, device: torch.device) -> None:
        self.reader = self.sae.reader(self.rows, device) if self.rows else None
        if self.reader is not None:
            self.reader.prepare()
        if self.reader is not None and self.reader.computes is not None:
            config = self.sae.config
            warnings.warn(
                f"To read some latents of {config.site} all {self.reader.computes:,} are computed, as only the "
                f"largest are active: {self.reader.computes * config.in_channels / 1e6:.3g} million "
                "multiplications a token and step. What is added with clip=False and without `where` reads none.",
                stacklevel=2,
            )
        self.folds = fold_edits(self.edits, self.sae, self.rows, device)
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
        state.contrast = total([change for fold, change in changes if fold.options.apply_to == "contrast"], tokens)
        others = total([change for fold, change in changes if fold.options.apply_to != "contrast"], tokens)
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
        own = total([change for _, change in changes], tokens)
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
    ) -> list[tuple[Fold, tuple[torch.Tensor, torch.Tensor]]]:
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
        return [(own, own.change(tokens, latents, step, counts, state.images, state.denoised)) for own in acting]
