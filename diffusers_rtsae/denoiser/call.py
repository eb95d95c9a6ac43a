"""The record of a denoiser call: when in denoising it is, what each of its rows is, and over what its tokens lie."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..models import TokenGrid
from .blocks import is_text
from .callers import Caller, Family, Generation, find_caller
from .time import noise_schedule, training_time

ROLES = {
    "cond": "follows the prompt",
    "uncond": "follows the negative prompt, or none",
    "perturbed": "follows the prompt, but is made worse on purpose, to guide away from it",
    "other": "follows a text of its own, as an editing concept does, or is no step of denoising; it is left alone",
}
_TIMESTEPS = ("timestep", "timesteps", "t", "timestep_ratio", "r", "timestep_img", "bb_ca_time", "decoder_noise_time")
_PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "num_outputs_per_prompt")


@dataclass(frozen=True)
class Part:
    """
    Rows of a batch that are treated alike.

    Args:
        role (`str`): one of `ROLES`.
        branch (`int`, *optional*): tells it from other parts of the batch that have memories of their own; `None` for
            the conditional part.
        start, stop (`float`): which share of the batch, from 0 to 1.
        timestep (`float`): in training units.
    """

    role: str
    branch: int | None
    start: float
    stop: float
    timestep: float

    def rows(self, batch: int) -> slice:
        """Its rows in a batch at a site, which may hold frames or views beside one another."""
        return slice(round(self.start * batch), round(self.stop * batch))


@dataclass(frozen=True)
class Call:
    """
    One call of a denoiser, as everything that steers, records or measures reads it.

    Args:
        timestep (`float`): the sampler's, in training units, 1000 at pure noise and 0 at the image; of the first row
            where no pipeline calls and rows differ.
        parts (`tuple[Part, ...]`): what its rows are.
        rows (`int`): how many it has.
        images (`int`): being drawn.
        prompts (`int`, *optional*): they are drawn of, if that is known.
        grid (`tuple[int, int, int]`): frames, height and width of the sample, or in its proportions.
        guidance (`float`, *optional*): scale of guidance at this very step, if that is known.
        alphas_cumprod (`torch.Tensor`, *optional*): of the sampler's noise schedule.
        run (`weakref.ref[Generation]`): the run it is part of, see `generation`.
        caller (`weakref.ref`, *optional*): the pipeline that calls, see `pipeline`.
        is_tiled (`bool`): the images of several prompts are drawn in turns, one of each prompt.
        view (`tuple`): which part of the picture or which window of frames it draws, where a pipeline draws several.
        is_start (`bool`): it begins a trajectory: of the run, or of the next window or chunk drawn in it.
        given (`torch.Tensor`, *optional*): tokens that are given and not denoised, `(rows, tokens)`: a first frame.
    """

    timestep: float
    parts: tuple[Part, ...]
    rows: int
    images: int
    prompts: int | None
    grid: tuple[int, int, int]
    guidance: float | None
    alphas_cumprod: torch.Tensor | None
    run: weakref.ref[Generation]  # weak, as a generation keeps what belongs to it
    caller: weakref.ref | None
    view: tuple
    is_start: bool
    is_tiled: bool = False
    given: torch.Tensor | None = field(default=None, compare=False)

    @property
    def generation(self) -> Generation | None:
        """The run it is part of, while that lasts."""
        return self.run()

    @property
    def pipeline(self) -> Any:
        """The pipeline that calls; `None` if there is none."""
        return None if self.caller is None else self.caller()

    def parts_of(self, batch: int) -> Iterator[tuple[Part, slice]]:
        """
        The parts with their rows in a batch at a site. A cache may leave all but the conditional ones out.

        Raises:
            `ValueError`: a batch of another number of rows.
        """
        conditional = [part for part in self.parts if part.role == "cond"]
        if len(conditional) == 1 and batch == self.images < self.rows:
            part = conditional[0]
            yield Part(part.role, part.branch, 0.0, 1.0, part.timestep), slice(0, batch)
            return
        if batch % self.rows:
            raise ValueError(
                f"The denoiser is called with {self.rows} rows and has {batch} at this site: expected a multiple, as "
                "frames beside one another are."
            )
        for part in self.parts:
            yield part, part.rows(batch)

    def rows_of(self, role: str, batch: int) -> slice | None:
        """The rows of a role in a batch at a site; `None` if there are none."""
        found = [rows for part, rows in self.parts_of(batch) if part.role == role]
        return slice(found[0].start, found[-1].stop) if found else None


class Arguments:
    """
    The arguments of a denoiser call by name, however they were passed.

    Args:
        names (`list[str]`): of the parameters of its `forward`, in order.
        channels (`int`, *optional*): of its sample.
    """

    def __init__(self, names: list[str], args: tuple, kwargs: dict, channels: int | None = None):
        self.names, self.args, self.kwargs, self.channels = names, args, kwargs, channels
        self.by_name = {**dict(zip(names, args, strict=False)), **kwargs}
        self.sample_name = next((name for name in names if self.by_name.get(name) is not None), None)
        if self.sample_name is None:
            raise ValueError("The denoiser is called without a sample.")

    @property
    def sample(self) -> torch.Tensor | list:
        """The noisy latents: `(rows, ...)`, or a list of them."""
        return self.by_name[self.sample_name]

    @property
    def timestep(self) -> torch.Tensor | float | None:
        """The time that the denoiser is told, in whatever unit it wants."""
        return next((self.by_name[name] for name in _TIMESTEPS if self.by_name.get(name) is not None), None)

    def with_sample(self, sample) -> tuple[tuple, dict]:
        """`(args, kwargs)` of the same call with another sample."""
        return self._with(self.sample_name, sample)

    def with_timestep(self, timestep) -> tuple[tuple, dict]:
        """`(args, kwargs)` of the same call at another time."""
        return self._with(next(name for name in _TIMESTEPS if self.by_name.get(name) is not None), timestep)

    def _with(self, name: str, value) -> tuple[tuple, dict]:
        place = self.names.index(name)
        if place < len(self.args):
            return (*self.args[:place], value, *self.args[place + 1 :]), self.kwargs
        return self.args, {**self.kwargs, name: value}

    def texts(self) -> dict[str, list]:
        """What may carry text: every argument with something for each row of the sample, or one for all, but that and
        the time; row by row."""
        skipped, rows = {self.sample_name, *_TIMESTEPS}, len(self.sample)
        found = {}
        for name, value in named(self.by_name):
            own = None if name in skipped or "mask" in name else _rows(value, rows)
            if own is not None:
                found[name] = own
        return found


def named(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested arguments with their names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from named(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _rows(value, rows: int) -> list | None:
    """What of an argument belongs to each row, the first of it where frames have something each; `None` if nothing
    does."""
    if torch.is_tensor(value) and value.ndim > 1 and len(value) == 1:
        return [value[0]] * rows
    if torch.is_tensor(value) and value.ndim and len(value) and len(value) % rows == 0:
        return [value[row * (len(value) // rows)] for row in range(rows)]
    if isinstance(value, list | tuple) and len(value) == rows and any(True for _ in _flat(value)):
        return list(value)
    return None


def _flat(values) -> Iterator[torch.Tensor | list]:
    """Tensors, and lists of tensors, among nested values."""
    for value in values:
        if torch.is_tensor(value) and value.ndim:
            yield value
        elif isinstance(value, dict):
            yield from _flat(value.values())
        elif isinstance(value, list | tuple) and value:
            if all(torch.is_tensor(one) for one in value):
                yield list(value)
            yield from _flat(value)


def _same(row, other) -> bool:
    """Whether two rows carry the same; a cast of one counts."""
    if not torch.is_tensor(row) or not torch.is_tensor(other):
        ours, others = (list(_flat([value])) if not torch.is_tensor(value) else [value] for value in (row, other))
        ours, others = ([one for one in values if torch.is_tensor(one)] for values in (ours, others))
        return bool(ours) and len(ours) == len(others) and all(map(_same, ours, others))
    return row.shape == other.shape and torch.equal(row, other.to(row))


def _same_part(text: list, start: int, stop: int, other, first: int, last: int) -> bool:
    """Whether the first and the last row of a part carry what two rows of another text do."""
    return _same(text[start], other[first]) and _same(text[stop - 1], other[last])


_NEGATIVE = ("negative", "uncond", "null")
_NO_TEXT = (
    "mask", "ids", "size", "crop", "pos", "len", "latent", "noise", "pred", "scale", "model", "out", "sample", "control",
)  # fmt: skip
_TEXT = ("encoder_hidden", "text", "pool", "prompt", "cap")  # not pictures, which some pipelines order otherwise


def _negatives(variables: dict[str, Any]) -> list[tuple[torch.Tensor | list, torch.Tensor | list | None]]:
    """Texts of the unconditional part that a pipeline holds, each with that of the conditional part if it has the
    same name without "negative"."""
    found = []
    for name, value in variables.items():
        mark = next((f"{mark}_" for mark in _NEGATIVE if mark in name), "neg_" if name.startswith("neg_") else None)
        if mark is None or any(word in name for word in _NO_TEXT):
            continue
        ours, theirs = list(_flat([value])), list(_flat([variables.get(name.replace(mark, ""))]))
        theirs = theirs if len(theirs) == len(ours) else [None] * len(ours)
        found += list(zip(ours, theirs, strict=True))
    return found


@dataclass
class _Progress:
    """What is remembered of a generation to tell its calls apart."""

    first: float | None = None
    second: float | None = None  # the first other time: rising or falling
    timestep: float | None = None
    step: Any = None  # which turn of the pipeline's loop
    ordinal: int = 0  # which call of it
    shapes: dict[str, tuple] = field(default_factory=dict)  # of the sample of each denoiser
    seen: list[str] = field(default_factory=list)  # roles in this turn
    texts: dict[str, tuple] = field(default_factory=dict)  # that the conditional rows of this turn carried
    known: dict[tuple, tuple[tuple[str, ...], bool]] = field(default_factory=dict)  # by place in the source
    held: Any = None  # the sampler's timestep, so that its id is not another's


class CallReader:
    """Makes records of the calls of a denoiser, or of several that take turns."""

    def __init__(self):
        self._undriven: tuple[Generation, _Progress] | None = None  # of calls that no pipeline makes

    def restart(self) -> None:
        """The next call that no pipeline makes begins a generation."""
        self._undriven = None

    def read(self, arguments: Arguments, component: str = "") -> Call:
        """
        The record of a call.

        Args:
            arguments (`Arguments`): of the call.
            component (`str`): the name of the denoiser in its pipeline.

        Raises:
            `ValueError`: a pipeline that calls in a way that is not known.
        """
        caller = find_caller()
        return self._undriven_call(arguments) if caller is None else self._driven_call(arguments, caller, component)

    # A denoiser that somebody calls without a pipeline: all rows are conditional, and each has the time it is told.

    def _undriven_call(self, arguments: Arguments) -> Call:
        rows, times = len(arguments.sample), _row_times(arguments)
        time, shape = times[0], _shape(arguments.sample)
        last = None if self._undriven is None else self._undriven[1]
        is_start = last is None or last.shapes[""] != shape or (time > last.timestep and time >= last.first)
        if is_start:
            self._undriven = Generation(), _Progress(first=time, shapes={"": shape})
        generation, progress = self._undriven
        progress.timestep = time
        starts = [i for i in range(rows) if i == 0 or times[i] != times[i - 1]]
        parts = tuple(
            Part("cond", None if len(starts) == 1 else i, start / rows, stop / rows, times[start])
            for i, (start, stop) in enumerate(zip(starts, [*starts[1:], rows], strict=True))
        )
        grid = _grid(arguments.sample, {}, arguments)
        return Call(time, parts, rows, rows, rows, grid, None, None, weakref.ref(generation), None, (), is_start)

    def _driven_call(self, arguments: Arguments, caller: Caller, component: str) -> Call:
        family, variables = caller.family, caller.variables
        if family.refused:
            raise ValueError(f"{type(caller.pipeline).__name__} cannot be followed: {family.refused}.")
        progress = caller.generation.kept.setdefault(self, _Progress())
        rows = len(arguments.sample)
        images, prompts = _images(variables, rows)
        sampler_time, scheduler = caller.value(family.time), _scheduler(caller)
        if _is_aside(arguments, caller, sampler_time):
            part = Part("other", None, 0.0, 1.0, 0.0)
            return Call(
                0.0, (part,), rows, images, prompts, _grid(arguments.sample, variables, arguments), None, None,
                weakref.ref(caller.generation), weakref.ref(caller.pipeline), (), False,
            )  # fmt: skip
        if sampler_time is None:
            sampler_time = _told(arguments, caller, scheduler)
        view = tuple(variables.get(name) for name in family.view)
        time = training_time(_number(sampler_time, caller), scheduler)
        turn = (id(sampler_time), *(variables.get(name) for name in family.index), *view)
        if turn != progress.step or not progress.ordinal:
            progress.step, progress.ordinal, progress.seen, progress.texts = turn, 0, [], {}
        progress.held = sampler_time
        is_start = self._moves(progress, time, component, (images, *_shape(arguments.sample)[1:]))
        roles, is_tiled = self._roles(arguments, caller, component, rows, images, prompts, progress)
        share, ordinal = 1 / len(roles), progress.ordinal
        parts = tuple(
            Part(role, None if role == "cond" else 100 * ordinal + i, i * share, (i + 1) * share, time)
            for i, role in enumerate(roles)
        )
        progress.ordinal += 1
        progress.seen += roles
        guidance = caller.property("guidance_scale")
        return Call(
            time, parts, rows, images, prompts, _grid(arguments.sample, variables, arguments),
            float(guidance) if isinstance(guidance, int | float) else None, noise_schedule(scheduler),
            weakref.ref(caller.generation), weakref.ref(caller.pipeline), view, is_start, is_tiled, _given(arguments),
        )  # fmt: skip

    def _moves(self, progress: _Progress, time: float, component: str, shape: tuple) -> bool:
        """Take note of the time; whether a trajectory begins. An inverse sampler's rises."""
        is_start = progress.first is None or shape != progress.shapes.get(component, shape)
        if not is_start and progress.second is not None:
            falls = progress.second < progress.first
            back = time > progress.timestep and time >= progress.first
            is_start = back if falls else time < progress.timestep and time <= progress.first
        if is_start:
            progress.first, progress.second = time, None
        elif progress.second is None and time != progress.first:
            progress.second = time
        progress.timestep, progress.shapes[component] = time, shape
        return is_start

    def _roles(
        self, arguments: Arguments, caller: Caller, component: str, rows: int, images: int, prompts: int | None,
        progress: _Progress,
    ) -> tuple[tuple[str, ...], bool]:  # fmt: skip
        """What the equal parts of the batch are, and whether its images are of each prompt in turn."""
        if component in caller.family.components:
            return (caller.family.components[component],), False
        guided = bool(caller.property("do_classifier_free_guidance", False))
        place = (component, caller.line, progress.ordinal, rows, images, guided)
        if place not in progress.known or self._names_part(caller):
            progress.known[place] = self._compare(arguments, caller, rows, images, prompts, guided, progress)
        return progress.known[place]

    def _names_part(self, caller: Caller) -> str | None:
        """The part of guidance that a guider calls for; guiders call once for each, and say which."""
        for name in ("guider_state_batch", "batch"):
            identifier = getattr(caller.variables.get(name), "__guidance_identifier__", None)
            if identifier is not None:
                return {"pred_cond": "cond", "pred_uncond": "uncond"}.get(identifier, "perturbed")
        return None

    def _compare(
        self, arguments: Arguments, caller: Caller, rows: int, images: int, prompts: int | None, guided: bool,
        progress: _Progress,
    ) -> tuple[tuple[str, ...], bool]:  # fmt: skip
        """What the equal parts of a batch are, by the text they carry."""
        if rows % images:
            raise ValueError(
                f"{type(caller.pipeline).__name__} calls the denoiser with {rows} rows for {images} images: this "
                "layout of guidance is not supported; expected a multiple."
            )
        texts, negatives = arguments.texts(), _negatives(caller.variables)
        bounds = [(start, start + images) for start in range(0, rows, images)]
        named = self._names_part(caller)
        if named is not None:
            roles = (named,)
        elif len(bounds) > 1:
            roles = _batch(texts, negatives, bounds, caller, guided)
        else:
            roles = (_single(texts, negatives, images, caller.family, progress),)
        if "cond" not in roles:
            return roles, False
        start, stop = bounds[roles.index("cond")]
        progress.texts = {name: (text[start], text[stop - 1]) for name, text in texts.items()}
        return roles, prompts is not None and 1 < prompts < images and _take_turns(texts, start, prompts, caller)


