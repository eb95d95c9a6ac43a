"""Asking a denoiser again what it was asked once: with other text, and with other activations."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..denoiser import Arguments, Call, get_site

_NOT_BATCHED = ("img_ids", "txt_ids")  # positions, the same for all rows
_LISTS = nn.ModuleList, nn.ModuleDict  # are never called themselves
_SHARED = 2**29  # bytes of what a denoiser computes before its sites that are kept, at most


def _take(value, batch: int, rows, name: str = ""):
    """Some rows of whatever in a denoiser's arguments has one for each of its batch."""
    if torch.is_tensor(value) and value.ndim and len(value) == batch and name not in _NOT_BATCHED:
        return value[rows]
    if isinstance(value, dict):
        return {key: _take(inner, batch, rows, key) for key, inner in value.items()}
    if isinstance(value, list) and len(value) == batch and all(torch.is_tensor(one) for one in value):
        return value[rows] if isinstance(rows, slice) else [value[row] for row in rows]
    if isinstance(value, list | tuple):
        return type(value)(_take(inner, batch, rows) for inner in value)
    return value


def prediction_of(output) -> torch.Tensor:
    """The prediction in what a denoiser returned, `(rows, ...)`."""
    output = output[0] if isinstance(output, tuple) else output.sample
    return torch.stack(output) if isinstance(output, list) else output


class Texts:
    """The conditional rows of arguments that many calls share, of which one copy is enough."""

    def __init__(self):
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}

    def own(self, value, batch: int, rows: slice, name: str = ""):
        """`_take`, copied, so that nothing keeps the other rows."""

        def copied(original: torch.Tensor) -> torch.Tensor:
            known = self._known.get(id(original))
            if known is None or known[0]() is not original:
                known = weakref.ref(original), _take(original, batch, rows, name).clone()
                self._known[id(original)] = known
            return known[1]

        if torch.is_tensor(value):
            return copied(value)
        if isinstance(value, dict):
            return {key: self.own(inner, batch, rows, key) for key, inner in value.items()}
        return _take(value, batch, rows, name)


@dataclass
class Asked:
    """What the conditional rows of a denoiser were asked in one call."""

    denoiser: nn.Module
    timestep: float  # in training units
    arguments: Arguments
    rows: int

    @classmethod
    def of(cls, denoiser: nn.Module, call: Call, arguments: Arguments, texts: Texts) -> Asked | None:
        """`None` if it has no conditional rows."""
        rows = call.rows_of("cond", call.rows)
        if rows is None:
            return None
        args = tuple(texts.own(value, call.rows, rows) for value in arguments.args)
        kwargs = texts.own(arguments.kwargs, call.rows, rows)
        own = Arguments(arguments.names, args, kwargs, arguments.channels)
        return cls(denoiser, call.timestep, own, rows.stop - rows.start)

    def replay(self, samples: Sequence[int], texts: Sequence[int]) -> torch.Tensor:
        """The prediction for the noisy latents of some rows and the text, and all else, of others."""
        names, args, kwargs = self.arguments.names, self.arguments.args, self.arguments.kwargs
        args, kwargs = tuple(_take(value, self.rows, texts) for value in args), _take(kwargs, self.rows, texts)
        sample = _take(self.arguments.sample, self.rows, samples)
        args, kwargs = Arguments(names, args, kwargs).with_sample(sample)
        return prediction_of(self.denoiser(*args, **kwargs))


class Beginning:
    """
    What a denoiser computes before the first of some sites, computed once inside the `with` block: calls with the same
    arguments, which differ in nothing but what is changed at the sites, go on from there. The modules before them
    return what they returned the first time, unless that is too much to keep.
    """

    def __init__(self, denoiser: nn.Module, sites: Sequence[str]):
        self._sites = {get_site(denoiser, site) for site in sites}
        self._modules = [*_beside(denoiser, self._sites)] if sites else []

    def __enter__(self) -> Beginning:
        self._kept: dict[nn.Module, list] = {}
        self._room, self._turns, self._is_over = _SHARED, Counter(), True
        self._replaced = [(module, vars(module).get("forward")) for module in (*self._modules, *self._sites)]
        for module, _ in self._replaced:
            stand_in = self._reach if module in self._sites else self._again
            module.forward = _bound(stand_in, module, module.forward)
        return self

    def __exit__(self, *error) -> None:
        for module, forward in self._replaced:
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        self._kept = {}

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The denoiser is called once inside the `with` block."""
        self._turns.clear()
        self._is_over = self._room < 0
        try:
            yield
        finally:
            self._is_over = True

    def _reach(self, module: nn.Module, forward: Callable, *args, **kwargs):
        self._is_over = True
        return forward(*args, **kwargs)

    def _again(self, module: nn.Module, forward: Callable, *args, **kwargs):
        if self._is_over:
            return forward(*args, **kwargs)
        kept, turn = self._kept.setdefault(module, []), self._turns[module]
        self._turns[module] += 1
        if turn < len(kept):
            return _copied(kept[turn])
        output = forward(*args, **kwargs)
        self._room -= sum(one.nbytes for one in tree_leaves(output) if torch.is_tensor(one))
        if self._room < 0:
            self._kept, self._is_over = {}, True
        else:
            kept.append(_copied(output))  # what comes later may write into it
        return output


def _copied(output):
    return tree_map_only(torch.Tensor, torch.clone, output)


def _bound(stand_in: Callable, module: nn.Module, forward: Callable) -> Callable:
    return lambda *args, **kwargs: stand_in(module, forward, *args, **kwargs)


def _beside(module: nn.Module, sites: set[nn.Module]) -> Iterator[nn.Module]:
    """The largest modules inside of one that hold no site."""
    for child in module.children():
        if child in sites:
            continue
        if not any(inner in sites for inner in child.modules()) and not isinstance(child, _LISTS):
            yield child
        else:
            yield from _beside(child, sites)
