"""The controller: which edits of which pipeline act on a denoiser, and which generations are running."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..denoiser import (
    Arguments,
    Block,
    Call,
    Caller,
    Tap,
    get_denoisers,
    get_site,
    get_text_encoders,
    is_compiled,
    joined_sites,
    noise_schedule,
    split_site,
)
from .edits import Edit
from .past import catch_up
from .plan import Counts, SitePlan
from .run import EditedSite, Report, Run, check_channels
from .texts import halves

if TYPE_CHECKING:
    from ..dictionary import Dictionary

# After a change ten times as large as the activation, the activation has less than 1 % of the energy: later layers see
# the edit and hardly any of the picture.
_OVERWHELMING = 10.0


@dataclass
class Adapter:
    """
    A loaded dictionary.

    dictionary (`Dictionary`): the dictionary.
    weight (`float`): the strengths of its `add` edits are multiplied by it.
    widths (`dict[str, list[int]]`): the widths of what a joined site joins, by its name.
    """

    dictionary: Dictionary
    weight: float = 1.0
    widths: dict[str, list[int]] = field(default_factory=dict)


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
    pipeline (`weakref.ref`, *optional*): the pipeline that it was entered for.
    """

    controller: Controller
    edits: tuple[SiteEdit, ...] | None
    pipeline: weakref.ref | None = None


_FEATURES = "_rtsae_features"  # in a pipeline's `__dict__`, so that copies have them: the controller and the edits

_steering: ContextVar[tuple[_Steering, ...]] = ContextVar("rtsae_steering", default=())


@dataclass
class _Again:
    """Edits sites again as they were edited in an earlier call, for the backward pass."""

    controller: Controller
    run: Run

    def site(
        self, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """The hidden states that the network continued with after a site."""
        return self.controller._edited(self.run.copy(), name, call, block, block_input, hidden_states)


class Controller:
    """
    Steers the denoiser of a pipeline, and its text encoders. It is kept in the denoiser's `__dict__`: so it stays with
    the denoiser through offloading, copying and pipeline conversion, and does not enter the `state_dict`. It has no
    reference back to the denoiser. Without edits that act there are no hooks. A text encoder that other pipelines use
    with another denoiser is as it was for them.

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
        self._texts: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # components of hooked text encoders
        self._encoded: weakref.WeakSet[SiteEdit] = weakref.WeakSet()  # that made embeddings outside of a `__call__`
        self._entered: list[_Steering] = []
        self._plans: dict[tuple, tuple[list[tuple[SiteEdit, ...]], list[tuple[str, SitePlan]]]] = {}
        self._counts: dict[threading.Thread, Report] = {}  # each thread's last generation
        self._last: Report = {}
        self._runs: weakref.WeakValueDictionary[int, Run] = weakref.WeakValueDictionary()  # by the id of `counts`
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
        mine = _Steering(self, edits, None if pipeline is None else weakref.ref(pipeline))
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
            acting = [one for one in edits if self._acts(one)] if self.enabled else []
            sites = {site: None for one in acting for site in joined_sites(one.site)}
            self._plans, self._warned = {}, False
            own = [site for site in sites if not split_site(site)[0]]
            # for the edits of text encoders alone its calls are only watched to warn, which is not worth a compilation
            is_watched = own or sites and not any(is_compiled(one, pipeline) for one in denoisers.values())
            self._tap.watch(denoisers, own if is_watched else None, pipeline)
            self._watch_texts(sites, pipeline)

    def _watch_texts(self, sites: dict[str, None], pipeline) -> None:
        """Put hooks on these sites in the text encoders of all pipelines that have features."""
        pipelines = [pipeline, *self._pipelines, *(one.pipeline() for one in self._entered if one.pipeline)]
        models = dict(self._texts)
        for owner in (one for one in pipelines if one is not None):
            models |= {model: component for component, model in get_text_encoders(owner).items()}
        self._texts.clear()
        for model, component in models.items():
            own, tap = [site for site in sites if split_site(site)[0] == component], Tap.of(self, model)
            if own or tap is not None:
                (tap or Tap(self)).watch({component: model}, own or None, pipeline)
            if own:
                self._texts[model] = component

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
            planned = []
            for (name, site), group in groups.items():
                sae, widths = self.adapters[name].dictionary.sites[site], self.adapters[name].widths.get(site)
                parts = [(sae, group)] if widths is None else halves(sae, group, widths)
                planned += [(name, SitePlan(one, edits, schedule)) for one, edits in parts]
            self._plans[key] = requested, planned  # keeps the edits alive, so that their ids stay unique
        return self._plans[key][1]

    def _is_of(self, pipeline) -> bool:
        """Whether this is the controller of the denoiser of a pipeline. Text encoders may be shared with others."""
        try:
            denoisers = get_denoisers(pipeline)
        except ValueError:
            return False
        return any(vars(one).get("_rtsae_controller") is self for one in denoisers.values())

    # What is done while the denoiser runs

    def begin(self, call: Call, arguments: Arguments) -> None:
        """Prepare the edits of a call of the denoiser, or of a text encoder."""
        is_ours = not call.encoder or call.pipeline is None or self._is_of(call.pipeline)
        planned = self._planned(call.pipeline) if is_ours else []
        run = call.generation.memories.get(self)
        if run is None:
            run = call.generation.memories[self] = Run()
        if call.encoder:
            run.encoded.add(call.encoder)
        elif call.pipeline is not None:
            self._warn_of_embeddings(run, call.pipeline)
        planned = [(name, plan) for name, plan in planned if split_site(plan.sae.config.site)[0] == call.encoder]
        if planned and call.encoder and not call.generation.is_whole:
            self._encoded |= {one for edits in self._requested(call.pipeline) for one in edits}
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
        if not call.encoder:
            catch_up(run, call, arguments, self._tap)
        for key, state in run.states.items():
            state.guidance, state.images = call.guidance, call.images if call.in_turns else None
            # a cache may skip the block at this step; then its last change still holds
            if key[-1] == call.view and state.timestep is not None and any(part.role == "cond" for part in call.parts):
                state.timestep = call.timestep

    def unread(self, caller: Caller | None) -> None:
        """A denoiser is called that is not edited; text encoders may have been."""
        if caller is not None:
            run = caller.generation.memories.setdefault(self, Run())
            self._warn_of_embeddings(run, caller.pipeline)

    def _warn_of_embeddings(self, run: Run, pipeline) -> None:
        """Warn once in a generation if edits act in a text encoder that has not run in it."""
        if run.is_denoising:
            return
        run.is_denoising = True
        requested = {one for edits in self._requested(pipeline) for one in edits if self._acts(one)} - {*self._encoded}
        sites = [site for one in requested for site in joined_sites(one.site)]
        idle = [site for site in sites if split_site(site)[0] not in ("", *run.encoded)]
        if idle:
            warnings.warn(
                f"The features at {idle[0]} change nothing here: {type(pipeline).__name__} was given embeddings, or "
                "a text encoder that it did not have when they were set. Pass `prompt`, or make the embeddings with "
                "`encode_prompt` while the features act.",
                stacklevel=2,
            )

    def _remember(self, run: Run) -> None:
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
        self, run: Run, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        if not run.plans.get(name):
            return hidden_states
        return EditedSite(run, self.warn_of, name, call, block, block_input, hidden_states).result()

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
    """Raise `ValueError` if the module at `site` of a denoiser reports another width than `channels`."""
    module = get_site(denoiser, site)
    width = getattr(module, "out_channels", None) or getattr(module, "in_channels", None) or channels
    check_channels(site, channels, width)
