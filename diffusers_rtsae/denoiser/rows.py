"""
The guidance branch of each row of a denoiser call: known from the text of the row if the pipeline has the negative
text in a variable, otherwise from the layout of its family.
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
    "other": "follows another text, such as an editing concept, or is no step of denoising; it is left unchanged",
}
# parts of the names of variables and arguments
_NEGATIVE = ("negative", "uncond", "null")
_TEXT = ("encoder_hidden", "text", "pool", "prompt", "cap")  # without pictures, which some pipelines order differently
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
        images (`int`): number of images.
        prompts (`int`, *optional*): number of prompts, if it is known.
    """

    images: int
    prompts: int | None

    @classmethod
    def of(cls, variables: dict[str, Any], sample: torch.Tensor | list) -> Drawn:
        """Find the numbers from a pipeline's variables and the sample that it calls its denoiser with."""
        rows = len(sample)
        prompts = variables.get("batch_size")
        latents = next((variables[name] for name in _LATENTS if torch.is_tensor(variables.get(name))), None)
        if latents is None and prompts is None and torch.is_tensor(sample):  # no variable has one of diffusers' names
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
        if drawn == prompts and prompts % each == 0:  # in some pipelines `batch_size` is the number of images
            return cls(drawn, prompts // each)
        images = next((count for count in (prompts * each, prompts, drawn) if count and rows % count == 0), rows)
        return cls(images, prompts if images % prompts == 0 else None)


@dataclass
class Turn:
    """
    The calls so far in one turn of a pipeline's loop.

    Args:
        roles (`list[str]`): roles of their parts.
        texts (`dict[str, tuple]`): texts of the first and the last conditional row, by argument.
    """

    roles: list[str] = field(default_factory=list)
    texts: dict[str, tuple] = field(default_factory=dict)


def roles_of(
    arguments: Arguments, caller: Caller, drawn: Drawn, guided: bool, turn: Turn
) -> tuple[tuple[str, ...], bool]:
    """
    The roles of the equal parts of a batch, and whether consecutive images are of different prompts.

    Args:
        arguments (`Arguments`): arguments of the call.
        caller (`Caller`): the pipeline that makes it.
        drawn (`Drawn`): what is being drawn.
        guided (`bool`): whether the pipeline says that it uses guidance.
        turn (`Turn`): the earlier calls of the turn; the texts of this one are recorded in it.

    Raises:
        `ValueError`: the layout of the batch is not known.
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
    """The role that a guider names for the call. Guiders make one call per guidance branch."""
    for name in ("guider_state_batch", "batch"):
        identifier = getattr(caller.variables.get(name), "__guidance_identifier__", None)
        if identifier is not None:
            return {"pred_cond": "cond", "pred_uncond": "uncond"}.get(identifier, "perturbed")
    return None


def is_negative(name: str) -> bool:
    """Whether a variable of this name is of the negative text."""
    return name.startswith("neg_") or any(mark in name for mark in _NEGATIVE)


def _negatives(variables: dict[str, Any]) -> list[tuple[torch.Tensor | list, torch.Tensor | list | None]]:
    """The negative texts among a pipeline's variables, each with the positive one if there is a variable with the same
    name but for "negative"."""
    pairs = []
    for name, value in variables.items():
        mark = next((mark for mark in _NEGATIVE if mark in name), "neg" if name.startswith("neg_") else None)
        if mark is None or any(word in name for word in _NO_TEXT):
            continue
        positive = name.replace(f"{mark}_", "").replace(f"_{mark}", "")
        negatives = list(flat([value]))
        positives = list(flat([variables.get(positive) if positive != name else None]))
        positives = positives if len(positives) == len(negatives) else [None] * len(negatives)
        pairs += list(zip(negatives, positives, strict=True))
    return pairs


def _take_turns(texts: dict[str, list], start: int, prompts: int, caller: Caller) -> bool:
    """Whether consecutive images are of different prompts."""
    in_turns = [  # by text
        not same_as_next
        for name, text in texts.items()
        if any(word in name for word in _TEXT)
        and not any(word in name for word in _NO_TEXT)
        and (same_as_next := same(text[start], text[start + 1])) != same(text[start], text[start + prompts])
    ]
    if any(in_turns) and not all(in_turns):
        raise ValueError(
            f"{type(caller.pipeline).__name__} gives an image the text of one prompt and the pooled text of another, "
            "where there are several prompts and several images of each: draw one at a time."
        )
    return any(in_turns)


def _matches(text, start: int, stop: int, known) -> bool:
    return len(known) > 0 and same_part(text, start, stop, known, 0, len(known) - 1)


def _of_batch(texts: dict[str, list], negatives: list, bounds: list, caller: Caller, guided: bool) -> tuple[str, ...]:
    """The roles of a batch of several parts."""
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
    elif not guided and not negatives:  # it may use guidance without a property that says so
        if not caller.is_diffusers:
            _refuse_without_negative(caller)
        layouts = [tuple(layout.split()) for layout in caller.family.batch]
    fitting = [layout for layout in layouts if len(layout) == len(bounds)]
    if not fitting:
        raise ValueError(
            f"{type(caller.pipeline).__name__} calls the denoiser with {len(bounds)} rows for each image: this layout "
            f"of guidance is not supported; expected {' or '.join(' + '.join(layout) for layout in layouts)}."
        )
    return fitting[0]


def _refuse_without_negative(caller: Caller) -> NoReturn:
    raise ValueError(
        f"{type(caller.pipeline).__name__} does not say which text is the negative one: expected it in a variable of "
        "its call with `negative` or `uncond` in its name."
    )


def _of_single(texts: dict[str, list], negatives: list, images: int, caller: Caller, guided: bool, turn: Turn) -> str:
    """The role of a call for one guidance branch alone."""
    is_negative = False
    for text in texts.values():
        for negative, positive in negatives:
            first, last = _matches(text, 0, 1, negative[:1]), _matches(text, images - 1, images, negative[-1:])
            if first and not last:
                raise ValueError(
                    f"Some of the {images} rows that the denoiser is called with carry the negative prompt, and their "
                    "layout is not known."
                )
            if _matches(text, 0, images, negative):
                is_negative = True
                if positive is None or not len(positive) or not _matches(text, 0, images, positive):
                    return "uncond"
    if not turn.roles:
        return caller.family.calls[0]
    if "uncond" in turn.roles and "cond" not in turn.roles:
        return "cond"
    shared = texts.keys() & turn.texts.keys()
    shared = {name for name in shared if any(word in name for word in _TEXT)} or shared
    again = bool(shared) and all(
        same(texts[name][0], turn.texts[name][0]) and same(texts[name][images - 1], turn.texts[name][1])
        for name in shared
    )
    if again and not (is_negative and "uncond" not in turn.roles):
        return "perturbed"
    if guided or negatives:
        return caller.family.calls[-1]
    if shared and not again and not caller.is_diffusers:
        _refuse_without_negative(caller)
    return "cond"