def _take_turns(texts: dict[str, list], start: int, prompts: int, caller: Caller) -> bool:
    """Whether the images of several prompts are drawn in turns, one of each prompt."""
    told = [
        not beside
        for name, text in texts.items()
        if any(word in name for word in _TEXT)
        and not any(word in name for word in _NO_TEXT)
        and (beside := _same(text[start], text[start + 1])) != _same(text[start], text[start + prompts])
    ]
    if any(told) and not all(told):
        raise ValueError(
            f"{type(caller.pipeline).__name__} gives an image the text of one prompt and the pooled text of another, "
            "where there are several prompts and several images of each: draw one at a time."
        )
    return any(told)


def _matches(text, start: int, stop: int, known) -> bool:
    return len(known) > 0 and _same_part(text, start, stop, known, 0, len(known) - 1)


def _batch(texts: dict[str, list], negatives: list, bounds: list, caller: Caller, guided: bool) -> tuple[str, ...]:
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
                        again = _same_part(text, *bound, text, conditional[0], conditional[1] - 1)
                        roles.append("perturbed" if again else "other")
                return tuple(roles)
    layouts = [tuple(layout.split()) for layout in caller.family.batch] if guided else [("cond",)]
    if bool(caller.property("do_perturbed_attention_guidance", False)):
        layouts = [(*layout, "perturbed") for layout in layouts]
    elif not guided and not negatives:  # guidance that the pipeline has no property for
        layouts = [tuple(layout.split()) for layout in caller.family.batch]
    fitting = [layout for layout in layouts if len(layout) == len(bounds)]
    if not fitting:
        raise ValueError(
            f"{type(caller.pipeline).__name__} calls the denoiser with {len(bounds)} rows for each image: this layout "
            f"of guidance is not supported; expected {' or '.join(' + '.join(layout) for layout in layouts)}."
        )
    return fitting[0]


