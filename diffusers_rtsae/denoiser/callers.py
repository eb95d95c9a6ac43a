"""
How pipelines call their denoiser: all that is known about callers, and the only code that looks at them.

The arguments of a denoiser call do not say which of its rows are conditional, at which of the sampler's timesteps it
is made, or how many prompts there are. The pipeline knows, but has no interface for it: diffusers' callbacks run once
per step, its hooks get the arguments alone, and `cache_context` names the branch in a third of the pipelines. So
[`find_caller`] walks up the stack to the running pipeline and reads the local variables of its call. A family of
pipelines that differs from the others has an entry in `FAMILIES`.
"""

from __future__ import annotations

import functools
import re
import sys
import weakref
from dataclasses import dataclass, field
from typing import Any

PIPELINES: list[type] = []  # base classes of the pipelines that are looked for


@dataclass(frozen=True)
class Family:
    """
    Pipelines that call their denoiser in the same way.

    Args:
        names (`str`): regular expression for the start of their class names.
        batch (`tuple[str, ...]`): roles of the equal parts of a batch, if their texts do not show them. The entry with
            as many roles as there are parts is used.
        calls (`tuple[str, ...]`): roles of the calls of a step, if their texts do not show them.
        time (`tuple[str, ...]`): names of variables for the sampler's timestep; the first one that exists is used.
        index (`tuple[str, ...]`): variables that identify the turn of the loop, together with the timestep.
        view (`tuple[str, ...]`): variables that identify the part of the picture or window of frames of a call.
        components (`dict[str, str]`): role of each denoiser that is called for one guidance branch alone.
        aside (`tuple[str, ...]`): calls that are no step of denoising but a preparation: the names of the methods that
            make them, `"argument=value"` for a value that they pass, or `"before the loop"`.
        refused (`str`): why these pipelines are not supported; empty if they are.
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


#: The first entry whose names match is the family of a pipeline. The last one is that of all other pipelines.
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
    """One run of a pipeline's `__call__`, or else (then `is_whole` is false) of another of its methods. `memories`
    holds what others remember of the generation, by the object that remembers it; it is freed when the call returns.
    """

    def __init__(self, is_whole: bool = False):
        self.is_whole = is_whole
        self.memories: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Caller:
    """
    A running pipeline.

    Args:
        pipeline: the pipeline.
        family (`Family`): how it calls its denoiser.
        variables (`dict`): local variables of its `__call__` and of the methods and blocks that it runs.
        generation (`Generation`): the running generation.
        line (`int`): line of the source that calls the denoiser.
        method (`str`): method that calls the denoiser.
    """

    pipeline: Any
    family: Family
    variables: dict[str, Any]
    generation: Generation
    line: int
    method: str

    def value(self, names: tuple[str, ...]) -> Any:
        """The value of the first of these variables that is not `None`."""
        return next((self.variables[name] for name in names if self.variables.get(name) is not None), None)

    @property
    def is_diffusers(self) -> bool:
        """Whether `__call__` is one of diffusers' own, whose layouts are known."""
        return str(type(self.pipeline).__call__.__module__).startswith("diffusers.")

    def property(self, name: str, default: Any = None) -> Any:
        """The property of the pipeline, which callbacks may have changed, or else the variable of the same name."""
        value = getattr(self.pipeline, name, None)
        return self.variables.get(name, default) if value is None else value


@functools.cache
def family_of(pipeline_class: type) -> Family:
    """The family of a pipeline class, or of its nearest base class that has one."""
    *known, other = FAMILIES
    names = (kind.__name__ for kind in pipeline_class.__mro__)
    return next((family for name in names for family in known if re.match(family.names, name)), other)


_MARK = "__rtsae_generation__"  # key among the local variables of a pipeline's call, which end with it


def find_caller() -> Caller | None:
    """
    The innermost pipeline that is running in this thread; `None` if there is none.

    Its generation is the innermost running `__call__` of this pipeline, or else its outermost running method (`invert`
    and others). So a call that is split into methods is one generation, and a call in a callback is another.
    """
    frame, pipeline, entry, variables, place = sys._getframe(1), None, None, {}, None
    while frame is not None:
        owner, is_block = _owner(frame), "block_state" in frame.f_code.co_varnames
        if pipeline is None and isinstance(owner, tuple(PIPELINES)):
            pipeline, entry, place = owner, frame, place or (frame.f_lineno, frame.f_code.co_name)
            local = frame.f_locals
            state = getattr(local.get("state"), "values", {})  # modular pipelines
            variables = {**(state if isinstance(state, dict) else {}), **local, **variables}
        elif pipeline is None and is_block and "block_state" in frame.f_locals:  # modular pipelines
            local, place = frame.f_locals, place or (frame.f_lineno, frame.f_code.co_name)
            variables = {**_variables(local["block_state"]), **local, **variables}
        elif pipeline is not None and owner is pipeline:
            entry, variables = frame, {**frame.f_locals, **variables}
        if entry is not None and entry.f_code.co_name == "__call__":
            break
        frame = frame.f_back
    if pipeline is None:
        return None
    generation = entry.f_locals.setdefault(_MARK, Generation(entry.f_code.co_name == "__call__"))
    return Caller(pipeline, family_of(type(pipeline)), variables, generation, *place)


_LIBRARIES = ("torch.", "transformers.", "accelerate.", "peft.", "diffusers.hooks.", "diffusers_rtsae.")


def find_scopes(generation: Generation) -> list[dict[str, Any]]:
    """
    The local variables of each function between the running model and the call of the pipeline that it is part of,
    innermost first, without those of libraries. Empty while a language model writes a text (`generate`).

    Args:
        generation (`Generation`): that of [`find_caller`].
    """
    frame, scopes = sys._getframe(1), []
    while frame is not None:
        module = f"{frame.f_globals.get('__name__', '')}."
        if not module.startswith(_LIBRARIES):
            local = frame.f_locals
            state = getattr(local.get("state"), "values", {})  # modular pipelines
            block = _variables(local["block_state"]) if "block_state" in local else {}
            scopes.append({**(state if isinstance(state, dict) else {}), **block, **local})
            if local.get(_MARK) is generation:
                break
        elif frame.f_code.co_name == "generate":
            return []
        frame = frame.f_back
    return scopes


def _owner(frame) -> Any:
    """The object whose method a frame runs, or a function that is defined in the method."""
    code = frame.f_code
    if code.co_varnames[:1] != ("self",) and "self" not in code.co_freevars:
        return None
    local = frame.f_locals
    owner = local.get("self")
    if sys.version_info < (3, 13) and not isinstance(owner, tuple(PIPELINES)):
        local.clear()  # this copy would keep alive what the function deletes
    return owner


def _variables(block_state) -> dict[str, Any]:
    return {name: value for name, value in vars(block_state).items() if not name.startswith("_")}
