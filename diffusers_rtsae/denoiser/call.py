"""The record of a denoiser call: when in denoising it is, what each of its rows is, and over what its tokens lie."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from ..models import TokenGrid
from .arguments import Arguments
from .blocks import is_text
from .callers import Caller, Generation, find_caller
from .rows import Drawn, Turn, named_part, roles_of
from .time import noise_schedule, training_time

_PICTURES = ("image_latents", "init_latents", "image", "init_image")  # as pipelines name what they start from


@dataclass(frozen=True)
class Part:
    """
    Rows of a batch that are treated alike.

    Args:
        role (`str`): one of `rows.ROLES`.
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
        grid (`Grid`): over what the sample lies.
        run (`weakref.ref[Generation]`): the run it is part of, see `generation`.
        caller (`weakref.ref`, *optional*): the pipeline that calls, see `pipeline`.
        guidance (`float`, *optional*): scale of guidance at this very step, if that is known.
        alphas_cumprod (`torch.Tensor`, *optional*): of the sampler's noise schedule.
        view (`tuple`): which part of the picture or which window of frames it draws, where a pipeline draws several.
        is_start (`bool`): it begins a trajectory: of the run, or of the next window or chunk drawn in it.
        in_turns (`bool`): the images of several prompts are drawn in turns, one of each prompt.
        given_latents (`torch.Tensor`, *optional*): the picture that a generation starts from, as latents or as pixels.
        given (`torch.Tensor`, *optional*): tokens that are given and not denoised, `(rows, tokens)`: a first frame.
    """

    timestep: float
    parts: tuple[Part, ...]
    rows: int
    images: int
    prompts: int | None
    grid: Grid
    run: weakref.ref[Generation]  # weak, as a generation keeps what belongs to it
    caller: weakref.ref | None = None
    guidance: float | None = None
    alphas_cumprod: torch.Tensor | None = None
    view: tuple = ()
    is_start: bool = False
    in_turns: bool = False
    given_latents: torch.Tensor | None = field(default=None, compare=False)
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


@dataclass
class _Progress:
    """What is remembered of a generation to tell its calls apart."""

    first: float | None = None
    second: float | None = None  # the first other time: rising or falling
    timestep: float | None = None
    is_share: bool = False  # of calls that no pipeline makes: time was told as a share of noise, not in training units
    place: Any = None  # of this turn in the pipeline's loop
    turn: Turn = field(default_factory=Turn)
    ordinal: int = 0  # of this turn's next call
    shapes: dict[str, tuple] = field(default_factory=dict)  # of the sample of each denoiser
    known: dict[tuple, tuple[tuple[str, ...], bool]] = field(default_factory=dict)  # by place in the source
    held: Any = None  # the sampler's timestep, so that its id is not another's
    timesteps: tuple[torch.Tensor, list[float]] | None = None  # all of the sampler's, and the same on the host
    has_time: bool | None = None  # whether the pipeline's variable is the sampler's timestep


class CallReader:
    """Makes records of the calls of a denoiser, or of several that take turns."""

    def __init__(self):
        # of calls that no pipeline makes, by the thread or asyncio task that does
        self._undriven: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def restart(self) -> None:
        """The next call that no pipeline makes begins a generation."""
        self._undriven.clear()

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
        rows, times, strand = len(arguments.sample), _row_times(arguments), _strand()
        last = self._undriven.get(strand, (None, None))[1]
        if _is_share(arguments) and (last is None or last.is_share):
            times = [1000 * time for time in times]
        time, shape = times[0], arguments.shape
        is_start = last is None or last.shapes[""] != shape or (time > last.timestep and time >= last.first)
        if is_start:
            progress = _Progress(first=time, shapes={"": shape}, is_share=_is_share(arguments))
            self._undriven[strand] = Generation(), progress
        generation, progress = self._undriven[strand]
        progress.timestep = time
        starts = [i for i in range(rows) if i == 0 or times[i] != times[i - 1]]
        parts = tuple(
            Part("cond", None if len(starts) == 1 else i, start / rows, stop / rows, times[start])
            for i, (start, stop) in enumerate(zip(starts, [*starts[1:], rows], strict=True))
        )
        return Call(
            time, parts, rows, rows, rows, _grid(arguments, {}), weakref.ref(generation), is_start=is_start
        )  # fmt: skip

    def _driven_call(self, arguments: Arguments, caller: Caller, component: str) -> Call:
        family, variables = caller.family, caller.variables
        if family.refused:
            raise ValueError(f"{type(caller.pipeline).__name__} cannot be followed: {family.refused}.")
        progress = caller.generation.kept.setdefault(self, _Progress())
        rows = len(arguments.sample)
        drawn = Drawn.of(variables, arguments.sample)
        record = {
            "rows": rows,
            "images": drawn.images,
            "prompts": drawn.prompts,
            "grid": _grid(arguments, variables, caller.property("vae_scale_factor", 8)),
            "run": weakref.ref(caller.generation),
            "caller": weakref.ref(caller.pipeline),
        }
        sampler_time, scheduler = _sampler_time(arguments, caller, progress), _scheduler(caller)
        if _is_aside(arguments, caller, sampler_time):
            return Call(0.0, (Part("other", None, 0.0, 1.0, 0.0),), **record)
        if sampler_time is None:
            sampler_time = _told(arguments, caller, scheduler)
        time = training_time(_number(sampler_time, caller, progress), scheduler)
        view = tuple(map(variables.get, family.view))
        place = (id(sampler_time), *map(variables.get, family.index), *view)
        if place != progress.place:
            progress.place, progress.turn, progress.ordinal = place, Turn(), 0
        progress.held = sampler_time
        shape = (drawn.images, *arguments.shape[1:])  # other calls of a turn may have other tokens
        is_start = not progress.ordinal and self._moves(progress, time, component, shape)
        roles, in_turns = self._roles(arguments, caller, component, drawn, progress)
        share = 1 / len(roles)
        parts = tuple(
            Part(role, None if role == "cond" else 100 * progress.ordinal + i, i * share, (i + 1) * share, time)
            for i, role in enumerate(roles)
        )
        progress.ordinal += 1
        progress.turn.seen += roles
        guidance = caller.property("guidance_scale")
        return Call(
            time, parts, **record, guidance=float(guidance) if isinstance(guidance, int | float) else None,
            alphas_cumprod=noise_schedule(scheduler), view=view, is_start=is_start, in_turns=in_turns,
            given_latents=next((variables[n] for n in _PICTURES if torch.is_tensor(variables.get(n))), None),
            given=_given(arguments),
        )  # fmt: skip

    def _moves(self, progress: _Progress, time: float, component: str, shape: tuple) -> bool:
        """Take note of the time; whether a trajectory begins. An inverse sampler's rises."""
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
        """What the equal parts of the batch are, and whether its images are of each prompt in turn; looked at once for
        each place that calls, as comparing texts makes the device wait."""
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


