"""The controller: the processor around a denoiser's blocks. It owns the hooks and nothing of the model."""

from __future__ import annotations

import itertools
import threading
import warnings
import weakref
from dataclasses import dataclass, field

import torch
from torch import nn

from .clock import Clock, call_arguments
from .edits import Edit
from .plan import PlanState, SitePlan
from .sites import (
    from_tokens,
    get_site,
    read_activation,
    read_output,
    replace_output,
    spatial_size,
    to_tokens,
    token_grid,
)

# A change ten times as large as the activation leaves that less than 1 % of the energy: whatever follows reads the
# edit and no picture any more.
_OVERWHELMING = 10.0


@dataclass
class _Run:
    """What the controller remembers of the generation that one thread runs."""

    clock: Clock = field(default_factory=Clock)
    generation: int = 0
    states: dict[SitePlan, PlanState] = field(default_factory=dict)

    def state(self, plan: SitePlan) -> PlanState:
        """Of a plan in this generation; raises `ValueError` if its edits do not fit the batch."""
        if plan not in self.states:
            for edit in plan.edits:
                _check_batch(edit, self.clock)
            clock = self.clock
            self.states[plan] = (
                plan.begin(clock.alphas_cumprod, clock.guidance) if clock.pipeline_calls else PlanState()
            )
        return self.states[plan]


