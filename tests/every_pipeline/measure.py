"""
What steering does to one pipeline class, held against what it should do.

The truth does not come from the plugin: rows are told by which arguments of a denoiser call change when the prompt
alone, or the negative prompt alone, is another; time by what the pipeline tells its scheduler after the call; and the
edit by what a site returned before it and what the network went on with.
"""

from __future__ import annotations

import functools
import inspect
import traceback
import warnings
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import diffusers_rtsae
from diffusers_rtsae import RTSAE, list_sites
from diffusers_rtsae.denoiser import describe, get_denoisers, get_site, training_time

from .builds import Ask, Built

AMOUNT = 3.0  # the length of what an edit adds to each token
PACKAGE = str(Path(diffusers_rtsae.__file__).parent)
_TIMES = ("timestep", "timesteps", "t", "r", "timestep_ratio", "timestep_r", "r_timestep", "sigma", "guidance")
# arguments that depend on the picture so far, or whose first dimension is not the batch
_NO_TEXT = (
    "prior_token",
    "control",
    "residual",
    "samples",
    "latent",
    "history",
    "cache",
    "rotary",
    "rope",
    "audio_hidden",
    "llama3",
)


class Wrong(Exception):
    """Steering did something else than it should."""


class Refused(Exception):
    """Steering was refused in a sentence."""


def numbers(output) -> list[torch.Tensor]:
    """All numbers in what a pipeline returned."""
    if torch.is_tensor(output):
        return [output.detach().float().flatten()]
    if isinstance(output, np.ndarray):
        return [torch.from_numpy(output.astype("float32")).flatten()]
    if hasattr(output, "tobytes"):  # a picture
        return [torch.from_numpy(np.asarray(output, dtype="float32")).flatten()]
    if isinstance(output, dict) or hasattr(output, "values") and callable(output.values):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [part for one in output if one is not None for part in numbers(one)]
    return []


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True)
    )


@dataclass
class Call:
    """What one denoiser call showed."""

    component: str
    rows: int
    by_row: list[list[torch.Tensor]]  # arguments other than the sample and the time that have a value for each row
    timestep: float | None = None  # what the scheduler was told afterwards, in training units
    before: list[torch.Tensor] = field(default_factory=list)  # what the site returned, run by run
    after: list[torch.Tensor] = field(default_factory=list)  # what the network went on with
    given: torch.Tensor | None = None  # tokens with a time of their own, 0, `(rows, tokens)`
    is_aside: bool = False  # it returned nothing: it only filled a cache


class Watch:
    """Records a pipeline's denoiser calls with plain torch hooks, which know nothing of the plugin."""

    def __init__(self, pipe, site: str | None = None):
        self.pipe, self.site, self.calls, self._stack = pipe, site, [], ExitStack()

    def __enter__(self):
        for component, denoiser in get_denoisers(self.pipe).items():
            self._hook(denoiser.register_forward_pre_hook(self._call(component, denoiser), with_kwargs=True))
            self._hook(denoiser.register_forward_hook(self._end))
            if self.site is not None:
                module = get_site(denoiser, self.site)
                self._hook(module.register_forward_hook(self._keep("after")))
                self._hook(module.register_forward_hook(self._keep("before"), prepend=True))
        for scheduler in {type(one): one for one in _schedulers(self.pipe)}.values():
            self._listen(scheduler)
        return self

    def __exit__(self, *error):
        self._stack.close()

    def _hook(self, handle):
        self._stack.callback(handle.remove)

    def _listen(self, scheduler):
        kind, step = type(scheduler), type(scheduler).step

        @functools.wraps(step)  # pipelines look at its signature
        def told(self_, model_output, *args, **kwargs):
            timestep = args[0] if args else kwargs.get("timestep")
            for call in self.calls:
                if (
                    call.timestep is None
                    and timestep is not None
                    and (not torch.is_tensor(timestep) or timestep.numel() == 1)
                ):
                    with suppress(ValueError):  # a unit that is not known
                        call.timestep = training_time(float(timestep), scheduler)
            return step(self_, model_output, *args, **kwargs)

        kind.step = told  # of the class, as pipelines copy schedulers
        self._stack.callback(lambda: setattr(kind, "step", step))

    def _call(self, component: str, denoiser):
        names = [*_signature(type(denoiser))]

        def hook(module, args, kwargs):
            values = {**dict(zip(names, args, strict=False)), **kwargs}
            sample = next(name for name in names if values.get(name) is not None)
            rows = len(values[sample])
            others = [
                value
                for name, value in values.items()
                if name not in (sample, *_TIMES) and not any(word in name for word in _NO_TEXT)
            ]
            told = next((values[name] for name in _TIMES if torch.is_tensor(values.get(name))), None)
            given = None
            if told is not None and told.ndim > 1 and told.shape[1] > 1:
                given = (told.flatten(1) == 0) & (told.flatten(1).amax(1, keepdim=True) > 0)
            self.calls.append(Call(component, rows, list(_by_row(others, rows)), given=given))

        return hook

    def _end(self, module, args, output):
        self.calls[-1].is_aside = (output[0] if isinstance(output, tuple) else output) is None

    def _keep(self, when: str):
        def hook(module, args, output):
            if self.calls:
                getattr(self.calls[-1], when).append([one.detach().clone() for one in _tensors(output)])

        return hook