def _sampler_time(arguments: Arguments, caller: Caller, progress: _Progress):
    """The variable of a pipeline that is the sampler's timestep; `None` if it has none. What others than diffusers
    call `t` may be anything: it is looked at once whether the denoiser is told the same."""
    found = caller.value(caller.family.time)
    if progress.has_time is None:
        is_number = isinstance(found, int | float) or torch.is_tensor(found) and found.numel()
        told = arguments.timestep
        if not is_number or told is None or caller.is_diffusers or torch.is_tensor(found) and found.numel() > 1:
            progress.has_time = found is None or bool(is_number)
        else:
            now, told = float(torch.as_tensor(found).flatten()[0]), _row_times(arguments)[0]
            progress.has_time = any(abs(now - one) < 1e-3 * max(now, 1) for one in _units(told))
    return found if progress.has_time else None


def _units(told: float) -> tuple[float, ...]:
    """What timesteps a denoiser that is told this may be at."""
    return told, 1000 * told, 1000 * (1 - told)


def _told(arguments: Arguments, caller: Caller, scheduler) -> float:
    """The sampler's timestep that the denoiser is told, of a pipeline that keeps none among its variables."""
    (told, *others), timesteps = _row_times(arguments), getattr(scheduler, "timesteps", None)
    if any(other != told for other in others):
        _refuse_different_times(caller)
    for candidate in _units(told) if timesteps is not None else ():
        if ((timesteps - candidate).abs() < 1e-3).any():
            return candidate
    raise ValueError(
        f"{type(caller.pipeline).__name__} calls its denoiser at {told:.4g}, which is none of its sampler's "
        "timesteps, and has no variable `t` that says where it is: expected either."
    )