def _single(texts: dict[str, list], negatives: list, images: int, family: Family, progress: _Progress) -> str:
    """Of a call for one part of guidance alone."""
    either = False
    for text in texts.values():
        for negative, positive in negatives:
            if _matches(text, 0, images, negative):
                either = True
                if positive is None or not len(positive) or not _matches(text, 0, images, positive):
                    return "uncond"
    if not progress.seen:
        return family.calls[0]
    shared = texts.keys() & progress.texts.keys()
    again = bool(shared) and all(
        _same(texts[name][0], progress.texts[name][0]) and _same(texts[name][images - 1], progress.texts[name][1])
        for name in shared
    )
    return "perturbed" if again and not (either and "uncond" not in progress.seen) else family.calls[-1]


def _is_aside(arguments: Arguments, caller: Caller, sampler_time) -> bool:
    """Whether a call is no step of denoising but prepares something."""
    for what in caller.family.aside:
        name, is_argument, value = what.partition("=")
        if is_argument and arguments.by_name.get(name) == value or caller.method == what:
            return True
        if what == "before the loop" and sampler_time is None:
            return True
    return False


def _scheduler(caller: Caller):
    """What makes the timesteps of the loop that is running."""
    for name in ("scheduler", "prior_scheduler", "decoder_scheduler"):
        scheduler = getattr(caller.pipeline, name, None)
        if scheduler is not None:
            return scheduler
    raise ValueError(f"{type(caller.pipeline).__name__} has no scheduler that says at which timestep it is.")


