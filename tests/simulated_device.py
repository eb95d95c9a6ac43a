"""
A device that is not the CPU, simulated on the CPU, so that code for accelerators can be tested where there is none.

    with simulated() as device:
        pipe.to(device.name)
        pipe("a heart")
        print(device.kinds, device.lines)

A tensor of the device holds one of the CPU, on which operations run, so that results are the CPU's. As on CUDA,
operands of two devices raise, but for indices that lie on the host, and numbers (tensors without dimensions) there
where elements are computed; so does a generator of another device. Counted is where the host must wait for the device,
and what travels between them:

    "wait"      the host needs a value: `item`, `tolist`, `bool`, `nonzero`, a mask as index, `torch.equal`, ...
    "download"  device to host, for which the host waits too
    "upload"    host to device, for which CUDA waits as well unless memory is pinned: `to`, `torch.tensor(...,
                device=...)`, an index that is a list or lies on the host
    "transfer"  from "simulated:0" to "simulated:1" or back; these are two devices, but only the first has gradients

What it cannot show: numerics other than the CPU's (kernels, reduced precision; random numbers are the CPU's too),
streams and all that is asynchronous, memory, and speed. Nor can a tensor move by an assignment to its `data`, as
diffusers' group offloading does it.

PyTorch has room for one backend of this sort in a process. Importing this module registers it for good; it says that
it is available, and counts, inside a `with` block only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

NAME = "simulated"
_OURS = [Path(importlib.util.find_spec(name).origin).parent for name in ("diffusers_rtsae", "training")]
_THEIRS = tuple(  # what somebody else does, even if a function of ours called it
    f"-packages/{part}/"
    for part in (
        "diffusers/pipelines", "diffusers/modular_pipelines", "diffusers/schedulers", "diffusers/models/unets",
        "diffusers/models/transformers", "diffusers/models/autoencoders", "transformers", "accelerate",
    )
)  # fmt: skip
_entered: list[SimulatedDevice] = []


class SimulatedDevice:
    """
    What was counted since the last `reset`.

    kinds (`Counter`): how often, by kind, whoever did it.
    lines (`Counter`): how often the package itself did it, by `"kind file:line function: source"`.
    """

    name = NAME

    def __init__(self):
        self.kinds: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()

    def reset(self) -> None:
        self.kinds.clear()
        self.lines.clear()

    @property
    def own(self) -> Counter[str]:
        """How often the package itself did it, by kind."""
        kinds: Counter[str] = Counter()
        for line, count in self.lines.items():
            kinds[line.split()[0]] += count
        return kinds

    def _note(self, kind: str) -> None:
        self.kinds[kind] += 1
        line = _line()
        if line is not None:
            self.lines[f"{kind} {line}"] += 1


@contextlib.contextmanager
def simulated() -> Iterator[SimulatedDevice]:
    """Count what happens on the simulated device inside the `with` block."""
    device = SimulatedDevice()
    _entered.append(device)
    try:
        yield device
    finally:
        _entered.remove(device)


def _note(kind: str) -> None:
    for device in _entered:
        device._note(kind)


def _line() -> str | None:
    """The innermost line of the package on the stack, unless somebody else's work lies between."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if any(part in file for part in _THEIRS):
            return None
        for folder in _OURS:
            if file.startswith(f"{folder}/"):
                place = f"{Path(file).relative_to(folder.parent)}:{frame.f_lineno} {frame.f_code.co_name}"
                return f"{place}: {linecache.getline(file, frame.f_lineno).strip()}"
        frame = frame.f_back
    return None


