"""Fit a feature to what it is to do, by its effect on the prediction: few latents with signed weights, or a linear map
of a label's own."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise

import torch
from tqdm.auto import tqdm

from ..steering import Edit
from .effect import Intervention, check_pairs, first_order, frozen, gradient, memory_told
from .maps import low_rank, scaled
from .states import Changes, Measured, Pair, State, States

_RATE = 0.05  # of Adam, for weights in units of a typical activation
_ROUND = 4  # latents chosen at once, and the gradients they are chosen by, and the steps that fit them
_CHOICE, _STEPS, _LAST = 10, 30, 120
_REMOVED = 256  # candidates, the most active ones, for being taken away by their own activation
_JUDGES = 32  # pairs held out, of many
_PICTURES, _CAPTURE = 24, 200  # pairs that are drawn to fit, at least, and what that counts for on the bar
_LOOKED, _MEASURED = 7, 20  # steps that are looked at, and what a measurement counts for on the bar
_AWAY = 8  # latents at most that take the concept away at negative strengths
_FARTHEST = 2.0  # times as far as it was fitted to, at most, a map is made to move
_STRENGTHS = (1.0, 1.25, 1.5, 2.0)  # that are measured
_REACHED = 0.9  # share of it that moving farther must keep
_PAYS = 0.01  # of the effect, that leaving out steps must gain
_RANK = 8  # of the map that tells what the site can do
_TAKEN = "ablate"  # what is done to latents that stand for what is there instead
_RIDGES = 0.003, 0.02, 0.1  # of a map's least squares, in units of their mean square: the best is taken


def optimise(model: Intervention, states: States, steps: int, generator: torch.Generator, bar) -> None:
    """Fit the weights of a model by gradient on the effect (Adam, its rate falls to zero). Pairs of which more is left
    weigh more, so that one that is hard is not given up for many that are easy."""
    folds = model.folds()
    if not folds:
        return
    fitted = [fold.weights.requires_grad_() for fold in folds]
    optimiser = torch.optim.Adam(fitted, lr=_RATE, betas=(0.9, 0.98))
    left = torch.ones(len(states.pairs))  # share of each pair's distance
    try:
        for step, (state, rows, weight) in enumerate(states.draw(steps, generator)):
            optimiser.param_groups[0]["lr"] = _RATE * min(1.0, 2 * (1 - step / steps))
            errors, pairs = states.errors(state, rows, model(state, rows)), [state.pairs[row] for row in rows]
            harder = (left[pairs] / left[states.told].mean()).clamp(1 / 3, 3)
            loss = (errors * harder.to(errors.device)).mean() * weight
            for parameter, own in zip(fitted, gradient(loss, fitted), strict=True):
                parameter.grad = own
            optimiser.step()
            with torch.no_grad():
                for fold in folds:
                    if fold.options.operation == _TAKEN:
                        fold.weights.clamp_(min=0)
                now = errors.cpu() * states.scale[pairs] / state.distance[rows].clamp(min=1e-9)
                differ = states.told[pairs]
                for pair, share in zip(torch.tensor(pairs)[differ].tolist(), now[differ].tolist(), strict=True):
                    left[pair] += 0.1 * (min(share, 2.0) - left[pair])
            bar.update()
    finally:
        for parameter in fitted:
            parameter.requires_grad_(False)


@dataclass
class _Survey:
    """What is active at one site: `candidates`, most of all with the "from" prompts; `gate`, only on tokens on which
    the prompts make a difference (`None` if they make one almost everywhere); `seen`, more with the "to" prompts."""

    candidates: list[int]
    gate: list[int] | None
    seen: list[int]


@torch.no_grad()
def _survey(states: States, site: str) -> _Survey:
    rtsae = states.dictionary.sites[site]
    count = rtsae.config.num_latents
    before, gained, fired, inside = torch.zeros(4, count)
    reached = tokens = 0  # on which the prompts make a difference, and all
    for state, where in zip(states.all(), states.concerned(site), strict=True):
        codes, told = state.codes[site], states.told[state.pairs][:, None]
        plain = state.drawn_plain[:, None]
        before += codes.sums(told)
        fired += codes.sums(told, active=True)
        inside += codes.sums(told & where, active=True)
        gained += state.goal_codes[site].sums(told & ~plain) - codes.sums(told & plain)
        reached, tokens = reached + int((told & where).sum()), tokens + int(told.sum()) * where.shape[1]
    typical = rtsae.typical_activation.cpu()
    present = gained / typical
    seen = [i for i in present.topk(min(4, count)).indices.tolist() if present[i] > 0.25 * present.max()]
    gate = []
    if reached < 0.5 * tokens:
        gate = ((inside >= 0.97 * fired) & (fired >= 20)).nonzero()[:, 0].tolist()
    return _Survey((before / typical).topk(min(_REMOVED, count)).indices.tolist(), gate or None, seen)


@dataclass
class FittedFeature:
    """
    What [`fit_feature`] found: `pipe.add_rtsae_label(name, fitted)` gives it a name.

    Args:
        label (`dict`): as in a dictionary's labels.json: `features` (what is added and taken away), `seen` (latents
            that are active where the concept is), `edit` (options), `measured`.
        maps (`dict[str, torch.Tensor]`): rows of the linear maps that its parts name, if it has any of its own.
    """

    label: dict
    maps: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def measured(self) -> dict[str, float]:
        """`effect` on held-out pairs (1: what changing the prompt does) and its `lowest` over these; `harm`, the
        change of prompts that were to stay, in the same unit; `map`, the effect of a linear map at the sites, and
        `ceiling`, of the other prompt's activation itself there; `effect_away`, of strength −1 from "to" to "from";
        `latents` or `rank` in use; `pairs` held out."""
        return self.label["measured"]

    def __repr__(self) -> str:
        told = ", ".join(f"{name} {value:.3g}" for name, value in self.measured.items())
        return f"FittedFeature({'map' if self.maps else 'latents'}: {told})"


def _entry(site: str, edit: Edit, sign: int, limit: float) -> tuple[dict, dict[str, torch.Tensor]]:
    """An edit as a part of a label, which answers strengths of one sign; what is added up to `limit`. And the map that
    the part names, if it is one."""
    limit = 1.0 if edit.operation == _TAKEN else limit
    part = {"site": site, "bounds": sorted([0.0, sign * limit])}
    if edit.map is not None:
        name = f"{site}.{'away' if sign < 0 else 'towards'}"
        taken = {"latents": [], "weights": [], "where": None, "map": name}
        return part | taken, {name: scaled(edit.map, sign).cpu()}
    weights = [round(sign * weight, 4) for weight in edit.weights]
    where = None if edit.where is None else list(edit.where)
    part |= {"latents": list(edit.latents), "weights": weights, "where": where}
    return part | ({} if edit.operation == "add" else {"operation": edit.operation}), {}


def _map(rows: torch.Tensor) -> Edit:
    """What a linear map adds."""
    return Edit(latents=(), weights=(), strength=1.0, map=rows, clip=False)


@torch.no_grad()
def _fit_maps(states: States, judges: States, rank: int) -> tuple[Intervention, Measured]:
    """
    The linear map at each site that takes the activation with the "from" prompt to that with the "to" prompt, token by
    token, and leaves the latter where it is: reduced-rank ridge regression, no gradient, of the ridge with most effect
    on the held-out pairs; and what it does to these.
    """
    for site, kind in states.kinds.items():
        if kind == "input":
            raise ValueError(f"A linear map needs the output of {site}, of which the dictionary reads the input.")
    tried = [
        Intervention({site: [_map(low_rank(own, ridge, rank))] for site, own in states.moments.items()}, states)
        for ridge in _RIDGES
    ]
    return max(zip(tried, judges.measure(tried), strict=True), key=lambda one: _mean(judges, one[1].effects))


def _split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Pairs to fit, and every fourth, or fewer of many, to judge; few pairs are judged on other noise alone."""
    if len(pairs) < 8:
        return pairs, pairs
    every = max(4, len(pairs) // _JUDGES)
    return [pair for i, pair in enumerate(pairs) if i % every], pairs[::every]


class _Pursuit:
    """Gradient pursuit: latents that are added and that are taken away at each site, chosen a few at a time."""

    def __init__(self, states: States, surveys: dict[str, _Survey], generator: torch.Generator, bar):
        self.states, self.surveys, self.generator, self.bar = states, surveys, generator, bar
        none = {"latents": (), "weights": (), "strength": 1.0, "clip": False}
        self.edits: dict[tuple[str, str], Edit] = {}  # by site and operation
        for site, survey in surveys.items():
            where = None if survey.gate is None else tuple(survey.gate)
            self.edits[site, "add"] = Edit(where=where, **none)
            self.edits[site, _TAKEN] = Edit(operation=_TAKEN, bounds=(0.0, 1.0), **none)

    def run(self, latents: int) -> Intervention:
        """Fit all weights after each choice, and leave out what that does not use."""
        for start in range(0, latents, _ROUND):
            for site, operation, latent in self._best()[: min(_ROUND, latents - start)]:
                edit = self.edits[site, operation]
                edit = replace(edit, latents=(*edit.latents, latent), weights=(*edit.weights, 0.0))
                self.edits[site, operation] = edit
            self._optimise(_STEPS)
        self._optimise(_LAST)
        self.edits = {key: _used(edit) for key, edit in self.edits.items()}
        return self._model()

    def _model(self) -> Intervention:
        edits: dict[str, list[Edit]] = {}
        for (site, _), edit in self.edits.items():
            edits.setdefault(site, []).append(edit)
        return Intervention(edits, self.states)

    def _optimise(self, steps: int) -> None:
        model = self._model()
        optimise(model, self.states, steps, self.generator, self.bar)
        self.edits |= {(site, edit.operation): edit for site, own in model.edits.items() for edit in own}

    def _best(self) -> list[tuple[str, str, int]]:
        """`(site, operation, latent)` whose weight the effect depends on most for the size of what it changes, the
        best first."""
        found, sites = [], self.states.dictionary.sites
        gates = {site: survey.gate for site, survey in self.surveys.items()}
        candidates = {site: survey.candidates for site, survey in self.surveys.items()}
        orders = first_order(self._model(), _CHOICE, self.generator, gates, candidates)
        for site, order in orders.items():
            scores = order.removed / order.removed_length.clamp(min=1e-9)
            scores[[candidates[site].index(latent) for latent in self.edits[site, _TAKEN].latents]] = 0
            taken = zip(scores.tolist(), candidates[site], strict=True)
            found += [(score, site, _TAKEN, latent) for score, latent in taken if score > 0]
            density = sites[site].density.cpu()
            scores = torch.where(density > 0, order.added.abs() / order.added_length.clamp(min=1e-9), 0.0)
            scores[list(self.edits[site, "add"].latents)] = 0
            top = scores.topk(min(_ROUND, len(scores)))
            added = zip(top.values.tolist(), top.indices.tolist(), strict=True)
            found += [(score, site, "add", latent) for score, latent in added if score > 0]
        return [choice for _, *choice in sorted(found, reverse=True)]


def _used(edit: Edit) -> Edit:
    """An edit without latents of which next to nothing is used."""
    kept = [pair for pair in zip(edit.latents, edit.weights, strict=True) if abs(pair[1]) >= 0.02]
    latents, weights = zip(*kept, strict=True) if kept else ((), ())
    return replace(edit, latents=latents, weights=weights)


def _window(gains: dict[float, float]) -> dict[str, float]:
    """The steps in a row that gain most together, as the options `start` and `end` of an edit; what would gain but
    little by being left out stays."""
    timesteps = sorted(gains, reverse=True)
    spans = [(i, j) for i in range(len(timesteps)) for j in range(i, len(timesteps))]
    total = {(i, j): sum(gains[t] for t in timesteps[i : j + 1]) for i, j in spans}
    whole = (0, len(timesteps) - 1)
    first, last = max(spans, key=total.get)
    if total[first, last] < total[whole] + _PAYS:
        return {}
    between = [round(1 - (a + b) / 2000, 4) for a, b in pairwise(timesteps)]
    return ({"start": between[first - 1]} if first else {}) | ({"end": between[last]} if last < whole[1] else {})


def _mean(judges: States, values: torch.Tensor) -> float:
    """Over the pairs whose prompts differ."""
    return float(values[judges.told].mean())


def _reach(judges: States, model: Intervention) -> tuple[float, torch.Tensor]:
    """The largest strength, from 1 to 2, at which held-out pairs keep most of the effect that strength 1 has; and that
    effect for each pair."""
    found = judges.measure([model.variant(strength=strength) for strength in _STRENGTHS])
    effects = [_mean(judges, one.effects) for one in found]
    kept = [s for s, own in zip(_STRENGTHS, effects, strict=True) if own >= _REACHED * effects[0] or s == 1.0]
    return max(kept), found[0].effects


def _stretched(maps: Intervention, judges: States) -> Intervention:
    """Maps that move predictions as far as the other prompt does, or as far as they keep most of their effect; least
    squares falls short by what it cannot tell. Only towards a concept: instead of it there may be many things, and
    going as far as to one breaks pictures."""
    factors = torch.linspace(1.0, _FARTHEST, 101)
    found = judges.measure([maps.variant(strength=strength) for strength in _STRENGTHS])
    # Between the strengths that are measured, distances are all but linear, and effects parabolas.
    far = torch.tensor([_mean(judges, one.moved) for one in found]).clamp(min=0).sqrt()
    effects = torch.tensor([_mean(judges, one.effects) for one in found])
    strengths = torch.tensor(_STRENGTHS)
    powers = torch.linalg.lstsq(strengths[:, None] ** torch.arange(3), torch.stack([far, effects], 1)).solution
    far, effects = ((factors[:, None] ** torch.arange(3)) @ powers).T
    wanted = int((far < 1).sum().clamp(max=100)) if far[0] < 1 else 0
    kept = effects >= _REACHED * effects[0]
    kept[0] = True
    factor = float(factors[: wanted + 1][kept[: wanted + 1]].max())
    return maps.with_edits(
        {site: [replace(edit, map=scaled(edit.map, factor)) for edit in own] for site, own in maps.edits.items()}
    )


def _goal(state: State, rows: Sequence[int]) -> Changes:
    """The activation with the "to" prompt itself."""
    return {site: partial(_instead, goal[list(rows)]) for site, goal in state.goal.items()}


def _instead(goal: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return goal.float() - tokens.float()


@dataclass
class _Fit:
    """
    What was fitted in one direction.

    Args:
        model (`Intervention`): gives changes.
        limit (`float`): the largest strength it may have.
        effects (`torch.Tensor`): of it on each held-out pair, `(pairs,)`.
    """

    model: Intervention
    limit: float
    effects: torch.Tensor

    def entries(self, sign: int) -> tuple[list[dict], dict[str, torch.Tensor]]:
        """Parts of a label that answer strengths of one sign, and the maps that these name."""
        found = [_entry(site, edit, sign, self.limit) for site, own in self.model.edits.items() for edit in own]
        return [entry for entry, _ in found], {name: rows for _, maps in found for name, rows in maps.items()}

    @property
    def latents(self) -> int:
        """How many it uses."""
        return sum(len(edit.latents) for own in self.model.edits.values() for edit in own)


class _Fitter:
    """
    Fits latents, or maps of a rank, in one direction.

    Args:
        states, judges (`States`): to fit on, and to judge by.
        latents (`int`): at most.
        rank (`int`, *optional*): of maps, instead of latents.
    """

    def __init__(
        self, states: States, judges: States, latents: int, rank: int | None, generator: torch.Generator, bar
    ):  # fmt: skip
        self.states, self.judges, self.latents, self.rank = states, judges, latents, rank
        self.generator, self.bar = generator, bar

    @cached_property
    def surveys(self) -> dict[str, _Survey]:
        """What is active at each site."""
        return {site: _survey(self.states, site) for site in self.states.dictionary.sites}

    def reversed(self) -> _Fitter:
        """In the other direction."""
        latents = min(_AWAY, self.latents)
        states, judges = self.states.reversed(), self.judges.reversed()
        return _Fitter(states, judges, latents, self.rank, self.generator, self.bar)

    def maps(self) -> tuple[Intervention, Measured] | None:
        """The best linear maps, and what they do; `None` where latents are fitted and there can be no maps."""
        if self.rank is None and "input" in self.states.kinds.values():
            return None
        maps = _fit_maps(self.states, self.judges, self.rank or _RANK)
        self.bar.update(_MEASURED)
        return maps

    def fit(self) -> Intervention:
        """Latents that were chosen and fitted."""
        model = _Pursuit(self.states, self.surveys, self.generator, self.bar).run(self.latents)
        self.bar.update(_MEASURED)
        return model

    def window(self, measured: Measured) -> dict[str, float]:
        """When what was measured helps, as the options `start` and `end`."""
        return _window({timestep: _mean(self.judges, own) for timestep, own in measured.gains.items()})

    def judged(self, model: Intervention) -> _Fit:
        """What was fitted, with how far it may be moved and what it does."""
        fit = _Fit(model, *_reach(self.judges, model))
        self.bar.update(_MEASURED)
        return fit


def fit_feature(
    pipeline, pairs: Sequence[Pair], latents: int = 16, unchanged: Sequence[str] = (), rank: int | None = None,
    adapter_name: str | None = None, seed: int = 0, batch_size: int = 16, checkpointing: bool = False,
    progress: bool = True, **call,
) -> FittedFeature:  # fmt: skip
    """
    A feature that does to a prediction what changing the prompt does. Of few latents with signed weights, chosen by
    gradient pursuit on the effect E and fitted through the frozen denoiser (see [`analysis.effect`]): a constant part
    is added on the tokens that the prompts make a difference on, and latents that stand for what is there instead are
    taken away, each by its own activation. Or, with `rank`, a linear map of its own, fitted by least squares: it does
    more with less work, but is no part of the dictionary. Least squares falls short by what it cannot tell, so that
    towards the concept a map is stretched until it moves predictions as far as changing the prompt does, if it keeps
    most of its effect.

    Args:
        pipeline (`DiffusionPipeline`): with a dictionary loaded.
        pairs (`Sequence[tuple[str, str]]`): prompts (from, to) that differ in the concept alone: some that leave it
            open, some that contradict it. Of eight or more, every fourth is held out to judge, and no more than some
            forty; fewer are judged on other noise.
        latents (`int`): at most.
        unchanged (`Sequence[str]`): prompts that show it already or have nothing to do with it.
        rank (`int`, *optional*): of a linear map at each site, instead of latents.
        adapter_name (`str`, *optional*): of the dictionary.
        seed (`int`): of the noise, and of all that is random here.
        batch_size (`int`): pictures drawn at once, and states of one gradient, up to eight.
        checkpointing (`bool`): trade time for memory in the denoiser's gradients.
        progress (`bool`): show a bar.
        call: passed to the pipeline, e.g. `num_inference_steps` and `guidance_scale`.

    Returns:
        [`FittedFeature`]: for `pipe.add_rtsae_label(name, fitted)`. It acts on the conditional half of guidance, as
        another prompt does, and at all steps but those at which it does harm on the held-out pairs.

    Raises:
        `ValueError`: the prompts are no pairs, or the denoiser gives no gradient, without which latents cannot be
            chosen.
        `torch.OutOfMemoryError`: says what needs less; nothing stays behind.

    Example:
        ```py
        >>> fitted = fit_feature(pipe, [("a blue star", "a red star"), ("a star", "a red star")], rank=8)
        >>> pipe.add_rtsae_label("red", fitted)
        ```
    """
    pairs, same = check_pairs(pairs), [(prompt, prompt) for prompt in unchanged]
    if latents < 1 or (rank is not None and rank < 1):
        asked = f"latents={latents!r}" if rank is None else f"rank={rank!r}"
        raise ValueError(f"Expected at least one latent, or a rank of at least one, got {asked}.")
    rounds = [-(-count // _ROUND) * _STEPS + _LAST for count in (latents, min(_AWAY, latents))] if rank is None else []
    total = 2 * _CAPTURE + sum(rounds) + 6 * _MEASURED
    gradients = frozen(pipeline, checkpointing) if rank is None else contextlib.nullcontext()
    with memory_told(batch_size), gradients, tqdm(total=total, disable=not progress) as bar:
        shared = {"adapter_name": adapter_name, "batch_size": batch_size, **call}
        drawn, generator = _draw(pipeline, pairs, same, seed, rank is None, bar, shared), torch.Generator()
        fitter = _Fitter(*drawn, latents, rank, generator.manual_seed(seed), bar)
        judges = fitter.judges
        bar.set_description("towards")
        maps = fitter.maps()
        model, found = maps if rank is not None else (fitter.fit(), None)
        window = fitter.window(found or judges.measure([model])[0])
        model = model.variant(**window)
        towards = fitter.judged(model if rank is None else _stretched(model, judges))
        ceiling = judges.effects(_goal)
        bar.update(_MEASURED)
        bar.set_description("away")
        backwards = fitter.reversed()
        model = backwards.fit() if rank is None else backwards.maps()[0]
        away = backwards.judged(model.variant(**window))
        bar.update(total - bar.n)
    told = judges.told
    of_map = towards.effects if rank is not None else maps and maps[1].effects
    measured = {
        "effect": _mean(judges, towards.effects),
        "lowest": float(towards.effects[told].min()),
        "harm": None if told.all() else float(-towards.effects[~told].mean()),
        "map": None if of_map is None else _mean(judges, of_map),
        "ceiling": _mean(judges, ceiling),
        "effect_away": _mean(judges, away.effects),
        "latents": towards.latents if rank is None else None,
        "rank": rank,
        "pairs": int(told.sum()),
    }
    return _written(towards, away, fitter.surveys, window, measured)


def _draw(
    pipeline, pairs: list[Pair], same: list[Pair], seed: int, codes: bool, bar, shared: dict
) -> tuple[States, States]:
    """States to fit on and to judge by; `codes`: latents are to be fitted."""
    fitting, judging = _split(pairs)
    fitting = (fitting * -(-_PICTURES // len(fitting)))[: max(_PICTURES, len(fitting))]
    judging = (judging * -(-_PICTURES // 3 // len(judging)))[: max(_PICTURES // 3, len(judging))]
    bar.set_description("pictures")
    shared = shared | {"steps": _LOOKED, "drawn": lambda share: bar.update(share * _CAPTURE)}
    states = States(pipeline, fitting + (same[1::2] or same), seed=seed, moments=True, **shared)
    judges = States(pipeline, judging + same[::2], seed=seed + 1_000_000, codes=codes, **shared)
    return states, judges


def _written(
    towards: _Fit, away: _Fit, surveys: dict[str, _Survey], window: dict[str, float], measured: dict[str, float | None]
) -> FittedFeature:
    """The label that says it."""
    entries = [towards.entries(1), away.entries(-1)]
    label = {
        "features": [entry for part, _ in entries for entry in part],
        "seen": [
            {"site": site, "latents": survey.seen, "weights": [1.0] * len(survey.seen), "where": None}
            for site, survey in surveys.items()
            if survey.seen
        ],
        "edit": {"apply_to": "cond"} | window,
        "measured": {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in measured.items()
            if value is not None
        },
    }
    if not label["features"]:
        raise ValueError("No latent of the dictionary has an effect on these pairs.")
    return FittedFeature(label, entries[0][1] | entries[1][1])
