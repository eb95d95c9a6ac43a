"""`Call`, the record of a denoiser call: its timestep, the guidance branch of each batch row, and its size."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from .arguments import Arguments
from .blocks import TEXT_ENCODERS
from .callers import Caller, Generation, find_caller, find_scopes
from .grid import Grid, grid_of
from .rows import Drawn, Turn, named_part, roles_of
from .texts import Encoded
from .time import noise_schedule, training_time

_PICTURES = ("image_latents", "init_latents", "image", "init_image")  # pipelines' variables for a given picture


@dataclass(frozen=True)
class Part:
    """
    Consecutive rows of a batch that belong to one guidance branch.

    Args:
        role (`str`): a key of `rows.ROLES`.
        branch (`int`, *optional*): a number for each branch of a step, by which its memories are kept; `None` for the
            conditional branch, unless its rows have different timesteps.
        start, stop (`float`): the part of the batch, from 0 to 1.
        timestep (`float`): in training units.
    """

    role: str
    branch: int | None
    start: float
    stop: float
    timestep: float

    def rows(self, batch: int) -> slice:
        """The rows of the part in a batch at a site, which may have several rows for each one of the sample."""
        return slice(round(self.start * batch), round(self.stop * batch))


@dataclass(frozen=True)
class Call:
    """
    The record of one call of a denoiser, or of a text encoder. Steering, recording and measuring all use it.

    Args:
        timestep (`float`): the sampler's timestep in training units, 1000 at pure noise and 0 at the image. If no
            pipeline makes the call and rows have different timesteps, that of the first row.
        parts (`tuple[Part, ...]`): the guidance branches of the batch.
        rows (`int`): number of rows of the batch.
        images (`int`): number of images that are drawn.
        prompts (`int`, *optional*): number of prompts of these images, if it is known.
        grid (`Grid`): the size of the sample.
        run (`weakref.ref[Generation]`): see `generation`.
        caller (`weakref.ref`, *optional*): see `pipeline`.
        guidance (`float`, *optional*): guidance scale at this step, if it is known.
        alphas_cumprod (`torch.Tensor`, *optional*): noise schedule of the sampler.
        ahead (`tuple[float, ...]`): on the first call of a trajectory: this timestep and all that follow, in training
            units, if the sampler says them.
        view (`tuple`): identifies the part of the picture or the window of frames, if a pipeline draws several.
        is_start (`bool`): whether the call begins a trajectory: that of the generation, or of the next window or chunk
            in it.
        in_turns (`bool`): whether consecutive images are of different prompts. By default all images of a prompt are
            consecutive.
        given_latents (`torch.Tensor`, *optional*): the picture that the generation starts from, latents or pixels.
        given (`torch.Tensor`, *optional*): true for tokens that are given instead of denoised, such as those of a
            first frame, `(rows, tokens)`.
        encoder (`str`): component of the text encoder that is called; empty for a denoiser. Text is encoded before
            denoising: its timestep is 1000. Its rows are prompts, and are of one guidance branch. `view` counts the
            calls for a branch: a long prompt may be encoded in several windows.
    """

    timestep: float
    parts: tuple[Part, ...]
    rows: int
    images: int
    prompts: int | None
    grid: Grid
    run: weakref.ref[Generation]  # weak, as the generation refers to what is kept for it
    caller: weakref.ref | None = None
    guidance: float | None = None
    alphas_cumprod: torch.Tensor | None = None
    ahead: tuple[float, ...] = ()
    view: tuple = ()
    is_start: bool = False
    in_turns: bool = False
    given_latents: torch.Tensor | None = field(default=None, compare=False)
    given: torch.Tensor | None = field(default=None, compare=False)
    encoder: str = ""

    @property
    def generation(self) -> Generation | None:
        """The generation that the call is part of; `None` once it is over."""
        return self.run()

    @property
    def pipeline(self) -> Any:
        """The pipeline that makes the call; `None` if no pipeline does."""
        return None if self.caller is None else self.caller()

    def parts_of(self, batch: int) -> Iterator[tuple[Part, slice]]:
        """
        The parts with their rows in a batch at a site. A cache may have run the site on the conditional rows alone.

        Raises:
            `ValueError`: the number of rows at the site is not a multiple of that of the call.
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
        """The rows with a role in a batch at a site; `None` if there are none."""
        slices = [rows for part, rows in self.parts_of(batch) if part.role == role]
        return slice(slices[0].start, slices[-1].stop) if slices else None