class Controller:
    """
    Applies site plans while a denoiser runs. Lives in the denoiser's `__dict__`, so that it follows the denoiser
    through offloading, copying and pipeline conversion without entering its `state_dict`. No plan, no hook.

    Each thread has its own run, so that several may generate with one denoiser.

    Args:
        denoiser (`nn.Module`): the U-Net or transformer.
    """

    def __init__(self, denoiser: nn.Module):
        self.denoiser = denoiser
        self.adapters: dict = {}
        self.enabled = True
        self._plans: dict[str, list[SitePlan]] = {}
        self._hooks: dict = {}
        self._runs: dict[threading.Thread, _Run] = {}
        self._warned = False
        self._register()

    def _register(self) -> None:
        self._handle = next(_handles)
        _controllers[self._handle] = self

    def __getstate__(self) -> dict:
        return vars(self) | {"_runs": {}}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._register()

    def install(self, plans: list[SitePlan], compiled: bool = False) -> None:
        """
        Replace what is applied; plans of one site all see the same, unedited activation.

        Args:
            plans (`list[SitePlan]`): of all sites.
            compiled (`bool`): the denoiser has been compiled as a whole. Compiled code does not notice new hooks, so
                it is thrown away if these change; new strengths need no new code.
        """
        installed: dict[str, list[SitePlan]] = {}
        for plan in plans:
            if plan.edits:
                installed.setdefault(plan.sae.config.site, []).append(plan)
        self._plans, self._warned = installed, False
        wanted = {None, *self._plans} if self._plans else set()
        changed = wanted != self._hooks.keys()
        for site in self._hooks.keys() - wanted:
            self._hooks.pop(site).remove()
        for site in wanted - self._hooks.keys():
            if site is None:
                self._hooks[site] = self.denoiser.register_forward_pre_hook(_TickHook(self), with_kwargs=True)
            else:
                self._hooks[site] = _SiteHook(self, site, get_site(self.denoiser, site))
        compiled = compiled or any(module._compiled_call_impl is not None for module in self.denoiser.modules())
        if changed and compiled:
            torch.compiler.reset()
        for run in list(self._runs.values()):
            run.states = {}

    def restart(self) -> None:
        """Forget the running generations."""
        self._runs.clear()

    @property
    def _run(self) -> _Run:
        thread = threading.current_thread()
        run = self._runs.get(thread)
        if run is None:
            for other in list(self._runs):
                if not other.is_alive():
                    self._runs.pop(other, None)
            run = self._runs[thread] = _Run()
        return run

    def tick(self, sample: torch.Tensor, timestep: torch.Tensor | float, text: torch.Tensor | None) -> None:
        """The denoiser is called."""
        run = self._run
        run.clock.tick(sample, timestep, text)
        if run.clock.generation != run.generation:
            run.generation, run.states = run.clock.generation, {}
            for plan in (plan for plans in self._plans.values() for plan in plans):
                run.state(plan)
        if "cond" in run.clock.streams:  # a cache may leave the block out; then its last change stands
            for state in run.states.values():
                state.timestep = None if state.timestep is None else run.clock.timestep

    def apply(self, site: str, block_input: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the network continues with after the block at `site`; the very same tensor if nothing changes."""
        run, edited, plans = self._run, hidden_states, self._plans.get(site, [])
        clock, rows = run.clock, run.clock.rows(len(hidden_states))
        states = [run.state(plan) for plan in plans]
        order = sorted(range(len(rows)), key=lambda i: rows[i][0] != "cond")  # the others follow what it does
        with torch.autocast(hidden_states.device.type, enabled=False):  # float32 inside, whatever runs around
            for stream in order:
                role, part = rows[stream]
                changes = []
                for plan, state in zip(plans, states, strict=True):
                    tokens = _activation(plan, block_input, hidden_states, part)
                    written = to_tokens(hidden_states[part]) if plan.sae.config.activation == "input" else tokens
                    _check_channels(site, plan.sae.config.in_channels, tokens.shape[-1])
                    masked = any(edit.mask is not None for edit in plan.edits)
                    size = (spatial_size if masked else token_grid)(site, hidden_states.shape, clock.latent_size)
                    if role == "cond":
                        told = len(state.counts)
                        change = plan.conditional(state, tokens, clock.timestep, size, written)
                        changes.append(change)
                        self._tell_size(plan, change, written, state.counts[told:])
                    elif role == "uncond":
                        changes.append(plan.unconditional(state, stream, tokens, clock.timestep, size, written))
                    else:
                        changes.append(plan.perturbed(state, clock.timestep))
                changes = [change for change in changes if change is not None]
                if changes:
                    edited = hidden_states.clone() if edited is hidden_states else edited
                    edited[part] += from_tokens(sum(changes[1:], changes[0]), hidden_states)
            for stream, (role, part) in enumerate(rows):
                for plan, state in zip(plans, states, strict=True):
                    memory = state.memories.get(None if role == "cond" else stream)
                    if memory is not None and memory.is_waiting:
                        memory.continue_with(_activation(plan, block_input, edited, part))
        return edited

    def _tell_size(self, plan: SitePlan, change: torch.Tensor | None, tokens: torch.Tensor, counts: list) -> None:
        """Add to a report how large a change is; warn if no clipping keeps it in bounds and it is huge."""
        if change is None:
            return
        with torch.no_grad():
            size = _relative_size(change, tokens)
        for count in counts:
            count.relative_size = size
        if not self._warned and not all(edit.clip for edit in plan.edits) and size > _OVERWHELMING:
            self._warned = True
            warnings.warn(
                f"The edits at {plan.sae.config.site} are {size:.3g} times as large as the activation they are "
                "added to, of which next to nothing is left. Strength 1.0 is a typical full activation; clip=True "
                "keeps edits in the range of the training data.",
                stacklevel=2,
            )

    def report(self) -> dict[str, list[dict]]:
        """For each site, what each edit did at each step of this thread's last generation."""
        report: dict[str, list[dict]] = {}
        for plan, state in self._run.states.items():
            report.setdefault(plan.sae.config.site, []).extend(state.report)
        return report


def _relative_size(change: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The length of a change `(B, N or 1, d)` over that of the activation `(B, N, d)`, of all tokens it moves."""
    moved = torch.linalg.vector_norm(change, dim=-1).expand(tokens.shape[:2])
    length = torch.linalg.vector_norm(tokens, dim=-1, dtype=torch.float32) * (moved > 0)
    return moved.norm() / length.norm().clamp(min=1e-20)


def _check_batch(edit: Edit, clock: Clock) -> None:
    prompts, images = clock.prompts or clock.images, clock.images
    strengths, masks = len(edit.strength_at(1000)), 1 if edit.mask is None else len(edit.mask)
    for what, given in {"strengths": strengths, "masks": masks}.items():
        if given not in (1, prompts, images) or images % given:
            raise ValueError(f"Expected 1 or as many {what} as prompts ({prompts}), got {given}.")


def _activation(plan: SitePlan, block_input: torch.Tensor, hidden_states: torch.Tensor, rows: slice) -> torch.Tensor:
    """The activation the plan's dictionary is about, `(B, N, d)`."""
    return read_activation(plan.sae.config.activation, block_input[rows], hidden_states[rows])


def check_width(denoiser: nn.Module, site: str, channels: int) -> None:
    """Raise `ValueError` if the module at `site` is known to have another width than `channels`."""
    module = get_site(denoiser, site)
    width = getattr(module, "out_channels", None) or getattr(module, "in_channels", None) or channels
    _check_channels(site, channels, width)


def _check_channels(site: str, expected: int, found: int) -> None:
    if found != expected:
        raise ValueError(f"The dictionary of {site} is for {expected} channels, the model has {found} there.")


class _TickHook:
    """A forward pre-hook of the denoiser that can be copied and pickled with it."""

    def __init__(self, controller: Controller):
        self.controller = controller

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict):
        sample, timestep, text = call_arguments(args, kwargs)
        if not torch.compiler.is_compiling():
            self.controller.tick(sample, timestep, text)
            return None
        timestep = timestep if torch.is_tensor(timestep) else torch.tensor(timestep)
        sample = torch.ops.diffusers_rtsae.tick(sample, timestep, text, self.controller._handle)
        if args:
            return (sample, *args[1:]), kwargs
        return args, kwargs | {"sample" if "sample" in kwargs else "hidden_states": sample}


class _SiteHook:
    """
    Edits what a site returns, by forward hooks that can be copied and pickled with their module.

    A block cache replaces a block's forward, to call the real one or to return what it kept. The edit then belongs
    around the real one: what is kept holds it, once, and a block that is left out is neither read nor edited.
    """

    def __init__(self, controller: Controller, site: str, module: nn.Module):
        self.controller, self.site, self.module = controller, site, module
        self._handles = [
            module.register_forward_pre_hook(self.enter), module.register_forward_hook(self, with_kwargs=True)
        ]  # fmt: skip

    def enter(self, module: nn.Module, args: tuple) -> None:
        """Before the module is called: go inside of what has replaced its forward since the last time."""
        place, name = _real_forward(module)
        forward = place.get(name)
        if isinstance(forward, _EditedForward):
            forward.hook = self
        elif place is not vars(module):
            place[name] = _EditedForward(forward, self)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output):
        place, name = _real_forward(module)
        return output if isinstance(place.get(name), _EditedForward) else self.edit(args, kwargs, output)

    def edit(self, args: tuple, kwargs: dict, output):
        """What the module is to return instead of `output`."""
        block_input = args[0] if args else kwargs["hidden_states"]
        hidden_states = read_output(output)
        if torch.compiler.is_compiling():
            handle = self.controller._handle
            edited = torch.ops.diffusers_rtsae.apply(hidden_states, block_input, self.site, handle)
        else:
            edited = self.controller.apply(self.site, block_input, hidden_states)
        return output if edited is hidden_states else replace_output(output, edited)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        place, name = _real_forward(self.module)
        if isinstance(place.get(name), _EditedForward):
            place[name] = place[name].forward


