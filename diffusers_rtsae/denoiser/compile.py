"""The tap in compiled code: a custom operator, which the compiler does not trace. So the graph is not broken, and new
edits need no recompilation."""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import nn

from .arguments import Arguments, named
from .blocks import DENOISERS, TEXT_ENCODERS, Block, unwrapped

_taps: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(tap) -> int:
    """Give a tap a number by which compiled code finds it."""
    number = next(_numbers)
    _taps[number] = tap
    return number


def is_compiled(denoiser: nn.Module, pipeline=None) -> bool:
    """Whether a denoiser or a module in it is compiled, by itself or as a component of its pipeline."""
    wrapped = (getattr(pipeline, name, None) for name in (*DENOISERS, *TEXT_ENCODERS))
    return any(unwrapped(one) is denoiser is not one for one in wrapped) or any(
        module._compiled_call_impl is not None or unwrapped(module) is not module for module in denoiser.modules()
    )


def compiled_begin(arguments: Arguments, component: str, handle: int) -> torch.Tensor | list[torch.Tensor]:
    """Tell a tap that its denoiser is called. Returns the sample, which the call must use instead of its own."""
    sample = arguments.sample
    facts, tensors = [component, str(arguments.channels)], []
    for name, value in named(arguments.by_name):
        if name == arguments.sample_name:
            continue
        if torch.is_tensor(value) and value.ndim or name in ("timestep", "timesteps"):
            facts.append(name)
            tensors.append(value if torch.is_tensor(value) else torch.tensor(value))
        elif type(value) is int:
            facts.append(f"{name}={value}")
    first = sample if torch.is_tensor(sample) else sample[0]
    rows = 0 if torch.is_tensor(sample) else len(sample)
    passed = torch.ops.diffusers_rtsae.begin(first, tensors, ",".join([arguments.sample_name, *facts]), rows, handle)
    return passed if torch.is_tensor(sample) else [passed, *sample[1:]]


def compiled_site(
    site: str, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor, handle: int
) -> torch.Tensor:
    """The hidden states to continue with after a site."""
    described = f"{block.argument},{'' if block.index is None else block.index},{block.layout},{block.place}"
    return torch.ops.diffusers_rtsae.site(hidden_states, block_input, site, described, handle)


@torch.library.custom_op("diffusers_rtsae::begin", mutates_args=())
def _begin(sample: torch.Tensor, tensors: list[torch.Tensor], facts: str, rows: int, handle: int) -> torch.Tensor:
    name, component, channels, *others = facts.split(",")
    tensors, arguments = iter(tensors), {name: [sample] * rows if rows else sample}
    for fact in others:
        key, is_number, number = fact.partition("=")
        arguments[key] = int(number) if is_number else next(tensors)
    channels = None if channels == "None" else int(channels)
    _taps[handle].begin(component, Arguments([*arguments], (), arguments, channels))
    return sample.clone()


@torch.library.custom_op("diffusers_rtsae::site", mutates_args=())
def _site(
    hidden_states: torch.Tensor, block_input: torch.Tensor, site: str, described: str, handle: int
) -> torch.Tensor:
    argument, index, layout, place = described.split(",")
    block = Block(argument, int(index) if index else None, layout, int(place))
    edited = _taps[handle].edit(site, block, block_input, hidden_states)
    return hidden_states.clone() if edited is hidden_states else edited


@_begin.register_fake
def _(sample, tensors, facts, rows, handle):
    return torch.empty_like(sample)


@_site.register_fake
def _(hidden_states, block_input, site, described, handle):
    return torch.empty_like(hidden_states)