def _signature(kind: type) -> list[str]:
    return [*inspect.signature(kind.forward).parameters][1:]


def _schedulers(pipe):
    for name in ("scheduler", "prior_scheduler", "decoder_scheduler"):
        if getattr(pipe, name, None) is not None and hasattr(getattr(pipe, name), "step"):
            yield getattr(pipe, name)


def _by_row(values, rows: int):
    """Each argument that has a value for each row, as a list of these."""
    for value in values:
        if torch.is_tensor(value) and value.ndim > 1 and len(value) == 1 < rows:  # one for all
            yield [value[0].detach().clone()] * rows
        elif torch.is_tensor(value) and value.ndim and len(value) and len(value) % rows == 0:  # or frames of each row
            yield [row.detach().clone() for row in value.unflatten(0, (rows, -1))]
        elif isinstance(value, dict):
            yield from _by_row(value.values(), rows)
        elif isinstance(value, list | tuple):
            are_rows = len(value) == rows and all(torch.is_tensor(one) for one in value)
            if are_rows and not all(one.ndim > 2 and len(one) == rows for one in value):  # else one of each layer
                yield [one.detach().clone() for one in value]
            elif len(value) == rows and all(isinstance(one, list | tuple) and one for one in value):
                yield [torch.cat([part.flatten().float() for part in _nested(one)]) for one in value]
            else:
                yield from _by_row(value, rows)


def _nested(value) -> list[torch.Tensor]:
    """All tensors in nested lists, at least an empty one."""
    if torch.is_tensor(value):
        return [value]
    inner = [part for one in value for part in _nested(one)] if isinstance(value, list | tuple) else []
    return inner or [torch.zeros(0)]


def _tensors(output) -> list[torch.Tensor]:
    if torch.is_tensor(output):
        return [output]
    if hasattr(output, "sample"):
        return [output.sample]
    return [
        tensor
        for one in output
        if one is not None
        for tensor in (_tensors(one) if isinstance(one, list | tuple) else [one])
    ]


def dictionary(site: str, width: int) -> dict[str, RTSAE]:
    """Its first latent adds one vector of length `AMOUNT` to a token, at every step the same."""
    torch.manual_seed(1)
    made = RTSAE(site, width, [961, 481, 1], 8, 2)
    with torch.no_grad():
        made.decoder.copy_(F.normalize(torch.randn(8, width), dim=1)[:, None].expand(8, 3, width))
    made.typical_activation.fill_(AMOUNT)
    made.max_activation.fill_(2 * AMOUNT)
    return {site: made}


