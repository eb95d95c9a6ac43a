"""Repeat a call of a denoiser with another text, or with other activations at its sites."""

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
_LISTS = nn.ModuleList, nn.ModuleDict  # never called themselves
_SHARED = 2**29  # bytes of outputs before the first site that are kept, at most


def _take(value, batch: int, rows, name: str = ""):
    """Some rows of an argument of the denoiser. An argument that has no batch dimension is returned as it is."""
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
    """The prediction in a denoiser's output, `(rows, ...)`."""
    output = output[0] if isinstance(output, tuple) else output.sample
    return torch.stack(output) if isinstance(output, list) else output


class SharedArguments:
    """Copies of the conditional rows of a denoiser's arguments. Many calls pass the same tensor, such as the text; it
    is copied once."""

    def __init__(self):
        self._copies: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}

    def copy_rows(self, value, batch: int, rows: slice, name: str = ""):
        """`_take` as a copy, so that the other rows can be freed."""

        def copied(original: torch.Tensor) -> torch.Tensor:
            entry = self._copies.get(id(original))
            if entry is None or entry[0]() is not original:
                entry = weakref.ref(original), _take(original, batch, rows, name).clone()
                self._copies[id(original)] = entry
            return entry[1]

        if torch.is_tensor(value):
            return copied(value)
        if isinstance(value, dict):
            return {key: self.copy_rows(inner, batch, rows, key) for key, inner in value.items()}
        return _take(value, batch, rows, name)


@dataclass
class ReplayableCall:
    """The conditional rows of one call of a denoiser, which can be called again."""

    denoiser: nn.Module
    timestep: float  # in training units
    arguments: Arguments
    rows: int

    @classmethod
    def of(
        cls, denoiser: nn.Module, call: Call, arguments: Arguments, shared: SharedArguments
    ) -> ReplayableCall | None:
        """From a call's record and arguments; `None` if the call has no conditional rows."""
        rows = call.rows_of("cond", call.rows)
        if rows is None:
            return None
        args = tuple(shared.copy_rows(value, call.rows, rows) for value in arguments.args)
        kwargs = shared.copy_rows(arguments.kwargs, call.rows, rows)
        conditional = Arguments(arguments.names, args, kwargs, arguments.channels)
        return cls(denoiser, call.timestep, conditional, rows.stop - rows.start)

    def replay(self, samples: Sequence[int], texts: Sequence[int], said: ReplayableCall | None = None) -> torch.Tensor:
        """The prediction for the noisy latents of the rows `samples` with the text, and all other arguments, of the
        rows `texts`; or of these rows of another call, `said`, at whatever timestep."""
        source = self if said is None else said
        names, args, kwargs = source.arguments.names, source.arguments.args, source.arguments.kwargs
        args, kwargs = tuple(_take(value, source.rows, texts) for value in args), _take(kwargs, source.rows, texts)
        sample = _take(self.arguments.sample, self.rows, samples)
        args, kwargs = Arguments(names, args, kwargs).with_sample(sample)
        if said is not None:
            timestep = _take(self.arguments.timestep, self.rows, samples)
            args, kwargs = Arguments(names, args, kwargs).with_timestep(timestep)
        return prediction_of(self.denoiser(*args, **kwargs))


class SharedPrefix:
    """
    Runs the modules before the first of some sites only once for several calls of a denoiser inside the `with` block.
    The calls must have the same arguments and differ only in the changes at the sites. From the second call on, these
    modules return their first outputs, unless the outputs are too large to keep.
    """

    def __init__(self, denoiser: nn.Module, sites: Sequence[str]):
        self._sites = {get_site(denoiser, site) for site in sites}
        self._modules = [*_beside(denoiser, self._sites)] if sites else []

    def __enter__(self) -> SharedPrefix:
        self._outputs: dict[nn.Module, list] = {}
        self._bytes_left, self._turns, self._is_over = _SHARED, Counter(), True
        self._replaced = [(module, vars(module).get("forward")) for module in (*self._modules, *self._sites)]
        for module, _ in self._replaced:
            stand_in = self._run_site if module in self._sites else self._run_or_reuse
            module.forward = _bound(stand_in, module, module.forward)
        return self

    def __exit__(self, *error) -> None:
        for module, forward in self._replaced:
            if forward is None:
                del module.forward
            else:
                module.forward = forward
        self._outputs = {}

    @contextlib.contextmanager
    def reused(self) -> Iterator[None]:
        """Call the denoiser once inside the `with` block."""
        self._turns.clear()
        self._is_over = self._bytes_left < 0
        try:
            yield
        finally:
            self._is_over = True

    def _run_site(self, module: nn.Module, forward: Callable, *args, **kwargs):
        self._is_over = True
        return forward(*args, **kwargs)

    def _run_or_reuse(self, module: nn.Module, forward: Callable, *args, **kwargs):
        if self._is_over:
            return forward(*args, **kwargs)
        outputs, turn = self._outputs.setdefault(module, []), self._turns[module]
        self._turns[module] += 1
        if turn < len(outputs):
            return _copied(outputs[turn])
        output = forward(*args, **kwargs)
        self._bytes_left -= sum(leaf.nbytes for leaf in tree_leaves(output) if torch.is_tensor(leaf))
        if self._bytes_left < 0:
            self._outputs, self._is_over = {}, True
        else:
            outputs.append(_copied(output))  # a later module may write into the output itself
        return output


def _copied(output):
    return tree_map_only(torch.Tensor, torch.clone, output)


def _bound(stand_in: Callable, module: nn.Module, forward: Callable) -> Callable:
    return lambda *args, **kwargs: stand_in(module, forward, *args, **kwargs)


def _beside(module: nn.Module, sites: set[nn.Module]) -> Iterator[nn.Module]:
    """The largest modules inside `module` that contain no site."""
    for child in module.children():
        if child in sites:
            continue
        if not any(inner in sites for inner in child.modules()) and not isinstance(child, _LISTS):
            yield child
        else:
            yield from _beside(child, sites)