@dataclass
class _Progress:
    """What a [`CallReader`] remembers of a generation, to know which step and branch a call belongs to."""

    first: float | None = None  # first timestep of the trajectory
    second: float | None = None  # its first other timestep: shows whether time rises or falls
    timestep: float | None = None  # last timestep
    is_share: bool = False  # calls that no pipeline makes: whether time is a share of noise up to 1
    place: Any = None  # identifies the present turn of the pipeline's loop
    turn: Turn = field(default_factory=Turn)
    ordinal: int = 0  # number of the turn's next call
    shapes: dict[str, tuple] = field(default_factory=dict)  # shape of the sample, by denoiser
    known: dict[tuple, tuple[tuple[str, ...], bool]] = field(default_factory=dict)  # roles by place in the source
    held: Any = None  # the sampler's timestep, kept alive so that its id stays unique
    timesteps: tuple[torch.Tensor, list[float]] | None = None  # all timesteps of the sampler, and a copy on the CPU
    has_time: bool | None = None  # whether the pipeline's variable is the sampler's timestep


class CallReader:
    """Makes the records of the calls of a denoiser, or of several that are called alternately, and of text
    encoders."""

    def __init__(self):
        # calls that no pipeline makes, by thread or asyncio task
        self._undriven: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._texts: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # the same, of text encoders
        self._encoded: weakref.WeakKeyDictionary[Generation, dict[str, Encoded]] = weakref.WeakKeyDictionary()

    def restart(self) -> None:
        """Let the next call that no pipeline makes begin a generation."""
        self._undriven.clear()

    def read(self, arguments: Arguments, component: str = "") -> Call:
        """
        The record of a call.

        Args:
            arguments (`Arguments`): arguments of the call.
            component (`str`): name of the denoiser in its pipeline.

        Raises:
            `ValueError`: it is not known how the pipeline calls its denoiser.
        """
        caller = find_caller()
        if component in TEXT_ENCODERS:
            return self._text_call(arguments, caller, component)
        return self._undriven_call(arguments) if caller is None else self._driven_call(arguments, caller, component)

    def _text_call(self, arguments: Arguments, caller: Caller | None, component: str) -> Call:
        rows = len(arguments.sample)
        if caller is None:  # every text is a prompt
            generation, role, view = Generation(), "cond", (component, 0)
            self._texts[_context()] = generation  # keeps it until the next
        else:
            generation = caller.generation
            _check_followed(caller)
            numbers = arguments.by_name.get("input_ids")
            text = arguments.sample if numbers is None else numbers
            encoded = self._encoded.setdefault(generation, {}).setdefault(component, Encoded())
            role, number = encoded.next(text, find_scopes(generation))
            view = component, number
        return Call(
            1000.0, (Part(role, None if role == "cond" else 0, 0.0, 1.0, 1000.0),), rows, rows, rows, Grid(),
            weakref.ref(generation), caller=None if caller is None else weakref.ref(caller.pipeline), view=view,
            is_start=role == "cond", encoder=component,
        )  # fmt: skip

    # Calls that no pipeline makes: all rows are conditional, and each has the timestep that it is called with.

    def _undriven_call(self, arguments: Arguments) -> Call:
        rows, times, context = len(arguments.sample), _row_times(arguments), _context()
        last = self._undriven.get(context, (None, None))[1]
        if _is_share(arguments) and (last is None or last.is_share):
            times = [1000 * time for time in times]
        time, shape = times[0], arguments.shape
        is_start = last is None or last.shapes[""] != shape or (time > last.timestep and time >= last.first)
        if is_start:
            progress = _Progress(first=time, shapes={"": shape}, is_share=_is_share(arguments))
            self._undriven[context] = Generation(), progress
        generation, progress = self._undriven[context]
        progress.timestep = time
        starts = [i for i in range(rows) if i == 0 or times[i] != times[i - 1]]
        parts = tuple(
            Part("cond", None if len(starts) == 1 else i, start / rows, stop / rows, times[start])
            for i, (start, stop) in enumerate(zip(starts, [*starts[1:], rows], strict=True))
        )
        return Call(
            time, parts, rows, rows, rows, grid_of(arguments, {}), weakref.ref(generation), is_start=is_start
        )  # fmt: skip

    def _driven_call(self, arguments: Arguments, caller: Caller, component: str) -> Call:
        family, variables = caller.family, caller.variables
        _check_followed(caller)
        progress = caller.generation.memories.setdefault(self, _Progress())
        rows = len(arguments.sample)
        drawn = Drawn.of(variables, arguments.sample)
        record = {
            "rows": rows,
            "images": drawn.images,
            "prompts": drawn.prompts,
            "grid": grid_of(arguments, variables, caller.property("vae_scale_factor", 8)),
            "run": weakref.ref(caller.generation),
            "caller": weakref.ref(caller.pipeline),
        }
        sampler_time, scheduler = _sampler_time(arguments, caller, progress), _scheduler(caller)
        if _is_aside(arguments, caller, sampler_time):
            return Call(0.0, (Part("other", None, 0.0, 1.0, 0.0),), **record)
        if sampler_time is None:
            sampler_time = _matching_timestep(arguments, caller, scheduler)
        time = training_time(_number(sampler_time, caller, progress), scheduler)
        view = tuple(map(variables.get, family.view))
        place = (id(sampler_time), *map(variables.get, family.index), *view)
        if place != progress.place:
            progress.place, progress.turn, progress.ordinal = place, Turn(), 0
        progress.held = sampler_time
        shape = (drawn.images, *arguments.shape[1:])  # later calls of a turn may have other tokens
        is_start = not progress.ordinal and self._moves(progress, time, component, shape)
        roles, in_turns = self._roles(arguments, caller, component, drawn, progress)
        share = 1 / len(roles)
        parts = tuple(
            Part(role, None if role == "cond" else 100 * progress.ordinal + i, i * share, (i + 1) * share, time)
            for i, role in enumerate(roles)
        )
        progress.ordinal += 1
        progress.turn.roles += roles
        guidance = caller.property("guidance_scale")
        return Call(
            time, parts, **record, guidance=float(guidance) if isinstance(guidance, int | float) else None,
            alphas_cumprod=noise_schedule(scheduler), ahead=_ahead(scheduler, time) if is_start else (),
            view=view, is_start=is_start, in_turns=in_turns,
            given_latents=next((variables[n] for n in _PICTURES if torch.is_tensor(variables.get(n))), None),
            given=_given(arguments),
        )  # fmt: skip

    def _moves(self, progress: _Progress, time: float, component: str, shape: tuple) -> bool:
        """Record the timestep of a call; returns whether it begins a trajectory. For inverse samplers time rises."""
        is_start = progress.first is None or shape != progress.shapes.get(component, shape)
        if not is_start and progress.second is not None:
            falls = progress.second < progress.first
            back = time > progress.timestep and time >= progress.first
            is_start = back if falls else time < progress.timestep
        if is_start:
            progress.first, progress.second = time, None
        elif progress.second is None and time != progress.first:
            progress.second = time
        progress.timestep, progress.shapes[component] = time, shape
        return is_start

    def _roles(
        self, arguments: Arguments, caller: Caller, component: str, drawn: Drawn, progress: _Progress
    ) -> tuple[tuple[str, ...], bool]:
        """The roles of the equal parts of the batch, and whether consecutive images are of different prompts. Cached
        by the place in the source that calls, as comparing texts waits for the device."""
        if component in caller.family.components:
            return (caller.family.components[component],), False
        guided = bool(caller.property("do_classifier_free_guidance", False))
        place = (
            component,
            caller.line,
            progress.ordinal,
            len(arguments.sample),
            drawn.images,
            guided,
            named_part(caller),
        )
        if place not in progress.known:
            progress.known[place] = roles_of(arguments, caller, drawn, guided, progress.turn)
        return progress.known[place]


