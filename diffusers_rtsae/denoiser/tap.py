"""
The tap: the only place that registers hooks on a denoiser, to read its sites or to edit what they return.

Hooks are torch's own: they survive offloading, slicing, fused projections and copies, where replacing `forward` does
not. A block cache does replace a block's forward, to call the real one or to return what it kept; the hook then goes
around the real one, so that what is kept holds an edit once, and a block that is left out is neither read nor edited.
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
from .blocks import Block, describe, get_site
from .call import Call, CallReader
from .callers import Generation
from .compile import compiled_begin, compiled_site, is_compiled, register

_alone: ContextVar[Tap | None] = ContextVar("rtsae_alone", default=None)


class Observer(Protocol):
    """Who is told of a denoiser's calls."""

    def begin(self, call: Call, arguments: Arguments) -> None:
        """The denoiser is called."""

    def site(
        self, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor | None:
        """A site was run; what the network is to continue with, `None` or the same tensor for what it returned."""

    def end(self, call: Call, output) -> None:
        """The denoiser returns. Asked only of those who have it."""

    def remember(self, call: Call) -> Observer:
        """Who is to be asked if the backward pass runs a site of this call again, when time has moved on. Asked only
        of those who have it."""


class Tap:
    """
    Watches some sites of one or several denoisers that take turns.

    Args:
        observer (`Observer`): is told of each call, and may edit what sites return. It is not kept alive.
    """

    def __init__(self, observer: Observer):
        self._observer = weakref.ref(observer)
        self._watched: set[tuple[str, str | None]] = set()  # components and their sites; `None` for the denoiser
        self._hooks: weakref.WeakValueDictionary = weakref.WeakValueDictionary()  # their modules keep them
        self._reader = CallReader()
        self._in_place_of: Call | None = None  # the only call that this tap is for
        self._current: dict[int, weakref.ref[Generation]] = {}
        self._calls: weakref.WeakKeyDictionary[Generation, Call] = weakref.WeakKeyDictionary()
        self._runs: list[weakref.ref[_Runs]] = []  # that gradients may repeat, for as long as their graph is
        self.last = _Last()
        self.handle = register(self)

    def __getstate__(self) -> dict:
        return {"hooks": dict(self._hooks), "observer": self._observer()}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["observer"])
        self._hooks = weakref.WeakValueDictionary(state["hooks"])
        self._watched = set(state["hooks"])

    def watch(self, denoisers: dict[str, nn.Module], sites: Iterable[str] | None, pipeline=None) -> None:
        """
        Watch these sites, where a denoiser has them, and no others; `None` to watch nothing at all.

        Code that was compiled without these hooks does not notice them: it is thrown away if they change.

        Args:
            denoisers (`dict[str, nn.Module]`): by the name of their component.
            pipeline (*optional*): theirs, which may have them compiled.

        Raises:
            `ValueError`: no denoiser has a site.
        """
        wanted: dict[tuple[str, str | None], nn.Module] = {}
        for component, denoiser in denoisers.items() if sites is not None else ():
            wanted[component, None] = denoiser
            for site in sites:
                wanted[component, site] = get_site(denoiser, site)
        changed = wanted.keys() != self._watched
        for key in self._watched - wanted.keys():
            self._drop(key)
        for key in [key for key in wanted if key not in self._watched]:
            self._add(*key, wanted[key])
        self._watched = set(wanted)
        if changed and any(is_compiled(denoiser, pipeline) for denoiser in denoisers.values()):
            torch.compiler.reset()

    @contextlib.contextmanager
    def watching(self, denoisers: dict[str, nn.Module], sites: Iterable[str]) -> Iterator[None]:
        """Watch these sites inside the `with` block."""
        self.watch(denoisers, sites)
        try:
            yield
        finally:
            self.watch(denoisers, None)

    def _add(self, component: str, site: str | None, module: nn.Module) -> None:
        kind = _CallHook if site is None else _SiteHook
        self._hooks[component, site] = kind(self, component, site, module)

    def _drop(self, key: tuple[str, str | None]) -> None:
        hook = self._hooks.pop(key, None)  # gone already if its module is
        if hook is not None:
            hook.remove()

    def restart(self) -> None:
        """A call that no pipeline makes begins a new generation."""
        self._reader.restart()

    def begin(self, component: str, arguments: Arguments) -> None:
        """A denoiser is called with these arguments."""
        call = self._reader.read(arguments, component) if self._in_place_of is None else self._in_place_of
        generation = call.generation
        self._current[threading.get_ident()], self._calls[generation] = call.run, call
        self.last.component, self.last.runs = component, None
        if torch.is_grad_enabled() and hasattr(self._observer(), "remember"):
            self.last.runs = _Runs()
        self._observer().begin(call, arguments)

    def end(self, output) -> None:
        """The denoiser returns this."""
        runs, self.last.runs = self.last.runs, None
        node = next((one.grad_fn for one in flat([output]) if torch.is_tensor(one) and one.grad_fn is not None), None)
        if runs is not None and node is not None:
            node.metadata[id(self)] = runs
            self._runs = [run for run in self._runs if run() is not None] + [weakref.ref(runs)]
        if hasattr(self._observer(), "end"):
            self._observer().end(self.call, output)

    @contextlib.contextmanager
    def alone(self, call: Call) -> Iterator[None]:
        """Calls of a denoiser in this context inside the `with` block are made in place of this one: they are told to
        nobody else, and this tap is told of no others."""
        self._in_place_of, token = call, _alone.set(self)
        try:
            yield
        finally:
            _alone.reset(token)

    @property
    def is_asleep(self) -> bool:
        """Whether another tap is to be alone, or this one was and is not any more."""
        alone = _alone.get()
        return alone is not self and (alone is not None or self._in_place_of is not None)

    @property
    def call(self) -> Call | None:
        """The call that runs in this thread, or the last one that did, while its generation lasts."""
        generation = self._current.get(threading.get_ident(), _nothing)()
        return None if generation is None else self._calls.get(generation)

    def edit(self, site: str, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the network continues with after a site."""
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
        """The run of a site that the backward pass repeats: of those that read the same, the last one that was not
        repeated yet."""
        runs = [run for runs in [*self._runs] for run in (runs() or {}).get(site, [])]
        same = [run for run in runs if run.read.shape == read.shape and torch.equal(run.read, read)]
        left = [run for run in same if not run.is_repeated]
        if not left:  # the graph is kept, and gone through again
            for run in same:
                run.is_repeated = False
            left = same
        if not left:
            return None
        left[-1].is_repeated = True
        return left[-1]

    def renew(self, component: str, denoiser: nn.Module) -> None:
        """Follow sites whose module was exchanged for another since the last call."""
        for key in [key for key in self._watched if key[0] == component and key[1] is not None]:
            module, hook = get_site(denoiser, key[1]), self._hooks.get(key)
            if hook is None or hook.module() is not module:
                self._drop(key)
                self._add(*key, module)


@dataclass
class _SiteRun:
    """What is needed to run a site again in the backward pass."""

    read: torch.Tensor  # some values of the tensor that it read
    call: Call
    observer: Observer
    is_repeated: bool = False


class _Runs(dict):
    """Of the sites of a call, by their names: `dict[str, list[_SiteRun]]`. Kept by the graph of its output."""

    __hash__ = object.__hash__


@torch.no_grad()
def _fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    values = tensor.detach().flatten()
    return values[:: max(len(values) // 64, 1)].clone()


def _nothing() -> None:
    return None


class _Last(threading.local):
    """The last call in a thread: the name of its component, the denoiser (but not inside compiled code), and what of
    it gradients may repeat."""

    component = ""
    denoiser: weakref.ref[nn.Module] | Callable[[], None] = staticmethod(_nothing)
    runs: _Runs | None = None


class _Hook:
    """Hooks of one module, which can be copied and pickled with it."""

    def __init__(self, tap: Tap, component: str, site: str | None, module: nn.Module):
        self.tap, self.component, self.site = tap, component, site
        self.module = weakref.ref(module)  # strong it would keep its own module alive
        self._handles = self._register(module)

    def __getstate__(self) -> dict:
        return {**vars(self), "module": _nothing}

    def _register(self, module: nn.Module) -> list:
        return []

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _CallHook(_Hook):
    """On a denoiser itself."""

    def _register(self, module: nn.Module) -> list:
        inner = module.get_base_model() if hasattr(module, "get_base_model") else module  # peft passes on what it gets
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
        if torch._C._current_graph_task_id() != -1:
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
    """On a site."""

    def _register(self, module: nn.Module) -> list:
        self.block = describe(module)
        return [module.register_forward_pre_hook(self.enter), module.register_forward_hook(self, with_kwargs=True)]

    def enter(self, module: nn.Module, args: tuple) -> None:
        """Before the module is called: go inside of what has replaced its forward since the last time."""
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
        """What the module is to return instead of `output`."""
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
    """The real forward of a site under a block cache."""

    def __init__(self, forward, hooks: list[_SiteHook]):
        self.forward, self.hooks = forward, hooks

    def __call__(self, *args, **kwargs):
        output = self.forward(*args, **kwargs)
        for hook in self.hooks:
            output = hook.edit(args, kwargs, output)
        return output


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