def _refuse_different_times(caller: Caller) -> NoReturn:
    raise ValueError(
        f"{type(caller.pipeline).__name__} denoises frames or images at different times in one call: that cannot be "
        "followed, as an edit has one time."
    )


def _number(timestep, caller: Caller, progress: _Progress) -> float:
    """The sampler's timestep, without making a device wait for it at each step."""
    times = getattr(_scheduler(caller), "timesteps", None)
    on_device = torch.is_tensor(timestep) and timestep.device.type != "cpu"
    if on_device and timestep.ndim == 0 and torch.is_tensor(times) and times.dtype == timestep.dtype:
        place = (timestep.data_ptr() - times.data_ptr()) // times.element_size()
        if 0 <= place < len(times):  # it is one of them
            if progress.timesteps is None or progress.timesteps[0] is not times:
                progress.timesteps = times, times.tolist()
            return progress.timesteps[1][place]
    if torch.is_tensor(timestep) and timestep.numel() > 1:
        first, *others = timestep.flatten().tolist()
        if any(other != first for other in others):
            _refuse_different_times(caller)
        return float(first)
    return float(timestep)


def _strand() -> asyncio.Task | threading.Thread:
    """The asyncio task or else the thread that runs."""
    if asyncio._get_running_loop() is None:
        return threading.current_thread()
    return asyncio.current_task() or threading.current_thread()


def _is_share(arguments: Arguments) -> bool:
    """Whether the time is told as flow-matching models take it: a share of noise, up to 1."""
    told = arguments.timestep
    is_float = told.is_floating_point() if torch.is_tensor(told) else isinstance(told, float)
    return is_float and 0 < max(_row_times(arguments)) <= 1


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


@dataclass(frozen=True)
class Grid:
    """
    Over what a sample lies.

    Args:
        frames, height, width (`int`): of the sample; zeros where that is not known.
        pixels (`int`): of the picture that one of these is; what is smaller is left out.
    """

    frames: int = 0
    height: int = 0
    width: int = 0
    pixels: int = 1

    def tokens(self, count: int, frames: int) -> tuple[int, int, int] | None:
        """Frames, height and width of so many tokens over so many frames, if they are patches of it."""
        known = self.height // self.pixels, self.width // self.pixels
        for patch in range(1, 17):
            height, width = known[0] // patch, known[1] // patch
            if self.pixels == 1 and (known[0] % patch or known[1] % patch):
                continue
            for share in (1, 2, 4, 8):  # frames that one token holds
                if frames % share == 0 and frames // share * height * width == count:
                    return frames // share, height, width
        return None


def _grid(arguments: Arguments, variables: dict[str, Any], scale: int = 8) -> Grid:
    """Over what the sample lies; `scale`: pixels of the picture that one of its latents is."""
    shape = arguments.shape
    if len(shape) == 4:
        return Grid(1, shape[2], shape[3])
    if len(shape) == 5:  # (rows, channels, frames, ...) or (rows, frames, channels, ...)
        frames = shape[1] if shape[2] == arguments.channels != shape[1] else shape[2]
        return Grid(frames, shape[3], shape[4])
    sizes = [arguments.by_name.get(name) for name in ("num_frames", "height", "width")]
    if all(isinstance(size, int) for size in sizes):
        return Grid(*sizes)
    height, width = (variables.get(name) for name in ("height", "width"))
    if isinstance(height, int) and isinstance(width, int):
        return Grid(1, height, width, pixels=scale)
    return Grid()


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
    frames = call.grid.frames
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
    found = call.grid.tokens(space[0], 1 if beside > 1 else frames) if frames else None
    return None if found is None else TokenGrid(found[1], found[2], found[0], beside)