class Subject:
    """A built pipeline that is run in many ways."""

    def __init__(self, name: str, built: Built):
        self.name, self.built, self.pipe = name, built, built.pipe
        self.facts: dict = {}

    def run(self, ask: Ask, site: str | None = None) -> tuple[list[torch.Tensor], list[Call]]:
        torch.manual_seed(0)
        with torch.no_grad(), Watch(self.pipe, site) as watch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = numbers(self.pipe(**self.built.call(ask)))
        return result, watch.calls

    def steered(self, ask: Ask, site: str, strength=1.0, **options) -> tuple[list[torch.Tensor], list[Call]]:
        """A run with the first latent of a site's dictionary added."""
        with self.pipe.rtsae_steering({(site, 0): strength}, clip=False, **options):
            return self.run(ask, site)

    def texts(self, ask: Ask, which: int | None = None) -> list[list[str]]:
        """For each call, what each row follows: the prompts (or one of them), the negative prompt, or neither."""
        _, base = self.run(ask)
        prompts = tuple(p + 10 if which in (None, i) else p for i, p in enumerate(ask.prompts))
        _, other = self.run(ask._replace(prompts=prompts))
        _, negative = self.run(ask._replace(negative=ask.negative + 10)) if self.built.negative else (None, base)
        if not self.built.text:
            return [["cond"] * call.rows for call in base]
        rest = "uncond" if ask.guided and not self.built.negative else "other"
        found = []
        for one, by_prompt, by_negative in zip(base, other, negative, strict=False):
            roles = []
            for row in range(one.rows):
                own = _differs(one, by_prompt, row)
                roles.append(
                    "?" if own is None else "cond" if own else "uncond" if _differs(one, by_negative, row) else rest
                )
            found.append(roles)
        return found


def _differs(one: Call, other: Call, row: int) -> bool | None:
    """Whether what a row is told is another; `None` if that cannot be compared."""
    if len(one.by_row) != len(other.by_row) or one.rows != other.rows:
        return None
    pairs = ((a[row], b[row]) for a, b in zip(one.by_row, other.by_row, strict=True))
    return any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)


def moved(call: Call, block, vector: torch.Tensor) -> list[torch.Tensor]:
    """How far each token of each row moved along `vector`, run by run, `(rows, tokens)`; raises `Wrong` if anything
    else changed."""
    found = []
    for before, after in zip(call.before, call.after, strict=True):
        changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if not torch.equal(a, b)]
        index = 0 if block.index is None or len(before) == 1 else min(block.index, len(before) - 1)
        expected = before[index]
        strangers = [
            i for i in changed if not (before[i].shape == expected.shape and torch.equal(before[i], expected))
        ]
        if strangers:
            raise Wrong(f"elements {strangers} of what the block returns changed, expected {index}")
        difference = block.to_tokens(after[index]) - block.to_tokens(before[index])
        along = difference @ vector / vector.square().sum()
        if (difference - along[..., None] * vector).abs().max() > 1e-2:
            raise Wrong("the change has another direction")
        found.append(along)
    return found


def roles_of(call: Call, truth: list[str], along: torch.Tensor) -> list[str]:
    """The truth of each row of an activation, which may hold frames beside one another."""
    if len(along) % len(truth):
        raise Wrong(f"{len(along)} rows at the site, {len(truth)} in the call")
    each = len(along) // len(truth)
    return [role for role in truth for _ in range(each)]


EXPECTED = {
    "cond": {"cond": 1.0, "uncond": 0.0, "other": 0.0},
    "all": {"cond": 1.0, "uncond": 1.0},
    "contrast": {"cond": 1.0, "uncond": -1.0},
}