class SimulatedTensor(torch.Tensor):
    """A tensor of the simulated device; `held` is where its values are."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device):
        with torch.inference_mode(False):  # a view made in that mode of what was made before it fails
            made = torch.Tensor._make_wrapper_subclass(
                cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
                device=torch.device(NAME, device.index or 0),
            )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    # What reaches past the dispatcher into memory, which is not the host's:

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, new: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, new)
        self.held = new.held

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def tolist(self) -> list:
        _note("wait")
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def __deepcopy__(self, memo: dict) -> SimulatedTensor:
        if id(self) not in memo:
            memo[id(self)] = SimulatedTensor(self.held.clone(), self.device).requires_grad_(self.requires_grad)
            memo[id(self)].__dict__ |= {name: value for name, value in vars(self).items() if name != "held"}
        return memo[id(self)]

    def __format__(self, form: str) -> str:
        return format(self.item(), form) if self.dim() == 0 else repr(self)

    def __repr__(self, **options) -> str:
        return f"SimulatedTensor({self.held!r}, device='{self.device}')"


_aten = torch.ops.aten
_CASTS = (_aten.to, _aten.type_as)  # of which inference mode tells before they are a copy or nothing
_COPIES = (_aten.copy_.default, _aten._to_copy.default)
_INDEXING = (
    _aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._unsafe_index.Tensor,
    _aten._index_put_impl_.default,
)  # fmt: skip
_OF_A_NUMBER = (_aten.masked_fill.Tensor, _aten.masked_fill_.Tensor, _aten.fill.Tensor, _aten.fill_.Tensor)
_UNKNOWN = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # until the device has computed it


def _run(func, args: tuple, kwargs: dict):
    """Do on the CPU what is asked of the device."""
    if func.overloadpacket in _CASTS:
        return func.decompose(*args, **kwargs)
    if func is _aten._has_compatible_shallow_copy_type.default:
        return all(isinstance(tensor, SimulatedTensor) for tensor in args)
    tensors: list[torch.Tensor] = []
    _each(tensors.append, (args, kwargs), torch.Tensor)
    ours = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    device, told = ours[0].device, _argument("device", func, args, kwargs)
    target = device if told is None else torch.device(told)
    if func in _COPIES:
        target = _copied(func, tensors, target)
    else:
        _check(func, tensors, args, kwargs)
    held = {id(tensor.held): tensor for tensor in ours}

    def inside(value):
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return value.held if isinstance(value, SimulatedTensor) else value

    def outside(value):
        if not isinstance(value, torch.Tensor) or isinstance(value, SimulatedTensor):
            return value
        if id(value) in held:  # changed in place
            return held[id(value)]
        return SimulatedTensor(value, target) if target.type == NAME else value

    kwargs = {name: None if name == "pin_memory" else value for name, value in kwargs.items()}
    found = func(*_each(inside, args), **_each(inside, kwargs))
    for tensor in ours if func._schema.is_mutable else ():
        if tensor.shape != tensor.held.shape or tensor.stride() != tensor.held.stride():
            tensor.data = SimulatedTensor(tensor.held, tensor.device)
    return args[0] if func is _aten.copy_.default else _each(outside, found)


def _each(function: Callable, value, kind: type | None = None):
    """`function` of everything (of a kind) in nested lists, tuples and dictionaries."""
    if isinstance(value, tuple | list):
        made = [_each(function, one, kind) for one in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, dict):
        return {key: _each(function, one, kind) for key, one in value.items()}
    return function(value) if kind is None or isinstance(value, kind) else value


def _argument(name: str, func, args: tuple, kwargs: dict):
    """An argument of an operator, however it was passed."""
    if name in kwargs:
        return kwargs[name]
    place = next((i for i, argument in enumerate(func._schema.arguments) if argument.name == name), len(args))
    return args[place] if place < len(args) else None


def _copied(func, tensors: list[torch.Tensor], target: torch.device) -> torch.device:
    """Count a copy; where its result is."""
    if func is _aten.copy_.default:
        target, source = (tensor.device for tensor in tensors)
    else:
        source = tensors[0].device
        target = torch.device(NAME, target.index or 0) if target.type == NAME else target
    if source != target:
        of_kind = {(True, False): "download", (False, True): "upload", (True, True): "transfer"}
        _note(of_kind[source.type == NAME, target.type == NAME])
    return target


def _check(func, tensors: list[torch.Tensor], args: tuple, kwargs: dict) -> None:
    """Raise `RuntimeError` for what CUDA refuses, and count what it makes the host wait for."""
    ours = [tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)]
    others = [tensor for tensor in tensors if not isinstance(tensor, SimulatedTensor)]
    indices = [one for one in args[1] if one is not None] if func in _INDEXING else []
    masks = [one for one in indices if one.dtype in (torch.bool, torch.uint8)]
    if func in _INDEXING and isinstance(args[0], SimulatedTensor):
        on_host = [one for one in indices if not isinstance(one, SimulatedTensor)]
        values = [args[2]] if len(args) > 2 and not isinstance(args[2], SimulatedTensor) else []
        for _ in [*on_host, *(one for one in values if one.dim() == 0)]:
            _note("upload")
        others = [one for one in values if one.dim() > 0]
    elif torch.Tag.pointwise in func.tags or func in _OF_A_NUMBER:
        changed = args[0] if func._schema.is_mutable else None  # must not be a number on the host
        others = [one for one in others if one.dim() > 0 or one is changed]
    if others or any(one.device != ours[0].device for one in ours):
        found = ", ".join(f"{one.device} {tuple(one.shape)}" for one in tensors)
        raise RuntimeError(f"Expected all tensors of {func} to be on the same device, but found them on {found}.")
    generator = _argument("generator", func, args, kwargs)
    if generator is not None and generator.device.type != NAME:
        raise RuntimeError(
            f"Expected a generator of {ours[0].device} for {func}, but found one of {generator.device}."
        )
    if func in _INDEXING:
        waits = any(isinstance(mask, SimulatedTensor) for mask in masks)
    elif func is _aten.repeat_interleave.Tensor:
        waits = _argument("output_size", func, args, kwargs) is None
    else:
        waits = not _UNKNOWN.isdisjoint(func.tags) or func is _aten._linalg_check_errors.default
    if waits:
        _note("wait")


# What PyTorch asks of a device before there is a tensor of it, and, of `copy_`, where it goes past the class above.


def _empty(size, *, dtype=None, device=None, memory_format=None, **_) -> SimulatedTensor:
    options = {} if memory_format is None else {"memory_format": memory_format}
    return SimulatedTensor(torch.empty(size, dtype=dtype, device="cpu", **options), device)


def _empty_strided(size, stride, *, dtype=None, device=None, **_) -> SimulatedTensor:
    return SimulatedTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"), device)


def _copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return _run(_aten.copy_.default, (target, source), {})


class _Module(_DummyBackendModule):
    def is_available(self) -> bool:
        return bool(_entered)

    def device_count(self) -> int:
        return len(_entered[:1])

    def get_rng_state(self, *device) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *device) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16, torch.float32]

    def synchronize(self, *device) -> None:
        _note("wait")

    def empty_cache(self) -> None:
        pass


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return bool(_entered)


_hook = _Hook()
_setup_privateuseone_for_python_backend(NAME, _Module(), _hook)
_library = torch.library.Library("aten", "IMPL")
for _name, _function in {"empty.memory_format": _empty, "empty_strided": _empty_strided, "copy_": _copy_}.items():
    _library.impl(_name, _function, "PrivateUse1")
