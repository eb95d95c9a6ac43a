"""The classes of the bundled pipelines, with defaults of their calls that suit them.

Their names are those of diffusers, which it writes into a saved pipeline and by which `AutoPipeline` knows them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping

import diffusers

from .worlds import WORLDS


def _with_defaults(pipeline_class: type, defaults: Mapping) -> Callable:
    """The `__call__` of a pipeline class with other defaults of some of its arguments."""
    parameters = inspect.signature(pipeline_class.__call__).parameters
    names = list(parameters)

    @functools.wraps(pipeline_class.__call__)
    def __call__(self, *args, **kwargs):
        by_position = names[1 : len(args) + 1]
        left = {name: value for name, value in defaults.items() if name not in by_position}
        return pipeline_class.__call__(self, *args, **left | kwargs)

    changed = [p.replace(default=defaults.get(name, p.default)) for name, p in parameters.items()]
    __call__.__signature__ = inspect.Signature(changed)
    return __call__


class StableDiffusionPipeline(diffusers.StableDiffusionPipeline):
    __call__ = _with_defaults(diffusers.StableDiffusionPipeline, WORLDS["shapes"].call)


class PixArtAlphaPipeline(diffusers.PixArtAlphaPipeline):
    __call__ = _with_defaults(diffusers.PixArtAlphaPipeline, WORLDS["people"].call)


CLASSES = {WORLDS["shapes"].pipeline: StableDiffusionPipeline, WORLDS["people"].pipeline: PixArtAlphaPipeline}