def check_moves(
    subject: Subject, site: str, ask: Ask, truth: list[list[str]], apply_to: str, window=(0.0, 1.0), **options
) -> None:
    """Steer, and raise `Wrong` unless every row of every call moved as it should."""
    block = describe(get_site(next(iter(get_denoisers(subject.pipe).values())), site))
    vector = subject.vectors[site]
    _, calls = subject.steered(ask, site, apply_to=apply_to, start=window[0], end=window[1], **options)
    if len(calls) != len(truth):
        raise Wrong(f"{len(calls)} calls, {len(truth)} without steering")
    any_run, any_cond = False, False
    for number, (call, roles) in enumerate(zip(calls, truth, strict=True)):
        progress = None if call.timestep is None else 1 - call.timestep / 1000
        inside = progress is None or window[0] - 1e-6 <= progress <= window[1] + 1e-6
        for along in moved(call, block, vector):
            any_run = True
            for row, role in enumerate(roles_of(call, roles, along)):
                if role == "?" or call.is_aside or progress is None and window != (0.0, 1.0):
                    continue
                wanted = EXPECTED[apply_to].get(role) if inside else 0.0
                if wanted is None:  # it follows no prompt, and whether it is guided away from is not known
                    continue
                # what guidance makes worse on purpose follows the prompt and moves with it
                any_cond |= role == "cond" and inside
                tokens = torch.full_like(along[row], wanted)
                if call.given is not None and call.given.shape == along.shape:
                    tokens[call.given[row]] = 0  # what is given is left as it is
                if (along[row] - tokens).abs().max() > 1e-2:
                    raise Wrong(
                        f"call {number}, row {row} ({role}), t {call.timestep}: moved {along[row].mean():.2f} (from "
                        f"{along[row].min():.2f} to {along[row].max():.2f}), expected {wanted:g} with "
                        f"apply_to={apply_to!r}, window {window}"
                    )
    if not any_run:
        raise Wrong("the site never ran")


