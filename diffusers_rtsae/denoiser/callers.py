"""
How pipelines call their denoiser: everything that is known about callers, and the only place that looks at them.

A denoiser call says too little: which of its rows are conditional, at which of the sampler's timesteps it is made, how
many prompts there are. The pipeline knows, but tells nobody: diffusers' callbacks run once a step, its hooks see the
arguments alone, and `cache_context` names a call in a third of the pipelines. So [`find_caller`] walks up the stack to
the pipeline that is running and reads the local variables of its call. A family of pipelines that does anything in its
own way has an entry in `FAMILIES`.
"""

from __future__ import annotations

import functools
import re
import sys
import weakref
from dataclasses import dataclass, field
from typing import Any

PIPELINES: list[type] = []  # the classes whose calls are looked for


@dataclass(frozen=True)
class Family:
    """
    Pipelines that call their denoiser in a way of their own.

    Args:
        names (`str`): regular expression that their class names match from the beginning.
        batch (`tuple[str, ...]`): what the equal parts of a batch are, where their texts do not say it: the entry with
            as many roles as there are parts.
        calls (`tuple[str, ...]`): what the calls of one step are, where their texts do not say it.
        time (`tuple[str, ...]`): variables that hold the sampler's timestep, the first one that is there.
        index (`tuple[str, ...]`): variables that together with the timestep say which step of the loop it is.
        view (`tuple[str, ...]`): variables that say which part of the picture, or window of frames, a call draws.
        components (`dict[str, str]`): denoisers that are called for one part of guidance alone.
        aside (`tuple[str, ...]`): calls that are no step of denoising but prepare something: the names of the methods
            they are made in, or `"argument=value"` of what they pass; `"before the loop"`.
        refused (`str`): why such a pipeline cannot be followed; empty if it can.
    """

    names: str
    batch: tuple[str, ...] = ("uncond cond",)
    calls: tuple[str, ...] = ("cond", "uncond")
    time: tuple[str, ...] = ("t",)
    index: tuple[str, ...] = ("i",)
    view: tuple[str, ...] = ()
    components: dict[str, str] = field(default_factory=dict)
    aside: tuple[str, ...] = ()
    refused: str = ""


#: The first entry whose names match is the family of a pipeline; whatever is left is called as the last one.
FAMILIES = (
    Family("CosStableDiffusionXLInstructPix2Pix|StableDiffusion(XL)?InstructPix2Pix", batch=("cond uncond uncond",)),
    Family("AceStep", batch=("cond uncond",), time=("t_curr", "t_sched")),
    Family("Lumina(?!2)|DiTPipeline|Wuerstchen|StableCascade|ZImage", batch=("cond uncond",)),
    Family("StableDiffusionPanorama", view=("j",)),
    Family("OmniGen", batch=("cond uncond", "cond uncond uncond")),
    Family("UniDiffuser", refused="it denoises pictures and texts, each at a time of its own"),
    Family("Kandinsky(V22)?Prior", refused="it draws the negative prompt as a picture of its own beside the others"),
    Family("Cosmos3", refused="it packs prompts into one sequence, which has no rows"),
    Family("Ideogram4", components={"unconditional_transformer": "uncond"}),
    Family("Amused", time=("timestep",)),
    Family("GlmImage", aside=("before the loop",)),
    Family("AnyFlowFAR", aside=("encode_kv_cache",)),
    Family("WanAnimate2", aside=("kv_cache_mode=extract",)),
    Family("StableDiffusionPipelineSafe", batch=("uncond cond", "uncond cond other")),
    Family(""),
)


class Generation:
    """One run of a pipeline's call, from noise to the picture. What somebody has to remember of it is kept in `kept`,
    by whoever keeps it, and is dropped when the call returns."""

    def __init__(self):
        self.kept: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Caller:
    """
    A running pipeline.

    Args:
        pipeline: the pipeline.
        family (`Family`): how it calls.
        variables (`dict`): local variables of its call, with those of the methods and blocks inside.
        generation (`Generation`): an object of this call's own.
        line (`int`): of the source, where the denoiser is called.
        method (`str`): in which it is called.
    """

    pipeline: Any
    family: Family
    variables: dict[str, Any]
    generation: Generation
    line: int
    method: str

    def value(self, names: tuple[str, ...]) -> Any:
        """The first of these variables that is there."""
        return next((self.variables[name] for name in names if self.variables.get(name) is not None), None)

    @property
    def is_diffusers(self) -> bool:
        """Whether the call is one of diffusers' own, whose layouts are known."""
        return str(type(self.pipeline).__call__.__module__).startswith("diffusers.")

    def property(self, name: str, default: Any = None) -> Any:
        """A property of the pipeline, which callbacks may have changed, or else the variable of its name."""
        found = getattr(self.pipeline, name, None)
        return self.variables.get(name, default) if found is None else found


@functools.cache
def family_of(pipeline_class: type) -> Family:
    """How pipelines of a class call their denoiser: as this, or the nearest class that it derives from, does."""
    *known, other = FAMILIES
    names = (kind.__name__ for kind in pipeline_class.__mro__)
    return next((family for name in names for family in known if re.match(family.names, name)), other)


_MARK = "__rtsae_generation__"  # among the local variables of a pipeline's call; goes when the call returns


def find_caller() -> Caller | None:
    """
    The innermost pipeline that is running in this thread; `None` if there is none.

    Its generation is the innermost run of its own `__call__`, or else of the outermost of its methods, `invert` and
    its like; so a call that is split into methods is one, and a pipeline called again in a callback is another.
    """
    frame, pipeline, entry, variables, place = sys._getframe(1), None, None, {}, None
    while frame is not None:
        owner, is_block = _owner(frame), "block_state" in frame.f_code.co_varnames
        if pipeline is None and isinstance(owner, tuple(PIPELINES)):
            pipeline, entry, place = owner, frame, place or (frame.f_lineno, frame.f_code.co_name)
            local = frame.f_locals
            state = getattr(local.get("state"), "values", {})  # of a modular pipeline
            variables = {**(state if isinstance(state, dict) else {}), **local, **variables}
        elif pipeline is None and is_block and "block_state" in frame.f_locals:  # a block of a modular pipeline
            local, place = frame.f_locals, place or (frame.f_lineno, frame.f_code.co_name)
            variables = {**_variables(local["block_state"]), **local, **variables}
        elif pipeline is not None and owner is pipeline:
            entry, variables = frame, {**frame.f_locals, **variables}
        if entry is not None and entry.f_code.co_name == "__call__":
            break
        frame = frame.f_back
    if pipeline is None:
        return None
    generation = entry.f_locals.setdefault(_MARK, Generation())
    return Caller(pipeline, family_of(type(pipeline)), variables, generation, *place)


def _owner(frame) -> Any:
    """The object whose method a frame runs, or a function inside of one."""
    code = frame.f_code
    if code.co_varnames[:1] != ("self",) and "self" not in code.co_freevars:
        return None
    local = frame.f_locals
    owner = local.get("self")
    if sys.version_info < (3, 13) and not isinstance(owner, tuple(PIPELINES)):
        local.clear()  # a copy, which would keep what that function drops
    return owner


def _variables(block_state) -> dict[str, Any]:
    return {name: value for name, value in vars(block_state).items() if not name.startswith("_")}
