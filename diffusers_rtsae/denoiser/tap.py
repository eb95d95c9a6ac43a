"""
The tap: the only code that registers hooks on a denoiser or text encoder, to read its sites or to edit what they
return.

These are torch's forward hooks. Unlike a replaced `forward` they survive offloading, slicing, fused projections and
copies. A block cache, however, replaces a block's `forward` by one that either calls the real one or returns a cached
result. The hook is then put around the real `forward`: so a cached result holds an edit once, and a skipped block is
neither read nor edited.

In a text encoder hooks come before those that are there. transformers collects hidden states by hooks of its own, put
on the layers when they are first asked for, and pipelines that take such a hidden state are to get the edited one.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from .arguments import Arguments, flat
from .blocks import TEXT_ENCODERS, Block, describe, get_site, split_site
from .call import Call, CallReader
from .callers import Caller, Generation, find_caller
from .compile import compiled_begin, compiled_site, is_compiled, register

_alone: ContextVar[Tap | None] = ContextVar("rtsae_alone", default=None)


class Observer(Protocol):
    """What a [`Tap`] reports the calls of a denoiser to."""

    def begin(self, call: Call, arguments: Arguments) -> None:
        """Called before the denoiser runs."""

    def site(
        self, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor | None:
        """Called after a site has run. Returns the hidden states to continue with; `None` to leave them unchanged."""

    def end(self, call: Call, output) -> None:
        """Called with the output of the denoiser. Optional."""

    def unread(self, caller: Caller | None) -> None:
        """Called instead of `begin` before a denoiser runs of which no site is watched. Optional."""

    def remember(self, call: Call) -> Observer:
        """An observer for the sites of this call that the backward pass runs again later (gradient checkpointing).
        Optional."""


class Tap:
    """
    Watches some sites of one or several denoisers or text encoders of a pipeline.

    Args:
        observer (`Observer`): gets a record of each call, and may edit what sites return. The tap holds a weak
            reference to it, and its hooks are removed when it is freed: the model may live on in another pipeline.
    """

    def __init__(self, observer: Observer):
        own = weakref.WeakMethod(self._drop_all)
        self._observer = weakref.ref(observer, lambda _: (drop := own()) and drop())
        self._watched: set[tuple[str, str | None]] = set()  # component and site; site `None` is the denoiser itself
        self._hooks: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # kept alive by their modules
        self._reader = CallReader()
        self._in_place_of: Call | None = None  # the call whose record all calls of this tap get, see `alone`
        self._current: dict[int, weakref.ref[Generation]] = {}
        self._calls: weakref.WeakKeyDictionary[Generation, Call] = weakref.WeakKeyDictionary()
        self._runs: list[weakref.ref[_Runs]] = []  # that a backward pass may repeat
        self.last = _Last()
        self.handle = register(self)

    def __getstate__(self) -> dict:
        return {"hooks": dict(self._hooks), "observer": self._observer()}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["observer"])
        self._hooks = weakref.WeakValueDictionary(state["hooks"])
        self._watched = set(state["hooks"])

    def watch(self, models: dict[str, nn.Module], sites: Iterable[str] | None, pipeline=None) -> None:
        """
        Watch these sites of each denoiser, those in a text encoder of that one, and no others.

        Compiled code does not notice hooks that are added or removed later, so it is discarded if the hooks change.

        Args:
            models (`dict[str, nn.Module]`): denoisers and text encoders by the name of their component.
            sites (`Iterable[str]`, *optional*): paths of the sites; `None` to watch nothing, not even the calls.
            pipeline (*optional*): their pipeline, whose components may be compiled.

        Raises:
            `ValueError`: a model lacks one of the sites.
        """
        sites = None if sites is None else list(sites)
        for site in sites or ():
            if split_site(site)[0] not in ("", *models):
                raise ValueError(
                    f"{site} lies in a text encoder, which runs once, before denoising. It can be steered, recorded, "
                    "and read by `analysis.prompts.read_prompt`; this needs a site of the denoiser."
                )
        targets: dict[tuple[str, str | None], nn.Module] = {}
        for component, model in models.items() if sites is not None else ():
            text_encoder = component if component in TEXT_ENCODERS else ""
            own = [site for site in sites if split_site(site)[0] == text_encoder]
            if own or not text_encoder:
                targets[component, None] = model
            for site in own:
                targets[component, site] = get_site(model, site)
        changed = targets.keys() != self._watched
        for key in self._watched - targets.keys():
            self._drop(key)
        for key in [key for key in targets if key not in self._watched]:
            self._add(*key, targets[key])
        self._watched = set(targets)
        if changed and any(is_compiled(model, pipeline) for model in models.values()):
            torch.compiler.reset()

    @contextlib.contextmanager
    def watching(self, models: dict[str, nn.Module], sites: Iterable[str]) -> Iterator[None]:
        """Watch these sites inside the `with` block."""
        self.watch(models, sites)
        try:
            yield
        finally:
            self.watch(models, None)

    @classmethod
    def of(cls, observer: Observer, model: nn.Module) -> Tap | None:
        """The tap of an observer that watches the calls of a model, found by its hook: a copy of the model has a copy
        of it."""
        hooks = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
        taps = (hook.tap for hook in hooks if isinstance(hook, _CallHook))
        return next((tap for tap in taps if isinstance(tap, cls) and tap._observer() is observer), None)

    def _add(self, component: str, site: str | None, module: nn.Module) -> None:
        kind = _CallHook if site is None else _SiteHook
        self._hooks[component, site] = kind(self, component, site, module)

    def _drop(self, key: tuple[str, str | None]) -> None:
        hook = self._hooks.pop(key, None)  # `None` if its module was freed
        if hook is not None:
            hook.remove()

    def _drop_all(self) -> None:
        for key in [*self._watched]:
            self._drop(key)

    @property
    def has_sites(self) -> bool:
        """Whether more is watched than calls."""
        return any(site is not None for _, site in self._watched)

    def restart(self) -> None:
        """Let the next call that no pipeline makes begin a generation."""
        self._reader.restart()

    def begin(self, component: str, arguments: Arguments) -> None:
        """Record that a model is called with these arguments, and tell the observer."""
        unread = getattr(self._observer(), "unread", None)
        if unread is not None and not self.has_sites:
            unread(find_caller())
            return
        call = self._reader.read(arguments, component) if self._in_place_of is None else self._in_place_of
        generation = call.generation
        self._current[threading.get_ident()], self._calls[generation] = call.run, call
        self.last.component, self.last.runs = component, None
        if torch.is_grad_enabled() and hasattr(self._observer(), "remember"):
            self.last.runs = _Runs()
        self._observer().begin(call, arguments)

    def end(self, output) -> None:
        """Tell the observer that the denoiser returned this."""
        runs, self.last.runs = self.last.runs, None
        node = next((one.grad_fn for one in flat([output]) if torch.is_tensor(one) and one.grad_fn is not None), None)
        if runs is not None and node is not None:
            node.metadata[id(self)] = runs
            self._runs = [run for run in self._runs if run() is not None] + [weakref.ref(runs)]
        if hasattr(self._observer(), "end"):
            self._observer().end(self.call, output)

    @contextlib.contextmanager
    def alone(self, call: Call) -> Iterator[None]:
        """Inside the `with` block, calls of a denoiser in this thread or asyncio task are reported to this tap only,
        with the record of `call`. Other calls are not reported to this tap."""
        self._in_place_of, token = call, _alone.set(self)
        try:
            yield
        finally:
            _alone.reset(token)

    @property
    def is_asleep(self) -> bool:
        """Whether this tap must ignore a call: another tap is `alone` now, or this one was so before."""
        alone = _alone.get()
        return alone is not self and (alone is not None or self._in_place_of is not None)

    @property
    def call(self) -> Call | None:
        """The running call of this thread, or else its last one, until the generation is over."""
        generation = self._current.get(threading.get_ident(), _nothing)()
        return None if generation is None else self._calls.get(generation)

    def edit(self, site: str, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """The hidden states to continue with after a site."""
        call, observer = self.call, self._observer()
        if torch._C._current_graph_task_id() != -1:  # gradient checkpointing runs the site again
            again = self._again(site, _fingerprint(block_input))
            call, observer = (again.call, again.observer) if again else (None, None)
        elif call is not None and self.last.runs is not None:
            run = _SiteRun(_fingerprint(block_input), call, observer.remember(call))
            self.last.runs.setdefault(site, []).append(run)
        edited = call and observer.site(site, call, block, block_input, hidden_states)
        return hidden_states if edited is None else edited

    def _again(self, site: str, read: torch.Tensor) -> _SiteRun | None:
        """The run of a site that the backward pass repeats: the last one with the same input that was not repeated
        yet."""
        runs = [run for runs in [*self._runs] for run in (runs() or {}).get(site, [])]
        same = [run for run in runs if run.read.shape == read.shape and torch.equal(run.read, read)]
        remaining = [run for run in same if not run.is_repeated]
        if not remaining:  # the graph was kept for another backward pass
            for run in same:
                run.is_repeated = False
            remaining = same
        if not remaining:
            return None
        remaining[-1].is_repeated = True
        return remaining[-1]

    def renew(self, component: str, denoiser: nn.Module) -> None:
        """Move the hooks of sites whose module was replaced by another since the last call."""
        for key in [key for key in self._watched if key[0] == component and key[1] is not None]:
            module, hook = get_site(denoiser, key[1]), self._hooks.get(key)
            if hook is None or hook.module() is not module:
                self._drop(key)
                self._add(*key, module)


@dataclass
class _SiteRun:
    """What is needed to run a site again in the backward pass."""

    read: torch.Tensor  # some values of its input
    call: Call
    observer: Observer
    is_repeated: bool = False


class _Runs(dict):
    """The runs of the sites of a call, `dict[str, list[_SiteRun]]`; kept alive by the autograd graph of its output."""

    __hash__ = object.__hash__


@torch.no_grad()
def _fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    values = tensor.detach().flatten()
    return values[:: max(len(values) // 64, 1)].clone()


def _nothing() -> None:
    return None


class _Last(threading.local):
    """The last call in a thread: the name of its component, the denoiser (unless in compiled code), and the runs that
    a backward pass may repeat."""

    component = ""
    denoiser: weakref.ref[nn.Module] | Callable[[], None] = staticmethod(_nothing)
    runs: _Runs | None = None


class _Hook:
    """The hooks of one module. They can be copied and pickled with the module."""

    def __init__(self, tap: Tap, component: str, site: str | None, module: nn.Module):
        self.tap, self.component, self.site = tap, component, site
        self.module = weakref.ref(module)  # a strong reference would keep the module alive
        self._handles = self._register(module)

    def __getstate__(self) -> dict:
        return {**vars(self), "module": _nothing}

    def _register(self, module: nn.Module) -> list:
        return []

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _CallHook(_Hook):
    """The hooks of a denoiser or text encoder itself."""

    def _register(self, module: nn.Module) -> list:
        inner = module.get_base_model() if hasattr(module, "get_base_model") else module  # peft wraps its denoisers
        self.names = [*inspect.signature(type(inner).forward).parameters][1:]
        self.channels = getattr(getattr(module, "config", None), "in_channels", None)
        handles = [module.register_forward_pre_hook(self.begin, with_kwargs=True)]
        if any(hasattr(self.tap._observer(), name) for name in ("end", "remember")):
            handles.append(module.register_forward_hook(self.end))
        return handles

    def begin(self, module: nn.Module, args: tuple, kwargs: dict):
        arguments = Arguments(self.names, args, kwargs, self.channels)
        if torch.compiler.is_compiling():
            return arguments.with_sample(compiled_begin(arguments, self.component, self.tap.handle))
        if self.tap.is_asleep:
            return None
        if torch._C._current_graph_task_id() != -1 and self.tap.has_sites:
            raise ValueError(
                "The backward pass calls the denoiser again, and an edit cannot know as which call: have its blocks "
                "checkpointed, by `enable_gradient_checkpointing`, instead of the whole."
            )
        self.tap.last.denoiser = self.module
        self.tap.renew(self.component, module)
        self.tap.begin(self.component, arguments)
        return None

    def end(self, module: nn.Module, args: tuple, output) -> None:
        if not torch.compiler.is_compiling() and not self.tap.is_asleep:
            self.tap.end(output)


class _SiteHook(_Hook):
    """The hooks of a site."""

    def _register(self, module: nn.Module) -> list:
        self.block, first = describe(module), self.component in TEXT_ENCODERS
        after = module.register_forward_hook(self, with_kwargs=True, prepend=first)
        return [module.register_forward_pre_hook(self.enter), after]

    def enter(self, module: nn.Module, args: tuple) -> None:
        """Called before the module. If its `forward` was replaced since the last call, move around the real one."""
        place, name = _real_forward(module)
        forward = place.get(name)
        if isinstance(forward, _TappedForward):
            if not any(hook is self for hook in forward.hooks):
                forward.hooks.append(self)
        elif place is not vars(module):
            place[name] = _TappedForward(forward, [self])

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output):
        place, name = _real_forward(module)
        return output if isinstance(place.get(name), _TappedForward) else self.edit(args, kwargs, output)

    def edit(self, args: tuple, kwargs: dict, output):
        """What the module returns instead of `output`."""
        if not torch.compiler.is_compiling() and self.tap.is_asleep:
            return output
        block_input, hidden_states = self.block.input(args, kwargs), self.block.output(output)
        if torch.compiler.is_compiling():
            edited = compiled_site(self.site, self.block, block_input, hidden_states, self.tap.handle)
        else:
            edited = self.tap.edit(self.site, self.block, block_input, hidden_states)
        return output if edited is hidden_states else self.block.returning(output, edited)

    def remove(self) -> None:
        super().remove()
        module = self.module()
        place, name = ({}, "") if module is None else _real_forward(module)
        forward = place.get(name)
        if isinstance(forward, _TappedForward):
            forward.hooks = [hook for hook in forward.hooks if hook is not self]
            if not forward.hooks:
                place[name] = forward.forward


class _TappedForward:
    """The real `forward` of a site that a block cache has replaced, followed by hooks."""

    def __init__(self, forward, hooks: list[_SiteHook]):
        self.forward, self.hooks = forward, hooks

    def __call__(self, *args, **kwargs):
        output = self.forward(*args, **kwargs)
        for hook in self.hooks:
            output = hook.edit(args, kwargs, output)
        return output


def _real_forward(module: nn.Module) -> tuple[dict, str | tuple]:
    """The dictionary and the key under which a module's real `forward` is kept, if diffusers' hooks or DeepCache have
    replaced it; otherwise `vars(module)` and `"forward"`."""
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
