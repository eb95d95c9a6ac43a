"""A running generation: what is remembered of it, and how the edits of a site change the site's output in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..denoiser import Block, Call, Part, token_grid
from .plan import Counts, PlanState, SitePlan

_REPORTED = 4000  # counts per site in a report; calls that no pipeline makes may go on without end

Report = dict[str, deque[Counts]]  # by site


@dataclass
class Run:
    """What the controller remembers of one generation."""

    states: dict[tuple, PlanState] = field(default_factory=dict)  # by adapter, site, branch and view
    checked: set[int] = field(default_factory=set)  # ids of plans that fit this generation's batch
    measured: set[int] = field(default_factory=set)  # ids of plans whose change was measured once
    counts: Report = field(default_factory=dict)
    plans: dict[str, list[tuple[tuple, SitePlan]]] = field(default_factory=dict)  # by site, for this step
    encoded: set[str] = field(default_factory=set)  # the text encoders that have run
    is_denoising: bool = False  # whether the denoiser has been called

    def state(self, key: tuple, plan: SitePlan, part: Part, call: Call) -> PlanState:
        """The state of a plan. Conditional parts with different timesteps have separate states."""
        key = (*key, part.branch if part.role == "cond" else None, call.view)
        if key not in self.states:
            state = PlanState() if call.caller is None else plan.begin(call.alphas_cumprod, call.guidance, call.ahead)
            state.images = call.images if call.in_turns else None
            self.states[key] = state
        return self.states[key]

    def copy(self) -> Run:
        """An independent copy, whose counts enter no report."""
        return Run(
            {key: state.copy() for key, state in self.states.items()}, self.checked, self.measured, {}, self.plans
        )


class EditedSite:
    """
    One call of a site, and the changes that plans make to its output.

    Args:
        run (`Run`): of the generation.
        warn_of (`Callable`): is called with each plan, the size of its change and its counts, once a generation.
    """

    def __init__(
        self, run: Run, warn_of: Callable[[SitePlan, torch.Tensor, list[Counts]], None], site: str, call: Call,
        block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor,
    ):  # fmt: skip
        self.run, self.warn_of, self.site, self.call, self.block = run, warn_of, site, call, block
        self.block_input, self.hidden_states, self.edited = block_input, hidden_states, hidden_states
        self.batch, self.space = block.batch(hidden_states), block.space(hidden_states)
        self.grid = token_grid(call, site, self.batch, self.space)

    def result(self) -> torch.Tensor:
        """The hidden states to continue with."""
        parts = [(part, rows) for part, rows in self.call.parts_of(self.batch) if part.role != "other"]
        parts.sort(key=lambda one: one[0].role != "cond")  # the other branches may use its change
        with torch.autocast(self.hidden_states.device.type, enabled=False):  # computes in float32 inside autocast, too
            for part, rows in parts:
                changes = [self._change(key, plan, part, rows) for key, plan in self.run.plans[self.site]]
                self._add([change for change in changes if change is not None], rows)
            for part, rows in parts:
                for key, plan in self.run.plans[self.site]:
                    branch = None if part.role == "cond" else part.branch  # conditional parts have separate states
                    memory = self.run.state(key, plan, part, self.call).memories.get(branch)
                    if memory is not None and memory.is_waiting:
                        memory.continue_with(self._tokens(plan, rows, self.edited))
        return self.edited

    def _tokens(self, plan: SitePlan, rows: slice, hidden_states: torch.Tensor) -> torch.Tensor:
        """The activation that the plan's dictionary reads, `(B, N, d)`."""
        index = self.block.rows(hidden_states, rows)
        return self.block.activation(plan.sae.config.activation, self.block_input[index], hidden_states[index])

    def _change(self, key: tuple, plan: SitePlan, part: Part, rows: slice) -> torch.Tensor | None:
        """The change that a plan makes to a part, `(B, N or 1, d)`."""
        state, tokens = self.run.state(key, plan, part, self.call), self._tokens(plan, rows, self.hidden_states)
        check_channels(self.site, plan.sae.config.in_channels, tokens.shape[-1])
        state.denoised = self._denoised(rows)
        reads_input = plan.sae.config.activation == "input"
        written = tokens
        if reads_input:
            written = self.block.to_tokens(self.hidden_states[self.block.rows(self.hidden_states, rows)])
        if self.grid is None and any(edit.mask is not None for edit in plan.edits):
            over = self.call.grid
            raise ValueError(
                f"Cannot lay {tokens.shape[1]} tokens of {self.site} out over a {over.height}x{over.width} latent of "
                f"{over.frames} frames; spatial masks need a grid."
            )
        if part.role == "cond":
            change = plan.conditional(state, tokens, part.timestep, self.grid, written)
            self._report(plan, state, change, written)
        elif part.role == "uncond":
            change = plan.unconditional(state, part.branch, tokens, part.timestep, self.grid, written)
        else:
            change = plan.perturbed(state, part.timestep)
        if change is not None and (len(change) != len(written) or change.shape[1] not in (1, written.shape[1])):
            rows = "" if len(change) == len(written) else f" in {len(written)} rows"
            raise ValueError(
                f"The unconditional call has {written.shape[1]} tokens{rows} at {self.site}, the conditional one "
                f"{change.shape[1]}{rows and f' in {len(change)}'}: apply_to='contrast' needs as many. Use "
                "apply_to='cond'."
            )
        return change

    def _denoised(self, rows: slice) -> torch.Tensor | None:
        """1 on tokens that are denoised and 0 on those that are given, `(B, N, 1)`; `None` if all are denoised."""
        given = self.call.given
        return None if given is None or len(given) != self.batch else (~given[rows]).float()[..., None]

    def _report(self, plan: SitePlan, state: PlanState, change: torch.Tensor | None, tokens: torch.Tensor) -> None:
        """Move the counts of a step to the report, with the relative size of the change."""
        counts, state.counts = state.counts, []
        if change is not None:
            with torch.no_grad():
                size = _relative_size(change, tokens)
            for one in counts:
                one.relative_size = size
            if id(plan) not in self.run.measured:  # once per generation, as reading the size waits for the device
                self.run.measured.add(id(plan))
                self.warn_of(plan, size, counts)
        self.run.counts.setdefault(self.site, deque(maxlen=_REPORTED)).extend(counts)

    def _add(self, changes: list[torch.Tensor], rows: slice) -> None:
        if changes:
            if self.edited is self.hidden_states:
                self.edited = self.hidden_states.clone()
            view = self.edited[self.block.rows(self.edited, rows)]
            view += self.block.from_tokens(sum(changes[1:], changes[0]), view)


def _relative_size(change: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The norm of a change `(B, N or 1, d)` relative to that of the activation `(B, N, d)`, on the tokens it moves."""
    moved = torch.linalg.vector_norm(change, dim=-1).expand(tokens.shape[:2])
    length = torch.linalg.vector_norm(tokens.float(), dim=-1) * (moved > 0)
    return torch.linalg.vector_norm(moved) / torch.linalg.vector_norm(length).clamp(min=1e-20)


def check_channels(site: str, expected: int, found: int) -> None:
    """Raise `ValueError` if a dictionary is for another number of channels than the model has."""
    if found != expected:
        raise ValueError(f"The dictionary of {site} is for {expected} channels, the model has {found} there.")