def _check_followed(caller: Caller) -> None:
    if caller.family.refused:
        raise ValueError(f"{type(caller.pipeline).__name__} cannot be followed: {caller.family.refused}.")


def _is_aside(arguments: Arguments, caller: Caller, sampler_time) -> bool:
    """Whether a call is no step of denoising, but a preparation that the family lists in `aside`."""
    for what in caller.family.aside:
        name, is_argument, value = what.partition("=")
        if is_argument and arguments.by_name.get(name) == value or caller.method == what:
            return True
        if what == "before the loop" and sampler_time is None:
            return True
    return False


def _scheduler(caller: Caller):
    """The sampler of a pipeline."""
    for name in ("scheduler", "prior_scheduler", "decoder_scheduler"):
        scheduler = getattr(caller.pipeline, name, None)
        if scheduler is not None:
            return scheduler
    raise ValueError(f"{type(caller.pipeline).__name__} has no scheduler that says at which timestep it is.")


def _sampler_time(arguments: Arguments, caller: Caller, progress: _Progress):
    """The sampler's timestep from the pipeline's variable for it; `None` if it has none. In pipelines that are not
    diffusers' own a variable `t` may be anything: at the first call it is compared to the denoiser's timestep."""
    value = caller.value(caller.family.time)
    if progress.has_time is None:
        is_number = isinstance(value, int | float) or torch.is_tensor(value) and value.numel()
        passed = arguments.timestep
        if not is_number or passed is None or caller.is_diffusers or torch.is_tensor(value) and value.numel() > 1:
            progress.has_time = value is None or bool(is_number)
        else:
            now, passed = float(torch.as_tensor(value).flatten()[0]), _row_times(arguments)[0]
            progress.has_time = any(abs(now - one) < 1e-3 * max(now, 1) for one in _candidates(passed))
    return value if progress.has_time else None