def _told(arguments: Arguments, caller: Caller, scheduler) -> float:
    """The sampler's timestep that the denoiser is told, of a pipeline that keeps none among its variables."""
    told, timesteps = _row_times(arguments)[0], getattr(scheduler, "timesteps", None)
    for candidate in (told, 1000 * told, 1000 * (1 - told)) if timesteps is not None else ():
        if ((timesteps - candidate).abs() < 1e-3).any():
            return candidate
    raise ValueError(
        f"{type(caller.pipeline).__name__} calls its denoiser at {told:.4g}, which is none of its sampler's timesteps, "
        "and has no variable `t` that says where it is: expected either."
    )


def _number(timestep, caller: Caller) -> float:
    if torch.is_tensor(timestep) and timestep.numel() > 1:
        first, *others = timestep.flatten().tolist()
        if any(other != first for other in others):
            raise ValueError(
                f"{type(caller.pipeline).__name__} denoises frames at different times in one call: that cannot be "
                "followed, as an edit has one time."
            )
        return float(first)
    return float(timestep)


def _row_times(arguments: Arguments) -> list[float]:
    """The time of each row as the denoiser is told it, in training units."""
    rows, told = len(arguments.sample), arguments.timestep
    if told is None:
        return [0.0] * rows
    if not torch.is_tensor(told) or told.ndim == 0:
        return [float(told)] * rows
    each = told.reshape(len(told), -1).amax(1).tolist()  # tokens that are given have time 0
    return each if len(each) == rows else [each[0]] * rows


