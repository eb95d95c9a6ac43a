"""Fit a feature to pairs of prompts by its effect on the prediction. A fitted feature is a few latents with signed
weights, or a linear map of its own."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise

import torch
from tqdm.auto import tqdm

from ..pipeline import get_dictionary
from ..steering import Edit
from .effect import Intervention, check_pairs, explain_out_of_memory, frozen
from .maps import low_rank, scaled
from .pursuit import REMOVE, Pursuit, Survey, gradients_for, survey
from .states import ROWS, Changes, Measured, Pair, State, States

_JUDGES = 32  # held-out pairs, where there are many
_PICTURES = 24  # least number of pairs drawn for fitting
_SAMPLED = 7  # sampled steps of a generation
_USUAL_STEPS = 50  # of a generation by a pipeline that takes no number
_GRADIENT = 3  # predictions that one with its gradient takes as long as
_AWAY = 8  # most latents that take the concept away at negative strengths
_MAX_STRETCH = 2.0  # largest factor that a fitted map is multiplied by
_STRENGTHS = (1.0, 1.25, 1.5, 2.0)  # at which a fit is measured
_RETAINED = 0.9  # share of the effect that a larger strength must retain
_MIN_GAIN = 0.01  # effect that a shorter window must gain
_RANK = 8  # of the reference map that is measured beside fitted latents
_RIDGES = 0.003, 0.02, 0.1  # tried for a map's least squares, relative to the inputs' mean square; the best one stays


class _Work:
    """
    The bar of a fit, which counts predictions of one picture at one step. From the first batch of pictures on it says
    about how long the whole fit takes.

    Args:
        drawn (`list[list[Pair]]`): the pairs whose pictures are drawn, to fit on and to judge by.
        steps (`int`): of a generation.
        branches (`int`): guidance branches of a step.
        gradients (`int`): gradients that the fit takes.
        variants (`int`): edits that it measures.
        progress (`bool`): whether to show the bar.
    """

    def __init__(
        self, drawn: list[list[Pair]], steps: int, branches: int, gradients: int, variants: int, progress: bool
    ):  # fmt: skip
        sampled = len(range(0, steps, -(-steps // _SAMPLED)))
        images = [len(pairs) + sum(before != after for before, after in pairs) for pairs in drawn]
        self._drawn = [count * (steps * branches + sampled) for count in images]
        self._variant = images[1] * sampled  # predictions with one edit
        self.total = sum(self._drawn) + gradients * _GRADIENT * ROWS + variants * self._variant
        self._open = partial(tqdm, total=self.total, unit="predictions", disable=not progress)
        self._told, self._started = "", time.monotonic()

    def __enter__(self) -> _Work:
        self._bar = self._open(desc="pictures", leave=False)
        return self

    def __exit__(self, error, *_) -> None:
        if error is None:
            self._bar.update(self.total - self._bar.n)
        self._bar.close()

    def stage(self, name: str) -> None:
        """Say what is done now."""
        self._bar.set_description(self._told + name)

    def drawn(self, which: int, share: float) -> None:
        """A share of the pictures of one list was drawn."""
        done = share * self._drawn[which]
        if not self._told:  # another bar, as one that an app shows keeps its name
            seconds = (time.monotonic() - self._started) * self.total / done
            self._told = f"about {seconds:.0f} s: "
            self._bar.close()
            self._bar = self._open(desc=self._told + "pictures")
        self._bar.update(done)

    def gradients(self, count: int = 1) -> None:
        """So many gradients were taken."""
        self._bar.update(count * _GRADIENT * ROWS)

    def measured(self, variants: int) -> None:
        """So many edits were measured."""
        self._bar.update(variants * self._variant)


@dataclass
class FittedFeature:
    """
    The result of [`fit_feature`]. `pipe.add_rtsae_label(name, fitted)` adds it to the dictionary as a label.

    Args:
        label (`dict`): an entry of a dictionary's labels.json: `features` (the parts that add and take away), `seen`
            (latents that are active where the concept is), `edit` (options of the edit) and `measured`.
        maps (`dict[str, torch.Tensor]`): the rows of the linear maps that its parts name, by name.
        effects (`dict[tuple[str, str], float]`): the effect on each pair of prompts that it was judged by.
    """

    label: dict
    maps: dict[str, torch.Tensor] = field(default_factory=dict)
    effects: dict[Pair, float] = field(default_factory=dict)

    @property
    def measured(self) -> dict[str, float]:
        """
        The measurements on held-out pairs, all in the unit of the effect (1: what changing the prompt does):

        - `effect`: the mean effect, and `lowest`: the lowest of a pair
        - `harm`: the change of the `unchanged` prompts
        - `map`: the effect of a linear map at the same sites
        - `ceiling`: the effect of putting the "to" prompt's activation at the sites
        - `effect_away`: the effect of strength −1, from the "to" to the "from" prompt

        and the counts `latents` or `rank` (in use) and `pairs` (that it was judged by, each counted once).
        """
        return self.label["measured"]

    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {value:.3g}" for name, value in self.measured.items())
        return f"FittedFeature({'map' if self.maps else 'latents'}: {figures})"


def _entry(site: str, edit: Edit, sign: int, limit: float) -> tuple[dict, dict[str, torch.Tensor]]:
    """An edit as a part of a label, and the map that the part names, if it has one. The part acts at strengths of one
    sign only; one that adds acts up to strength `limit`."""
    limit = 1.0 if edit.operation == REMOVE else limit
    part = {"site": site, "bounds": sorted([0.0, sign * limit])}
    if edit.map is not None:
        name = f"{site}.{'away' if sign < 0 else 'towards'}"
        mapped = {"latents": [], "weights": [], "where": None, "map": name}
        return part | mapped, {name: scaled(edit.map, sign).cpu()}
    weights = [round(sign * weight, 4) for weight in edit.weights]
    where = None if edit.where is None else list(edit.where)
    part |= {"latents": list(edit.latents), "weights": weights, "where": where}
    return part | ({} if edit.operation == "add" else {"operation": edit.operation}), {}


def _map(rows: torch.Tensor) -> Edit:
    """An edit that adds what a linear map gives."""
    return Edit(latents=(), weights=(), strength=1.0, map=rows, clip=False)


@torch.no_grad()
def _fit_maps(states: States, judges: States, rank: int) -> tuple[Intervention, Measured]:
    """
    The best linear map for each site, and what the maps do to the held-out pairs. A map is fitted to move each token
    from its activation with the "from" prompt to that with the "to" prompt, and to leave the latter where it is. It is
    a reduced-rank ridge regression and needs no gradient. The ridge with the largest effect on the held-out pairs is
    chosen.
    """
    for site, activation in states.activations.items():
        if activation == "input":
            raise ValueError(
                f"A linear map needs a dictionary that reads the output of {site}, got one that reads its input."
            )
    candidates = [
        Intervention({site: [_map(low_rank(sums, ridge, rank))] for site, sums in states.moments.items()}, states)
        for ridge in _RIDGES
    ]
    measured = zip(candidates, judges.measure(candidates), strict=True)
    return max(measured, key=lambda candidate: _mean(judges, candidate[1].effects))


def _split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Pairs to fit and pairs to judge: every fourth is held out, fewer where there are many. Less than eight pairs are
    used for both; the judges then differ in their noise only."""
    if len(pairs) < 8:
        return pairs, pairs
    every = max(4, len(pairs) // _JUDGES)
    return [pair for i, pair in enumerate(pairs) if i % every], pairs[::every]


def _window(gains: dict[float, float]) -> dict[str, float]:
    """The consecutive steps with the largest total gain, as the options `start` and `end` of an edit. Steps are left
    out only if that gains more than `_MIN_GAIN`."""
    timesteps = sorted(gains, reverse=True)
    spans = [(i, j) for i in range(len(timesteps)) for j in range(i, len(timesteps))]
    total = {(i, j): sum(gains[t] for t in timesteps[i : j + 1]) for i, j in spans}
    whole = (0, len(timesteps) - 1)
    first, last = max(spans, key=total.get)
    if total[first, last] < total[whole] + _MIN_GAIN:
        return {}
    between = [round(1 - (a + b) / 2000, 4) for a, b in pairwise(timesteps)]
    return ({"start": between[first - 1]} if first else {}) | ({"end": between[last]} if last < whole[1] else {})


def _mean(judges: States, values: torch.Tensor) -> float:
    """The mean over the pairs whose prompts differ."""
    return float(values[judges.differs].mean())


def _reach(judges: States, model: Intervention) -> tuple[float, torch.Tensor]:
    """The largest strength, from 1 to 2, that retains most of the effect of strength 1 on held-out pairs; and the
    effect of strength 1 on each pair."""
    results = judges.measure([model.variant(strength=strength) for strength in _STRENGTHS])
    effects = [_mean(judges, result.effects) for result in results]
    strengths = zip(_STRENGTHS, effects, strict=True)
    retained = [s for s, effect in strengths if effect >= _RETAINED * effects[0] or s == 1.0]
    return max(retained), results[0].effects


def _stretched(maps: Intervention, judges: States) -> Intervention:
    """Maps multiplied by a factor, so that strength 1 moves predictions as far as changing the prompt does, if most of
    the effect is retained. A least-squares fit moves less far, by the part that it cannot predict. Maps away from a
    concept are not stretched: many things may take its place, and going all the way to one of them breaks pictures."""
    factors = torch.linspace(1.0, _MAX_STRETCH, 101)
    results = judges.measure([maps.variant(strength=strength) for strength in _STRENGTHS])
    # Between the measured strengths the distance is almost linear, and the effect a parabola.
    distances = torch.tensor([_mean(judges, result.moved) for result in results]).clamp(min=0).sqrt()
    effects = torch.tensor([_mean(judges, result.effects) for result in results])
    strengths = torch.tensor(_STRENGTHS)
    powers = torch.linalg.lstsq(strengths[:, None] ** torch.arange(3), torch.stack([distances, effects], 1)).solution
    distances, effects = ((factors[:, None] ** torch.arange(3)) @ powers).T
    target = int((distances < 1).sum().clamp(max=100)) if distances[0] < 1 else 0
    retained = effects >= _RETAINED * effects[0]
    retained[0] = True
    factor = float(factors[: target + 1][retained[: target + 1]].max())
    return maps.with_edits(
        {site: [replace(edit, map=scaled(edit.map, factor)) for edit in edits] for site, edits in maps.edits.items()}
    )


def _goal(state: State, rows: Sequence[int]) -> Changes:
    """Changes that put the activation with the "to" prompt at each site."""
    return {site: partial(_difference, goal[list(rows)]) for site, goal in state.goal.items()}


def _difference(goal: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return goal.float() - tokens.float()


@dataclass
class _Fit:
    """
    A fit in one direction, towards the concept or away from it.

    Args:
        model (`Intervention`): the fitted edits.
        limit (`float`): the largest strength that they may have.
        effects (`torch.Tensor`): their effect on each held-out pair, `(pairs,)`.
    """

    model: Intervention
    limit: float
    effects: torch.Tensor

    def entries(self, sign: int) -> tuple[list[dict], dict[str, torch.Tensor]]:
        """Parts of a label that act at strengths of one sign, and the maps that these parts name."""
        parts = [_entry(site, edit, sign, self.limit) for site, edits in self.model.edits.items() for edit in edits]
        return [entry for entry, _ in parts], {name: rows for _, maps in parts for name, rows in maps.items()}

    @property
    def latents(self) -> int:
        """The number of latents in use."""
        return sum(len(edit.latents) for edits in self.model.edits.values() for edit in edits)


class _Fitter:
    """
    Fits latents, or maps of a rank, in one direction.

    Args:
        states, judges (`States`): of the pairs to fit and of the held-out pairs.
        latents (`int`): the most latents to choose.
        rank (`int`, *optional*): fit maps of this rank instead of latents.
    """

    def __init__(
        self,
        states: States,
        judges: States,
        latents: int,
        rank: int | None,
        generator: torch.Generator,
        work: _Work,
    ):
        self.states, self.judges, self.latents, self.rank = states, judges, latents, rank
        self.generator, self.work = generator, work

    @cached_property
    def surveys(self) -> dict[str, Survey]:
        """The active latents of each site."""
        return {site: survey(self.states, site) for site in self.states.dictionary.sites}

    def reversed(self) -> _Fitter:
        """A fitter for the other direction."""
        latents = min(_AWAY, self.latents)
        states, judges = self.states.reversed(), self.judges.reversed()
        return _Fitter(states, judges, latents, self.rank, self.generator, self.work)

    def maps(self) -> tuple[Intervention, Measured] | None:
        """The best linear maps, and what they do. `None` if latents are fitted to a dictionary that allows no maps."""
        if self.rank is None and "input" in self.states.activations.values():
            return None
        maps = _fit_maps(self.states, self.judges, self.rank or _RANK)
        self.work.measured(len(_RIDGES))
        return maps

    def fit(self) -> Intervention:
        """Choose and fit latents."""
        return Pursuit(self.states, self.surveys, self.generator, self.work.gradients).run(self.latents)

    def window(self, measured: Measured) -> dict[str, float]:
        """The window in which a measured edit helps, as the options `start` and `end`."""
        return _window({timestep: _mean(self.judges, gains) for timestep, gains in measured.gains.items()})

    def judged(self, model: Intervention) -> _Fit:
        """A fit with its largest strength and its effect on the held-out pairs."""
        fit = _Fit(model, *_reach(self.judges, model))
        self.work.measured(len(_STRENGTHS))
        return fit


def fit_feature(
    pipeline, pairs: Sequence[Pair], latents: int = 16, unchanged: Sequence[str] = (), rank: int | None = None,
    adapter_name: str | None = None, seed: int = 0, batch_size: int = 16, checkpointing: bool = False,
    progress: bool = True, **call,
) -> FittedFeature:  # fmt: skip
    """
    Fit a feature that changes the prediction as changing the prompt does. There are two kinds of fitted feature:

    - *Latents* (the default): a few latents with signed weights, chosen by gradient pursuit on the effect E and fitted
      through the frozen denoiser (see [`analysis.effect`]). Some latents are added, on the tokens that the prompts
      change. Latents that stand for what the concept replaces are taken away in proportion to their own activation.
    - *A linear map* (`rank`): fitted by least squares, without gradients. It has a larger effect for less work, but is
      not made of the dictionary's latents. A least-squares fit moves less far than the prompt, so the map towards the
      concept is stretched until it moves predictions as far, if most of the effect is retained.

    Args:
        pipeline (`DiffusionPipeline`): with a dictionary loaded.
        pairs (`Sequence[tuple[str, str]]`): prompts (from, to) that differ in the concept alone. Best are both "from"
            prompts that leave the concept open and ones that contradict it. Of eight or more pairs every fourth is
            held out for judging, about forty at most; fewer pairs are judged on other noise.
        latents (`int`): the most latents to choose.
        unchanged (`Sequence[str]`): prompts that show the concept already or have nothing to do with it; the feature
            should not change them.
        rank (`int`, *optional*): fit a linear map of this rank at each site instead of latents.
        adapter_name (`str`, *optional*): of the dictionary.
        seed (`int`): of the noise and of every random choice.
        batch_size (`int`): pictures drawn at once; also the states in one gradient, up to eight.
        checkpointing (`bool`): gradients of the denoiser need less memory and more time.
        progress (`bool`): show a bar.
        call: passed to the pipeline, e.g. `num_inference_steps` and `guidance_scale`.

    Returns:
        [`FittedFeature`]: for `pipe.add_rtsae_label(name, fitted)`. It acts on the conditional guidance branch, as a
        prompt does, and leaves out steps at which it does harm on the held-out pairs.

    Raises:
        `ValueError`: `pairs` are not pairs of different prompts, or latents are fitted and the denoiser gives no
            gradient.
        `torch.OutOfMemoryError`: the message says which arguments need less memory. The pipeline is left as it was.

    Example:
        ```py
        >>> fitted = fit_feature(pipe, [("a blue star", "a red star"), ("a star", "a red star")], rank=8)
        >>> pipe.add_rtsae_label("red", fitted)
        ```
    """
    pairs, same = check_pairs(pairs), [(prompt, prompt) for prompt in unchanged]
    if latents < 1 or (rank is not None and rank < 1):
        given = f"latents={latents!r}" if rank is None else f"rank={rank!r}"
        raise ValueError(f"Expected at least one latent, or a rank of at least one, got {given}.")
    drawn = _drawn(pairs, same)
    shared = {"adapter_name": adapter_name, "batch_size": batch_size, **call}
    work = _Work(drawn, *_calls(pipeline, call), *_effort(pipeline, latents, rank, adapter_name), progress)
    gradients = frozen(pipeline, checkpointing) if rank is None else contextlib.nullcontext()
    with explain_out_of_memory(batch_size), gradients, work:
        states, judges = _states(pipeline, drawn, seed, rank is None, work, shared)
        fitter = _Fitter(states, judges, latents, rank, torch.Generator().manual_seed(seed), work)
        work.stage("towards")
        maps = fitter.maps()
        model, judged = maps if rank is not None else (fitter.fit(), None)
        window = fitter.window(judged or judges.measure([model])[0])
        model = model.variant(**window)
        towards = fitter.judged(model if rank is None else _stretched(model, judges))
        ceiling = judges.effects(_goal)
        work.measured(
            1 + (1 if rank is None else len(_STRENGTHS))
        )  # the ceiling, and the window or what was stretched
        work.stage("away")
        backwards = fitter.reversed()
        model = backwards.fit() if rank is None else backwards.maps()[0]
        away = backwards.judged(model.variant(**window))
    differs = judges.differs
    of_map = towards.effects if rank is not None else maps and maps[1].effects
    measured = {
        "effect": _mean(judges, towards.effects),
        "lowest": float(towards.effects[differs].min()),
        "harm": None if differs.all() else float(-towards.effects[~differs].mean()),
        "map": None if of_map is None else _mean(judges, of_map),
        "ceiling": _mean(judges, ceiling),
        "effect_away": _mean(judges, away.effects),
        "latents": towards.latents if rank is None else None,
        "rank": rank,
    }
    by_pair: dict[Pair, list[float]] = {}
    for pair, differ, effect in zip(judges.pairs, differs.tolist(), towards.effects.tolist(), strict=True):
        if differ:
            by_pair.setdefault(pair, []).append(effect)
    measured["pairs"] = len(by_pair)
    fitted = _written(towards, away, fitter.surveys, window, measured)
    return replace(fitted, effects={pair: sum(each) / len(each) for pair, each in by_pair.items()})


def _drawn(pairs: list[Pair], same: list[Pair]) -> list[list[Pair]]:
    """The pairs to draw, to fit on and to judge by; where there are few, each is drawn several times."""
    fitting, judging = _split(pairs)
    fitting = (fitting * -(-_PICTURES // len(fitting)))[: max(_PICTURES, len(fitting))]
    judging = (judging * -(-_PICTURES // 3 // len(judging)))[: max(_PICTURES // 3, len(judging))]
    return [fitting + (same[1::2] or same), judging + same[::2]]


def _calls(pipeline, call: dict) -> tuple[int, int]:
    """The steps of a generation, and the guidance branches of each."""
    defaults = {name: one.default for name, one in inspect.signature(pipeline.__call__).parameters.items()}
    steps, guidance = ((defaults | call).get(name) for name in ("num_inference_steps", "guidance_scale"))
    return steps or _USUAL_STEPS, 1 if guidance is None or guidance <= 1 else 2


def _effort(pipeline, latents: int, rank: int | None, adapter_name: str | None) -> tuple[int, int]:
    """The gradients that a fit takes, and the edits that it measures."""
    if rank is not None:
        return 0, 2 * len(_RIDGES) + 3 * len(_STRENGTHS) + 1
    sites = get_dictionary(pipeline, adapter_name).sites.values()
    maps = 0 if any(sae.config.activation == "input" for sae in sites) else len(_RIDGES)
    return gradients_for(latents) + gradients_for(min(_AWAY, latents)), maps + 2 * len(_STRENGTHS) + 2


def _states(
    pipeline, drawn: list[list[Pair]], seed: int, codes: bool, work: _Work, shared: dict
) -> tuple[States, States]:
    """The states to fit on and to judge by. `codes` is set if latents are fitted."""
    shared = shared | {"steps": _SAMPLED}
    states = States(pipeline, drawn[0], seed=seed, moments=True, drawn=partial(work.drawn, 0), **shared)
    judges = States(pipeline, drawn[1], seed=seed + 1_000_000, codes=codes, drawn=partial(work.drawn, 1), **shared)
    return states, judges


def _written(
    towards: _Fit, away: _Fit, surveys: dict[str, Survey], window: dict[str, float], measured: dict[str, float | None]
) -> FittedFeature:
    """Both fits as a label."""
    entries = [towards.entries(1), away.entries(-1)]
    label = {
        "features": [entry for part, _ in entries for entry in part],
        "seen": [
            {"site": site, "latents": survey.indicators, "weights": [1.0] * len(survey.indicators), "where": None}
            for site, survey in surveys.items()
            if survey.indicators
        ],
        "edit": {"apply_to": "cond"} | window,
        "measured": {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in measured.items()
            if value is not None
        },
    }
    if not label["features"]:
        raise ValueError("Expected a latent that has an effect on these pairs, but the dictionary has none.")
    return FittedFeature(label, entries[0][1] | entries[1][1])
