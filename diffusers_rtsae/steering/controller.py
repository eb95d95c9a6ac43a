"""The controller: which edits of which pipeline act on a denoiser, and what is remembered of running generations."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..denoiser import Arguments, Block, Call, Part, Tap, get_site, noise_schedule, token_grid
from .edits import Edit
from .past import catch_up
from .plan import Counts, PlanState, SitePlan

if TYPE_CHECKING:
    from ..dictionary import Dictionary

# After a change ten times as large as the activation, the activation has less than 1 % of the energy: later layers see
# the edit and hardly any of the picture.
_OVERWHELMING = 10.0
_REPORTED = 4000  # counts per site in a report; calls that no pipeline makes may go on without end


@dataclass
class Adapter:
    """A loaded dictionary, and the weight by which the strengths of its `add` edits are multiplied."""

    dictionary: Dictionary
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class SiteEdit:
    """An edit of a loaded dictionary at one of its sites."""

    adapter: str
    site: str
    edit: Edit


@dataclass(frozen=True, eq=False)
class _Steering:
    """
    A `with` block that steers in the context (thread or asyncio task) that entered it.

    edits (`tuple[SiteEdit, ...]`, *optional*): edits in addition to those that are set; with `None` no edit acts.
    """

    controller: Controller
    edits: tuple[SiteEdit, ...] | None


_Report = dict[str, deque[Counts]]  # by site

_FEATURES = "_rtsae_features"  # in a pipeline's `__dict__`, so that copies have them: the controller and the edits

_steering: ContextVar[tuple[_Steering, ...]] = ContextVar("rtsae_steering", default=())


@dataclass
class _Run:
    """What the controller remembers of one generation."""

    states: dict[tuple, PlanState] = field(default_factory=dict)  # by adapter, site, branch and view
    checked: set[int] = field(default_factory=set)  # ids of plans that fit this generation's batch
    measured: set[int] = field(default_factory=set)  # ids of plans whose change was measured once
    counts: _Report = field(default_factory=dict)
    plans: dict[str, list[tuple[tuple, SitePlan]]] = field(default_factory=dict)  # by site, for this step

    def state(self, key: tuple, plan: SitePlan, part: Part, call: Call) -> PlanState:
        """The state of a plan. Conditional parts with different timesteps have separate states."""
        key = (*key, part.branch if part.role == "cond" else None, call.view)
        if key not in self.states:
            state = PlanState() if call.caller is None else plan.begin(call.alphas_cumprod, call.guidance, call.ahead)
            state.images = call.images if call.in_turns else None
            self.states[key] = state
        return self.states[key]

    def copy(self) -> _Run:
        """An independent copy, whose counts enter no report."""
        return _Run(
            {key: state.copy() for key, state in self.states.items()}, self.checked, self.measured, {}, self.plans
        )


@dataclass
class _Again:
    """Edits sites again as they were edited in an earlier call, for the backward pass."""

    controller: Controller
    run: _Run

    def site(
        self, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """The hidden states that the network continued with after a site."""
        return self.controller._edited(self.run.copy(), name, call, block, block_input, hidden_states)


class Controller:
    """
    Steers the denoiser of a pipeline. It is kept in the denoiser's `__dict__`: so it stays with the denoiser through
    offloading, copying and pipeline conversion, and does not enter the `state_dict`. It has no reference back to the
    denoiser. Without edits that act there are no hooks.

    Dictionaries belong to the denoiser. Features belong to the pipeline they were set on; a pipeline on which none
    were set uses those that were last set on another pipeline of this denoiser. The edits of a `with` block belong to
    the thread or asyncio task that entered it.
    """

    def __init__(self):
        self.adapters: dict[str, Adapter] = {}
        self.enabled = True
        self._default: tuple[SiteEdit, ...] = ()
        self._pipelines: weakref.WeakSet = weakref.WeakSet()  # those with features of their own, see `_FEATURES`
        self._begin()

    def _begin(self) -> None:
        self._tap = Tap(self)
        self._entered: list[_Steering] = []
        self._plans: dict[tuple, tuple[list[tuple[SiteEdit, ...]], list[tuple[str, SitePlan]]]] = {}
        self._counts: dict[threading.Thread, _Report] = {}  # each thread's last generation
        self._last: _Report = {}
        self._runs: weakref.WeakValueDictionary[int, _Run] = weakref.WeakValueDictionary()  # by the id of `counts`
        self._lock = threading.RLock()
        self._installed_by: weakref.ref | None = None  # for calls that no pipeline makes: where their
        self._schedule: torch.Tensor | None = None  # noise schedule is taken from, and the schedule itself for copies
        self._warned = False

    def __getstate__(self) -> dict:
        return {
            "adapters": self.adapters, "enabled": self.enabled, "default": self._default, "tap": self._tap,
            "schedule": self._schedule,
        }  # fmt: skip

    def __setstate__(self, state: dict) -> None:
        self.__init__()
        self.adapters, self.enabled, self._default = state["adapters"], state["enabled"], state["default"]
        self._tap, self._schedule = state["tap"], state["schedule"]

    # Which edits act

    def features(self, pipeline) -> tuple[SiteEdit, ...]:
        """The edits that are set for a pipeline."""
        owner, edits = vars(pipeline).get(_FEATURES, (None, ()))
        if owner is not self:
            return self._default
        self._pipelines.add(pipeline)  # a copy of a pipeline is not registered yet
        return edits

    def _set(self, pipeline, edits: tuple[SiteEdit, ...]) -> None:
        vars(pipeline)[_FEATURES] = self, edits
        self._pipelines.add(pipeline)

    def set_features(self, pipeline, adapter: str, edits: tuple[SiteEdit, ...]) -> None:
        """Replace the edits of one dictionary that are set for a pipeline."""
        others = tuple(one for one in self.features(pipeline) if one.adapter != adapter)
        self._default = (*others, *edits)
        self._set(pipeline, self._default)
        for thread in [*self._counts]:
            self._clear_finished_report(thread)
        self._last = self._last if id(self._last) in self._runs else {}

    def _clear_finished_report(self, thread: threading.Thread) -> None:
        """Drop the report of a thread's last generation, if that is finished: it is about the features set before."""
        if id(self._counts.get(thread)) not in self._runs:
            self._counts[thread] = {}

    def forget(self, adapters: list[str]) -> None:
        """Drop dictionaries and their edits."""
        for name in adapters:
            del self.adapters[name]
        self._default = tuple(one for one in self._default if one.adapter in self.adapters)
        for pipeline in [*self._pipelines]:
            self._set(pipeline, tuple(one for one in self.features(pipeline) if one.adapter in self.adapters))

    @contextlib.contextmanager
    def steering(
        self, denoisers: dict[str, nn.Module], edits: tuple[SiteEdit, ...] | None, pipeline=None
    ) -> Iterator[None]:
        """Add these edits inside the `with` block, in this thread or asyncio task alone; with `None` no edit acts."""
        mine = _Steering(self, edits)
        self._clear_finished_report(threading.current_thread())
        with self._lock:
            self._entered.append(mine)
        _steering.set((*_steering.get(), mine))
        try:
            self.install(denoisers, pipeline)
            yield
        finally:
            _steering.set(tuple(one for one in _steering.get() if one is not mine))
            with self._lock:
                self._entered = [one for one in self._entered if one is not mine]
            self.install(denoisers, pipeline)

    def install(self, denoisers: dict[str, nn.Module], pipeline=None) -> None:
        """Put hooks on the sites where an edit of any pipeline or `with` block may act, and remove all others."""
        with self._lock:
            self._installed_by = None if pipeline is None else weakref.ref(pipeline)
            self._schedule = noise_schedule(getattr(pipeline, "scheduler", None))
            if pipeline is not None:
                self.features(pipeline)
            edits = [*self._default, *(one for owner in [*self._pipelines] for one in self.features(owner))]
            edits += [one for entered in self._entered for one in entered.edits or ()]
            sites = {one.site: None for one in edits if self._acts(one)} if self.enabled else {}
            self._plans, self._warned = {}, False
            self._tap.watch(denoisers, sites or None, pipeline)

    def _acts(self, one: SiteEdit) -> bool:
        adapter = self.adapters.get(one.adapter)
        return adapter is not None and adapter.weight != 0 and not one.edit.is_idle

    def _requested(self, pipeline) -> list[tuple[SiteEdit, ...]]:
        """The edits for a call that this pipeline makes in this thread or asyncio task."""
        edits = [self._default if pipeline is None else self.features(pipeline)]
        for entered in _steering.get():
            if entered.controller is self:
                edits = [] if entered.edits is None else [*edits, entered.edits]
        return edits

    def _planned(self, pipeline) -> list[tuple[str, SitePlan]]:
        """The names of the dictionaries that act, with their plans; cached until the next `install`."""
        requested = self._requested(pipeline)
        key = tuple(map(id, requested))
        if key not in self._plans:
            source = self._installed_by() if pipeline is None and self._installed_by is not None else pipeline
            schedule = self._schedule if source is None else noise_schedule(getattr(source, "scheduler", None))
            groups: dict[tuple[str, str], list[Edit]] = {}
            for one in (one for edits in requested for one in edits if self._acts(one)):
                scaled = one.edit.scaled(self.adapters[one.adapter].weight)
                groups.setdefault((one.adapter, one.site), []).append(scaled)
            planned = [
                (name, SitePlan(self.adapters[name].dictionary.sites[site], group, schedule))
                for (name, site), group in groups.items()
            ]
            self._plans[key] = requested, planned  # keeps the edits alive, so that their ids stay unique
        return self._plans[key][1]

    # What is done while the denoiser runs

    def begin(self, call: Call, arguments: Arguments) -> None:
        """Prepare the edits of a call of the denoiser."""
        planned = self._planned(call.pipeline)
        run = call.generation.memories.get(self)
        if run is None:
            run = call.generation.memories[self] = _Run()
        if call.is_start:
            run.states = {key: state for key, state in run.states.items() if key[-1] != call.view}
        self._remember(run)
        run.plans = {}
        for name, plan in planned:
            if id(plan) not in run.checked:
                for edit in plan.edits:
                    _check_batch(edit, call)
                run.checked.add(id(plan))
            run.plans.setdefault(plan.sae.config.site, []).append(((name, plan.sae.config.site), plan))
        catch_up(run, call, arguments, self._tap)
        for key, state in run.states.items():
            state.guidance, state.images = call.guidance, call.images if call.in_turns else None
            # a cache may skip the block at this step; then its last change still holds
            if key[-1] == call.view and state.timestep is not None and any(part.role == "cond" for part in call.parts):
                state.timestep = call.timestep

    def _remember(self, run: _Run) -> None:
        thread = threading.current_thread()
        if self._counts.get(thread) is not run.counts:
            for other in [other for other in [*self._counts] if not other.is_alive()]:
                self._counts.pop(other, None)
            self._counts[thread], self._runs[id(run.counts)] = run.counts, run
        self._last = run.counts

    def site(
        self, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """The hidden states to continue with after a site; the same tensor if nothing changes."""
        return self._edited(call.generation.memories[self], name, call, block, block_input, hidden_states)

    def _edited(
        self, run: _Run, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        if not run.plans.get(name):
            return hidden_states
        return _Edited(self, run, name, call, block, block_input, hidden_states).result()

    def remember(self, call: Call) -> _Again:
        """An observer that edits the sites of this call again when the backward pass runs them again."""
        return _Again(self, call.generation.memories[self].copy())

    def report(self) -> dict[str, list[dict]]:
        """For each site, what each edit did at each step of this thread's last generation, or else of the last one."""
        counts = self._counts.get(threading.current_thread(), self._last)
        return {site: [row for one in done for row in one.rows()] for site, done in counts.items()}

    def restart(self) -> None:
        """Forget the running generations."""
        self._tap.restart()
        self._counts, self._last = {}, {}

    def warn_of(self, plan: SitePlan, size: torch.Tensor, counts: list[Counts]) -> None:
        """Warn once if an unclipped change is much larger than the activation, or if nothing can be erased."""
        if not self._warned and any(one.everywhere is not None and bool(one.everywhere > 0) for one in counts):
            self._warned = True
            warnings.warn(
                f"What is to be erased is on every token of a picture at {plan.sae.config.site}, which leaves none to "
                "take instead: that picture stays as it is.",
                stacklevel=2,
            )
        if not self._warned and not all(edit.clip for edit in plan.edits) and size > _OVERWHELMING:
            self._warned = True
            warnings.warn(
                f"The edits at {plan.sae.config.site} are {size:.3g} times as large as the activation they are "
                "added to, of which next to nothing is left. Strength 1.0 is a typical full activation; clip=True "
                "keeps edits in the range of the training data.",
                stacklevel=2,
            )


class _Edited:
    """One run of a site, and the changes that plans make to its output."""

    def __init__(
        self, controller: Controller, run: _Run, site: str, call: Call, block: Block, block_input: torch.Tensor,
        hidden_states: torch.Tensor,
    ):  # fmt: skip
        self.controller, self.run, self.site, self.call, self.block = controller, run, site, call, block
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
        if change is not None and change.shape[1] not in (1, written.shape[1]):
            raise ValueError(
                f"The unconditional call has {written.shape[1]} tokens at {self.site}, the conditional one "
                f"{change.shape[1]}: apply_to='contrast' needs as many. Use apply_to='cond'."
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
                self.controller.warn_of(plan, size, counts)
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


def _check_batch(edit: Edit, call: Call) -> None:
    """Raise `ValueError` unless an edit has one strength and one mask, or as many as there are prompts."""
    strengths, masks = len(edit.strength_at(1000)), 1 if edit.mask is None else len(edit.mask)
    if edit.mask is not None and edit.mask.ndim == 4 and edit.mask.shape[1] > 1 >= call.grid.frames:
        raise ValueError(
            f"Expected a mask for a picture, which has one frame, got one for {edit.mask.shape[1]} frames."
        )
    for what, given in {"strengths": strengths, "masks": masks}.items():
        per_frame = what == "masks" and edit.mask is not None and edit.mask.ndim == 3 and call.grid.frames > 1
        expected = given if call.prompts is None else call.prompts
        if (given not in (1, expected, call.images) or call.images % given) and not per_frame:
            raise ValueError(f"Expected 1 or as many {what} as prompts ({call.prompts or call.images}), got {given}.")


def check_width(denoiser: nn.Module, site: str, channels: int) -> None:
    """Raise `ValueError` if the module at `site` reports another width than `channels`."""
    module = get_site(denoiser, site)
    width = getattr(module, "out_channels", None) or getattr(module, "in_channels", None) or channels
    check_channels(site, channels, width)


def check_channels(site: str, expected: int, found: int) -> None:
    """Raise `ValueError` if a dictionary is for another number of channels than the model has."""
    if found != expected:
        raise ValueError(f"The dictionary of {site} is for {expected} channels, the model has {found} there.")