def _given(arguments: Arguments) -> torch.Tensor | None:
    """Tokens whose own time is 0 while others' is not: given, as the first frame of image-to-video is."""
    told = arguments.timestep
    if not torch.is_tensor(told) or told.ndim < 2 or told.shape[1] == 1:
        return None
    told = told.flatten(1)
    return (told == 0) & (told.amax(1, keepdim=True) > 0)


def _images(variables: dict[str, Any], rows: int) -> tuple[int, int | None]:
    """How many images and prompts are being drawn; the latter `None` where that is not known."""
    prompts, latents = variables.get("batch_size"), variables.get("latents")
    each = next((variables[name] for name in _PER_PROMPT if isinstance(variables.get(name), int)), 1)
    drawn = len(latents) if torch.is_tensor(latents) and latents.ndim and rows % len(latents) == 0 else None
    if not isinstance(prompts, int) or prompts < 1:
        return drawn or rows, None
    if drawn == prompts and prompts % each == 0:  # some pipelines count the images of all prompts in `batch_size`
        return drawn, prompts // each
    images = next((count for count in (prompts * each, prompts, drawn) if count and rows % count == 0), rows)
    return images, prompts if images % prompts == 0 else None


def _shape(sample) -> tuple[int, ...]:
    return tuple(sample.shape) if torch.is_tensor(sample) else (len(sample), *_shape(sample[0]))


