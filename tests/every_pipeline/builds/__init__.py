"""
Every pipeline class of diffusers, built small from random weights: one file a family, one function for the classes
that are built alike.

    @builds("FluxPipeline", "FluxImg2ImgPipeline")
    def flux(kind: type) -> Built:
        ...
        return Built(kind(transformer=..., scheduler=...), call)
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple


class Ask(NamedTuple):
    """
    What a pipeline is to be called with.

    prompts (`tuple[int, ...]`): a seed for each prompt: the same seed is the same text, another is another.
    negative (`int`): seed of the negative prompt, one for all.
    images (`int`): of each prompt.
    guided (`bool`): with classifier-free guidance, where the pipeline has it.
    steps (`int`): of denoising.
    """

    prompts: tuple[int, ...] = (1,)
    negative: int = 2
    images: int = 1
    guided: bool = True
    steps: int = 2


class Built(NamedTuple):
    """
    A small pipeline and how it is called.

    pipe: the pipeline, on the CPU in float32, its progress bar off.
    call (`Callable[[Ask], dict]`): its keyword arguments, deterministic, with a new seeded `generator` each time where
        it takes one, and the cheapest output that has all that was denoised (`output_type="latent"`).
    many (`bool`): several prompts at once can be asked for.
    images (`bool`): several images a prompt can be asked for.
    guided (`bool`): it has guidance that `Ask.guided` turns on and off.
    text (`bool`): its result depends on `Ask.prompts`.
    negative (`bool`): with guidance its result depends on `Ask.negative`.
    """

    pipe: Any
    call: Callable[[Ask], dict]
    many: bool = True
    images: bool = True
    guided: bool = True
    text: bool = True
    negative: bool = True


BUILDS: dict[str, Callable[[type], Built]] = {}
UNBUILT: dict[str, str] = {}  # classes that cannot be built here, and what would be needed


def builds(*names: str):
    """Register a function that builds the pipeline classes of these names."""

    def register(function: Callable[[type], Built]) -> Callable[[type], Built]:
        for name in names:
            if name in BUILDS or name in UNBUILT:
                raise ValueError(f"{name} is built twice.")
            BUILDS[name] = function
        return function

    return register


def unbuilt(reason: str, *names: str) -> None:
    """Register pipeline classes that cannot be built, and why."""
    UNBUILT.update(dict.fromkeys(names, reason))


def load_all() -> None:
    """Import every file of this folder, so that `BUILDS` is full."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