def _candidates(passed: float) -> tuple[float, ...]:
    """The sampler timesteps that the value passed to a denoiser may stand for."""
    return passed, 1000 * passed, 1000 * (1 - passed)


def _matching_timestep(arguments: Arguments, caller: Caller, scheduler) -> float:
    """For pipelines without a variable for the sampler's timestep: the one that the denoiser's timestep stands for."""
    (passed, *others), timesteps = _row_times(arguments), getattr(scheduler, "timesteps", None)
    if any(other != passed for other in others):
        _refuse_different_times(caller)
    for candidate in _candidates(passed) if timesteps is not None else ():
        if ((timesteps - candidate).abs() < 1e-3).any():
            return candidate
    raise ValueError(
        f"{type(caller.pipeline).__name__} calls its denoiser at {passed:.4g}, which is none of its sampler's "
        "timesteps, and has no variable `t` that says where it is: expected either."
    )


def _refuse_different_times(caller: Caller) -> NoReturn:
    raise ValueError(
        f"{type(caller.pipeline).__name__} denoises frames or images at different times in one call: that cannot be "
        "followed, as an edit has one time."
    )


def _ahead(scheduler, time: float) -> tuple[float, ...]:
    """The timesteps of a sampler from this one on, in training units; none if it does not say them."""
    timesteps = getattr(scheduler, "timesteps", None)
    if not torch.is_tensor(timesteps):
        return ()
    try:
        times = [training_time(timestep, scheduler) for timestep in timesteps.flatten().tolist()]
    except ValueError:  # those that are not reached may be out of range
        return ()
    return tuple(times[times.index(time) :] if time in times else times)


def _number(timestep, caller: Caller, progress: _Progress) -> float:
    """The sampler's timestep as a number, without waiting for the device at each step."""
    times = getattr(_scheduler(caller), "timesteps", None)
    on_device = torch.is_tensor(timestep) and timestep.device.type != "cpu"
    if on_device and timestep.ndim == 0 and torch.is_tensor(times) and times.dtype == timestep.dtype:
        place = (timestep.data_ptr() - times.data_ptr()) // times.element_size()
        if 0 <= place < len(times):  # a view of one of the sampler's timesteps
            if progress.timesteps is None or progress.timesteps[0] is not times:
                progress.timesteps = times, times.tolist()
            return progress.timesteps[1][place]
    if torch.is_tensor(timestep) and timestep.numel() > 1:
        first, *others = timestep.flatten().tolist()
        if any(other != first for other in others):
            _refuse_different_times(caller)
        return float(first)
    return float(timestep)


def _context() -> asyncio.Task | threading.Thread:
    """The running asyncio task, or else the running thread."""
    if asyncio._get_running_loop() is None:
        return threading.current_thread()
    return asyncio.current_task() or threading.current_thread()


def _is_share(arguments: Arguments) -> bool:
    """Whether the denoiser's timestep is a share of noise up to 1, as flow-matching models take it."""
    passed = arguments.timestep
    is_float = passed.is_floating_point() if torch.is_tensor(passed) else isinstance(passed, float)
    return is_float and 0 < max(_row_times(arguments)) <= 1


def _row_times(arguments: Arguments) -> list[float]:
    """The timestep of each row as it is passed to the denoiser; zeros if none is."""
    rows, passed = len(arguments.sample), arguments.timestep
    if passed is None:
        return [0.0] * rows
    if not torch.is_tensor(passed) or passed.ndim == 0:
        return [float(passed)] * rows
    each = passed.reshape(len(passed), -1).amax(1).tolist()  # given tokens have timestep 0
    return each if len(each) == rows else [each[0]] * rows


def _given(arguments: Arguments) -> torch.Tensor | None:
    """Which tokens are given instead of denoised, as a first frame of image-to-video is: those with timestep 0, if
    others have another."""
    passed = arguments.timestep
    if not torch.is_tensor(passed) or passed.ndim < 2 or passed.shape[1] == 1:
        return None
    passed = passed.flatten(1)
    return (passed == 0) & (passed.amax(1, keepdim=True) > 0)