def _grid(sample, variables: dict[str, Any], arguments: Arguments) -> tuple[int, int, int]:
    """Frames, height and width over which the sample lies; zeros where that is not known."""
    shape = _shape(sample)
    if len(shape) == 4:
        return 1, shape[2], shape[3]
    if len(shape) == 5:  # (rows, channels, frames, ...) or (rows, frames, channels, ...)
        frames = shape[1] if shape[2] == arguments.channels != shape[1] else shape[2]
        return frames, shape[3], shape[4]
    told = arguments.by_name
    sizes = [told.get(name) for name in ("num_frames", "height", "width")]
    if all(isinstance(size, int) for size in sizes):
        return tuple(sizes)
    height, width = (variables.get(name) for name in ("height", "width"))
    if isinstance(height, int) and isinstance(width, int):
        return 1, height, width
    return 0, 0, 0


_OVER_TIME = ("motion_modules", "temp_attentions", "temp_convs", "temporal_transformer_blocks", "transformer_in")


def token_grid(call: Call, site: str, batch: int, space: tuple[int, ...]) -> TokenGrid | None:
    """
    How the tokens of an activation lie; `None` if that is not known, and where they are no places: of text, and in
    attention over time, whose tokens are frames.

    Args:
        batch (`int`): rows of the activation, which may hold frames beside one another.
        space (`tuple[int, ...]`): the shape of what a row holds: `(height, width)`, `(frames, height, width)` or
            `(tokens,)`.
    """
    frames, height, width = call.grid
    if is_text(site) or call.view or any(part in _OVER_TIME for part in site.split(".")):
        return None
    if batch == call.images < call.rows:
        beside = 1  # a cache left the unconditional rows out
    elif batch not in (call.rows, call.rows * frames):
        return None
    else:
        beside = batch // call.rows
    if len(space) == 2:
        return TokenGrid(*space, 1, beside)
    if len(space) == 3:
        return TokenGrid(*space[1:], space[0], beside)
    if not height or not width:
        return None
    depth = 1 if beside > 1 else frames
    for share in (1, 2, 4, 8):  # frames that one token holds
        if depth % share == 0:
            factor = math.sqrt(height * width * (depth // share) / space[0])
            patch = round(factor)
            if patch and abs(factor - patch) < 1e-6 and height % patch == width % patch == 0:
                return TokenGrid(height // patch, width // patch, depth // share, beside)
    return None