def guarded(function, *args, **kwargs) -> None:
    """Call a check; what the plugin refuses in a sentence is `Refused`, other errors go on."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if last.startswith(PACKAGE):
            raise Refused(str(error)) from None
        raise


def widths_of(subject: Subject, sites: list[str], ask: Ask) -> dict[str, int]:
    """The channels of the sites that run."""
    found: dict[str, int] = {}
    with ExitStack() as stack:
        for denoiser in get_denoisers(subject.pipe).values():
            for site in sites:
                module = get_site(denoiser, site)

                def keep(module, args, output, site=site):
                    block = describe(module)
                    try:
                        found[site] = block.to_tokens(block.output(output)).shape[-1]
                    except ValueError as error:
                        found[site] = str(error)

                stack.callback(module.register_forward_hook(keep).remove)
        subject.run(ask)
    return found


def measure(name: str, built: Built, most: int | None = None) -> dict:
    """One row of the table; `most`: how many sites are looked at, the last ones, of all by default."""
    subject = Subject(name, built)
    pipe, row = subject.pipe, {"class": name}
    try:
        denoisers = get_denoisers(pipe)
    except ValueError as error:
        return row | {"verdict": "no denoiser", "why": str(error)}
    row["denoisers"] = {component: type(one).__name__ for component, one in denoisers.items()}
    plain, _ = subject.run(Ask())
    again, calls = subject.run(Ask())
    if not same(plain, again):
        return row | {"verdict": "untold", "why": "the plain pipeline gives another result the second time"}
    if not calls:
        return row | {"verdict": "no denoiser", "why": "its denoiser is not called"}
    row["calls"] = len(calls)
    row["rows"] = sorted({call.rows for call in calls})
    times = [call.timestep for call in calls if call.timestep is not None]
    row["time"] = [round(times[0], 1), round(times[-1], 1)] if times else None
    sites = list_sites(pipe)
    row["sites"] = len(sites)
    if not sites:
        return row | {"verdict": "wrong", "why": "no sites are listed"}
    sites = sites[-most:] if most else sites
    found = widths_of(subject, sites, Ask())
    unknown = {site: told for site, told in found.items() if isinstance(told, str)}
    widths = {site: width for site, width in found.items() if not isinstance(width, str)}
    row["never run"] = [site for site in sites if site not in found]
    if unknown:
        row["unknown blocks"] = sorted({type(get_site(next(iter(denoisers.values())), s)).__name__ for s in unknown})
    row["blocks"] = sorted({type(get_site(next(iter(denoisers.values())), site)).__name__ for site in widths})
    results = {}
    settings = {"guided": Ask()} if built.guided else {"plain": Ask(guided=False)}
    if built.guided:
        settings["plain"] = Ask(guided=False)
    for setting, ask in settings.items():
        results[setting] = _of_setting(subject, ask, widths)
    row["checks"] = results
    verdicts = {setting: result["verdict"] for setting, result in results.items()}
    whys = [f"{setting}: {result['why']}" for setting, result in results.items() if result.get("why")]
    if set(verdicts.values()) == {"exact"}:
        verdict = "exact"
    elif "wrong" in verdicts.values() or "crash" in verdicts.values():
        verdict = "wrong" if "wrong" in verdicts.values() else "crash"
    elif set(verdicts.values()) <= {"exact", "exact in part"}:
        verdict = "exact in part"
    elif verdicts.get("plain") == "exact":
        verdict = "exact without guidance"
    else:
        verdict = "refused"
    if unknown and verdict == "exact":
        whys.append(f"sites of {row['unknown blocks']} are refused")
    return row | {"verdict": verdict, "why": "; ".join(whys)}


def _of_setting(subject: Subject, ask: Ask, widths: dict[str, int]) -> dict:
    """All checks with guidance, or without."""
    done: list[str] = []
    refused: list[str] = []  # of what goes beyond one picture
    try:
        _checks(subject, ask, widths, done, refused)
    except Refused as refusal:
        return {"verdict": "refused", "why": str(refusal), "done": done}
    except Wrong as wrong:
        return {"verdict": "wrong", "why": f"{done[-1] if done else ''}: {wrong}", "done": done}
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        why = f"{done[-1] if done else ''}: {type(error).__name__}: {str(error)[:200]} ({where})"
        return {"verdict": "crash", "why": why, "done": done}
    if refused:
        return {"verdict": "exact in part", "why": "; ".join(refused), "done": done}
    return {"verdict": "exact", "done": done}


def _checks(subject: Subject, ask: Ask, widths: dict[str, int], done: list[str], refused: list[str]) -> None:
    pipe, built = subject.pipe, subject.built
    plain, _ = subject.run(ask)
    truth, sites = subject.texts(ask), list(widths)
    chosen = list(dict.fromkeys([sites[len(sites) // 2], sites[-1]]))
    subject.vectors = {}
    made = {}
    for site in sites:
        made |= dictionary(site, widths[site])
        own = made[site]
        subject.vectors[site] = (AMOUNT * own.feature_trajectories([0])[0, 0]).detach()
    pipe.load_rtsae(made)
    try:
        done.append("idle")
        if not same(subject.run(ask)[0], plain):
            raise Wrong("idle it draws something else")
        pipe.set_rtsae_features({(site, 0): 0.0 for site in sites}, clip=False)
        if not same(subject.run(ask)[0], plain):
            raise Wrong("with strengths 0 it draws something else")
        pipe.set_rtsae_features({})
        done.append("steered")
        guarded(subject.steered, ask, chosen[0], apply_to="cond")
        if not any("cond" in roles for roles in truth):
            if built.guided:
                raise Wrong("no row changes with the prompt: the truth cannot be told")
            truth = [["cond"] * len(roles) for roles in truth]  # a picture is the prompt
        for site in chosen:
            for apply_to in ("cond", "all", "contrast"):
                done.append(f"{site} {apply_to}")
                guarded(check_moves, subject, site, ask, truth, apply_to)
            done.append(f"{site} window")
            for window in ((0.0, 0.47), (0.47, 1.0)):
                guarded(check_moves, subject, site, ask, truth, "cond", window)
        done.append("report")
        _check_report(subject, chosen[0], ask)
        for site in sites:
            if site not in chosen:
                done.append(f"{site} cond")
                guarded(check_moves, subject, site, ask._replace(steps=ask.steps), truth, "cond")
        for site in (sites[-1], *([] if len(sites) == 1 else sites[-2:-1])):
            done.append(f"{site} shows")
            result, _ = guarded(subject.steered, ask, site, apply_to="cond", strength=5.0)
            if same(result, plain):
                raise Wrong("the result is the same")
        done.append("mask")
        _check_mask(subject, chosen[0], ask, truth)
        two = {"two prompts": ask._replace(prompts=(1, 3))} if built.many else {}
        two |= {"two images": ask._replace(images=2)} if built.images else {}
        two |= {"two prompts, two images each": ask._replace(prompts=(1, 3), images=2)} if len(two) == 2 else {}
        for what, more in two.items():
            done.append(what)
            try:
                _check_several(subject, chosen[0], more)
            except Refused as refusal:
                refused.append(f"{what}: {refusal}")
    finally:
        pipe.unload_rtsae()
    done.append("unloaded")
    if not same(subject.run(ask)[0], plain):
        raise Wrong("unloaded it draws something else")


def _check_several(subject: Subject, site: str, ask: Ask) -> None:
    """Several rows at once: all of them, or strength 1 for the second of two prompts and 0 for the first."""
    try:
        subject.run(ask)
    except Exception:
        return  # the pipeline itself cannot
    truth = subject.texts(ask)
    if any("cond" in roles for roles in truth):
        guarded(check_moves, subject, site, ask, truth, "cond")
    if len(ask.prompts) > 1 and subject.built.text:
        several = subject.texts(ask, which=1)
        if not any("cond" in roles for roles in several):
            return
        truth = [["other" if role == "uncond" else role for role in roles] for roles in several]
        guarded(check_moves, subject, site, ask, truth, "cond", strength=[0.0, 1.0])


def _check_report(subject: Subject, site: str, ask: Ask) -> None:
    """The report tells the sampler's times."""
    _, calls = guarded(subject.steered, ask, site, apply_to="cond")
    told = [row["timestep"] for row in subject.pipe.rtsae_report().get(site, [])]
    times = [call.timestep for call in calls if call.timestep is not None and call.before]
    if times and not {round(t, 2) for t in told} <= {round(t, 2) for t in times}:
        raise Wrong(f"the report tells times {told}, the scheduler was told {times}")
    if not told:
        raise Wrong("the report is empty")