class _EditedForward:
    """The real forward of a site under a block cache."""

    def __init__(self, forward, hook: _SiteHook):
        self.forward, self.hook = forward, hook

    def __call__(self, *args, **kwargs):
        return self.hook.edit(args, kwargs, self.forward(*args, **kwargs))


def _real_forward(module: nn.Module) -> tuple[dict, str | tuple]:
    """The dictionary, and the key in it, in which a module's own forward is kept by what has replaced it: diffusers'
    hooks or the helper of DeepCache; `vars(module)` if neither has."""
    references = getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", None)
    if references:
        replaced = references[0].original_forward is not None
        return vars(references[0]), "original_forward" if replaced else "forward"
    forward = vars(module).get("forward")
    if getattr(forward, "__qualname__", "").startswith("DeepCacheSDHelper."):
        names = dict(zip(forward.__code__.co_freevars, forward.__closure__, strict=True))
        block = tuple(names[name].cell_contents for name in ("blocktype", "block_name", "block_i", "layer_i"))
        return names["self"].cell_contents.function_dict, block
    return vars(module), "forward"


# Inside compiled code the controller is an operator the compiler does not look into: one graph, and new strengths
# need no new one.
_controllers: weakref.WeakValueDictionary[int, Controller] = weakref.WeakValueDictionary()
_handles = itertools.count()


@torch.library.custom_op("diffusers_rtsae::tick", mutates_args=())
def _tick(sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor | None, handle: int) -> torch.Tensor:
    _controllers[handle].tick(sample, timestep, text)
    return sample.clone()


@torch.library.custom_op("diffusers_rtsae::apply", mutates_args=())
def _apply(hidden_states: torch.Tensor, block_input: torch.Tensor, site: str, handle: int) -> torch.Tensor:
    edited = _controllers[handle].apply(site, block_input, hidden_states)
    return hidden_states.clone() if edited is hidden_states else edited


@_tick.register_fake
def _(sample, timestep, text, handle):
    return torch.empty_like(sample)


@_apply.register_fake
def _(hidden_states, block_input, site, handle):
    return torch.empty_like(hidden_states)
