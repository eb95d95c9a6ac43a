"""
What the rows of a denoiser call are: told by whose text they carry, wherever the pipeline holds the negative one; by
the layout of its family where it does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from .arguments import Arguments, flat, same, same_part
from .callers import Caller

ROLES = {
    "cond": "follows the prompt",
    "uncond": "follows the negative prompt, or none",
    "perturbed": "follows the prompt, but is made worse on purpose, to guide away from it",
    "other": "follows a text of its own, as an editing concept does, or is no step of denoising; it is left alone",
}
# words in the names of a pipeline's variables, and of arguments
_NEGATIVE = ("negative", "uncond", "null")
_TEXT = ("encoder_hidden", "text", "pool", "prompt", "cap")  # not pictures, which some pipelines order otherwise
_NO_TEXT = (
    "mask", "ids", "size", "crop", "pos", "len", "latent", "noise", "pred", "scale", "model", "out", "sample",
    "control",
)  # fmt: skip
_LATENTS = ("latents", "decoder_latents")
_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


@dataclass(frozen=True)
class Drawn:
    """
    What is being drawn.

    Args:
        images (`int`): how many.
        prompts (`int`, *optional*): of how many prompts, if that is known.
    """

    images: int
    prompts: int | None

    @classmethod
    def of(cls, variables: dict[str, Any], sample: torch.Tensor | list) -> Drawn:
        """From a pipeline's variables and the sample that it calls its denoiser with."""
        rows = len(sample)
        prompts = variables.get("batch_size")
        latents = next((variables[name] for name in _LATENTS if torch.is_tensor(variables.get(name))), None)
        if latents is None and prompts is None and torch.is_tensor(sample):  # nothing is called as diffusers does
            alike = [v for v in variables.values() if torch.is_tensor(v) and v.shape[1:] == sample.shape[1:]]
            alike = [v for v in alike if v.ndim and 0 < len(v) < rows and rows % len(v) == 0]
            latents = min(alike, key=len, default=None)
        each = next((variables[name] for name in _PER_PROMPT if isinstance(variables.get(name), int)), 1)
        drawn = len(latents) if latents is not None and latents.ndim else None
        if drawn is not None and rows % drawn:
            if rows < drawn and isinstance(prompts, int) and drawn in (prompts, prompts * each):
                raise ValueError(
                    f"The denoiser is called for {rows} of {drawn} images at a time, which cannot be followed: draw "
                    "one alone."
                )
            drawn = None
        if not isinstance(prompts, int) or prompts < 1:
            return cls(drawn or rows, None)
        if drawn == prompts and prompts % each == 0:  # some pipelines count the images of all prompts in `batch_size`
            return cls(drawn, prompts // each)
        images = next((count for count in (prompts * each, prompts, drawn) if count and rows % count == 0), rows)
        return cls(images, prompts if images % prompts == 0 else None)


@dataclass
class Turn:
    """
    What the calls of one turn of a pipeline's loop were so far.

    Args:
        seen (`list[str]`): roles of the rows.
        texts (`dict[str, tuple]`): what the first and the last conditional row carried, by argument.
    """

    seen: list[str] = field(default_factory=list)
    texts: dict[str, tuple] = field(default_factory=dict)


def roles_of(
    arguments: Arguments, caller: Caller, drawn: Drawn, guided: bool, turn: Turn
) -> tuple[tuple[str, ...], bool]:
    """
    What the equal parts of a batch are, and whether its images are of each prompt in turn.

    Args:
        guided (`bool`): the pipeline says that it guides.
        turn (`Turn`): the calls before; takes note of this one's texts.

    Raises:
        `ValueError`: a layout that is not known.
    """
    rows, images = len(arguments.sample), drawn.images
    texts, negatives = arguments.texts(), _negatives(caller.variables)
    bounds = [(start, start + images) for start in range(0, rows, images)]
    named = named_part(caller)
    if named is not None:
        roles = (named,)
    elif len(bounds) > 1:
        roles = _of_batch(texts, negatives, bounds, caller, guided)
    else:
        roles = (_of_single(texts, negatives, images, caller, guided, turn),)
    if "cond" not in roles:
        return roles, False
    start, stop = bounds[roles.index("cond")]
    turn.texts = {name: (text[start], text[stop - 1]) for name, text in texts.items()}
    several = drawn.prompts is not None and 1 < drawn.prompts < images
    return roles, several and _take_turns(texts, start, drawn.prompts, caller)


def named_part(caller: Caller) -> str | None:
    """The part of guidance that a guider calls for; guiders call once for each, and say which."""
    for name in ("guider_state_batch", "batch"):
        identifier = getattr(caller.variables.get(name), "__guidance_identifier__", None)
        if identifier is not None:
            return {"pred_cond": "cond", "pred_uncond": "uncond"}.get(identifier, "perturbed")
    return None


def _negatives(variables: dict[str, Any]) -> list[tuple[torch.Tensor | list, torch.Tensor | list | None]]:
    """Texts of the unconditional part that a pipeline holds, each with that of the conditional part if it has the
    same name without "negative"."""
    found = []
    for name, value in variables.items():
        mark = next((mark for mark in _NEGATIVE if mark in name), "neg" if name.startswith("neg_") else None)
        if mark is None or any(word in name for word in _NO_TEXT):
            continue
        positive = name.replace(f"{mark}_", "").replace(f"_{mark}", "")
        ours, theirs = list(flat([value])), list(flat([variables.get(positive) if positive != name else None]))
        theirs = theirs if len(theirs) == len(ours) else [None] * len(ours)
        found += list(zip(ours, theirs, strict=True))
    return found


def _take_turns(texts: dict[str, list], start: int, prompts: int, caller: Caller) -> bool:
    """Whether the images of several prompts are drawn in turns, one of each prompt."""
    told = [
        not beside
        for name, text in texts.items()
        if any(word in name for word in _TEXT)
        and not any(word in name for word in _NO_TEXT)
        and (beside := same(text[start], text[start + 1])) != same(text[start], text[start + prompts])
    ]
    if any(told) and not all(told):
        raise ValueError(
            f"{type(caller.pipeline).__name__} gives an image the text of one prompt and the pooled text of another, "
            "where there are several prompts and several images of each: draw one at a time."
        )
    return any(told)


def _matches(text, start: int, stop: int, known) -> bool:
    return len(known) > 0 and same_part(text, start, stop, known, 0, len(known) - 1)


def _of_batch(texts: dict[str, list], negatives: list, bounds: list, caller: Caller, guided: bool) -> tuple[str, ...]:
    """Of a batch of several parts."""
    for text in texts.values():
        for negative, _ in negatives:
            unconditional = [_matches(text, *bound, negative) for bound in bounds]
            if any(unconditional) and not all(unconditional):
                roles, conditional = [], None
                for bound, is_negative in zip(bounds, unconditional, strict=True):
                    if is_negative:
                        roles.append("uncond")
                    elif conditional is None:
                        conditional = bound
                        roles.append("cond")
                    else:
                        again = same_part(text, *bound, text, conditional[0], conditional[1] - 1)
                        roles.append("perturbed" if again else "other")
                return tuple(roles)
    layouts = [tuple(layout.split()) for layout in caller.family.batch] if guided else [("cond",)]
    if bool(caller.property("do_perturbed_attention_guidance", False)):
        layouts = [(*layout, "perturbed") for layout in layouts]
    elif not guided and not negatives:  # guidance that the pipeline has no property for
        if not caller.is_diffusers:
            _refuse_untold(caller)
        layouts = [tuple(layout.split()) for layout in caller.family.batch]
    fitting = [layout for layout in layouts if len(layout) == len(bounds)]
    if not fitting:
        raise ValueError(
            f"{type(caller.pipeline).__name__} calls the denoiser with {len(bounds)} rows for each image: this layout "
            f"of guidance is not supported; expected {' or '.join(' + '.join(layout) for layout in layouts)}."
        )
    return fitting[0]


def _refuse_untold(caller: Caller) -> NoReturn:
    raise ValueError(
        f"{type(caller.pipeline).__name__} does not say which text is the negative one: expected it in a variable of "
        "its call with `negative` or `uncond` in its name."
    )


def _of_single(texts: dict[str, list], negatives: list, images: int, caller: Caller, guided: bool, turn: Turn) -> str:
    """Of a call for one part of guidance alone."""
    either = False
    for text in texts.values():
        for negative, positive in negatives:
            first, last = _matches(text, 0, 1, negative[:1]), _matches(text, images - 1, images, negative[-1:])
            if first and not last:
                raise ValueError(
                    f"Some of the {images} rows that the denoiser is called with carry the negative prompt, and their "
                    "layout is not known."
                )
            if _matches(text, 0, images, negative):
                either = True
                if positive is None or not len(positive) or not _matches(text, 0, images, positive):
                    return "uncond"
    if not turn.seen:
        return caller.family.calls[0]
    if "uncond" in turn.seen and "cond" not in turn.seen:
        return "cond"
    shared = texts.keys() & turn.texts.keys()
    shared = {name for name in shared if any(word in name for word in _TEXT)} or shared
    again = bool(shared) and all(
        same(texts[name][0], turn.texts[name][0]) and same(texts[name][images - 1], turn.texts[name][1])
        for name in shared
    )
    if again and not (either and "uncond" not in turn.seen):
        return "perturbed"
    if guided or negatives:
        return caller.family.calls[-1]
    if shared and not again and not caller.is_diffusers:
        _refuse_untold(caller)
    return "cond"