def _check_mask(subject: Subject, site: str, ask: Ask, truth: list[list[str]]) -> None:
    """A mask of the left half moves half of the tokens, in every row of the grid its left half."""
    block = describe(get_site(next(iter(get_denoisers(subject.pipe).values())), site))
    mask = torch.zeros(32, 32)
    mask[:, :16] = 1
    try:
        _, calls = guarded(subject.steered, ask, site, apply_to="cond", mask=mask)
    except Refused:
        return  # tokens that lie on no grid
    for call, roles in zip(calls, truth, strict=True):
        for before, along in zip(call.before, moved(call, block, subject.vectors[site]), strict=True):
            space = block.space(before[0 if block.index is None or len(before) == 1 else block.index])
            for row, role in enumerate(roles_of(call, roles, along)):
                if role != "cond" or not along[row].any():
                    continue
                if len(space) >= 2:
                    grid = along[row].unflatten(0, space)
                    width = grid.shape[-1]
                    if width % 2 == 0 and not (
                        (grid[..., : width // 2] - 1).abs().max() < 1e-2 and grid[..., width // 2 :].abs().max() < 1e-3
                    ):
                        raise Wrong("a mask of the left half moves other tokens")
                elif abs(along[row].mean() - 0.5) > 0.26:
                    raise Wrong(f"a mask of the left half moves {along[row].mean():.2f} of the tokens")
