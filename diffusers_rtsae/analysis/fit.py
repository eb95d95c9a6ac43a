"""Fit a feature to what it is to do, by its effect on the prediction: few latents with signed weights, or a linear map
of a label's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from tqdm.auto import tqdm

from ..models import LinearMap, Step, interpolate, waves
from .effect import (
    CHUNK,
    Changes,
    Intervention,
    Pair,
    Part,
    State,
    States,
    check_pairs,
    finite,
    first_order,
    frozen,
)

_RATE = 0.05  # of Adam, for weights in units of a typical activation
_ROUND = 4  # latents chosen at once, and the gradients they are chosen by, and the steps that fit them
_CHOICE, _STEPS, _LAST = 10, 30, 120
_REMOVED = 256  # candidates, the most active ones, for being taken away by their own activation
_JUDGES = 32  # pairs held out, of many
_PICTURES, _CAPTURE = 24, 200  # pairs that are drawn to fit, and what that counts for on the bar
_AWAY = 8  # latents at most that take the concept away at negative strengths
_FARTHEST = 2.0  # times as far as it was fitted to, at most, a map is made to move
_REACHED = 0.9  # share of it that moving farther must keep
_PAYS = 0.01  # of the effect, that leaving out steps must gain
_RANK = 8  # of the map that tells what the site can do
_RIDGES = 0.003, 0.02, 0.1  # of a map's least squares, in units of their mean square: the best is taken
_THERE = 0.5  # how much it counts that a map leaves alone what is as it should be


def optimise(model: Intervention, states: States, steps: int, generator: torch.Generator, bar) -> None:
    """Fit the weights of a model by gradient on the effect (Adam, its rate falls to zero). Pairs of which more is left
    weigh more, so that one that is hard is not given up for many that are easy."""
    fitted = [p for part in model.parts.values() for p in part.fitted]
    if not fitted:
        return
    for parameter in fitted:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(fitted, lr=_RATE, betas=(0.9, 0.98))
    left = torch.ones(len(states.pairs))  # share of each pair's distance
    try:
        for step, (state, rows, weight) in enumerate(states.draw(steps, generator)):
            optimiser.param_groups[0]["lr"] = _RATE * min(1.0, 2 * (1 - step / steps))
            errors, pairs = states.errors(state, rows, model(state, rows)), [state.pairs[row] for row in rows]
            harder = (left[pairs] / left[states.told].mean()).clamp(1 / 3, 3)
            loss = (errors * harder.to(errors.device)).mean() * weight
            for parameter, gradient in zip(fitted, torch.autograd.grad(loss, fitted), strict=True):
                parameter.grad = finite(gradient)
            optimiser.step()
            with torch.no_grad():
                for part in model.parts.values():
                    part.shares.clamp_(min=0)
                now = errors.cpu() * states.scale[pairs] / state.distance.cpu()[rows].clamp(min=1e-9)
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
    count, concerned = rtsae.config.num_latents, list(states.concerned(site))
    told = [[bool(states.told[pair]) for pair in state.pairs] for state in states.all()]
    before, gained, fired, inside = (torch.zeros(count) for _ in range(4))
    for start in range(0, count, CHUNK):
        part = range(start, min(start + CHUNK, count))
        for (_, codes), where, rows in zip(states.latents(site, part), concerned, told, strict=True):
            codes, where, active = codes[rows].cpu(), where[rows].cpu(), (codes[rows] > 0).float().cpu()
            before[part.start : part.stop] += codes.sum((0, 1))
            fired[part.start : part.stop] += active.sum((0, 1))
            inside[part.start : part.stop] += (active * where[..., None]).sum((0, 1))
        for (state, codes), rows in zip(states.latents(site, part, own=True), told, strict=True):
            goal = [state.samples[row] != state.texts[row] for row in range(len(state))]
            start_ = [one and not other for one, other in zip(rows, goal, strict=True)]
            gained[part.start : part.stop] += (codes[goal].sum((0, 1)) - codes[start_].sum((0, 1))).cpu()
    typical = rtsae.typical_activation.cpu()
    present = gained / typical
    seen = [i for i in present.topk(min(4, count)).indices.tolist() if present[i] > 0.25 * present.max()]
    share = torch.cat([where[rows].flatten().float() for where, rows in zip(concerned, told, strict=True)]).mean()
    gate = ((inside >= 0.97 * fired) & (fired >= 20)).nonzero()[:, 0].tolist() if share < 0.5 else []
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


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


class _Latents(Intervention):
    """Latents at each site, as parts of a label."""

    @property
    def count(self) -> int:
        return sum(len(part.added) + len(part.removed) for part in self.parts.values())

    def entries(self, sign: int, limit: float) -> tuple[list[dict], dict[str, torch.Tensor]]:
        """Parts of a label that answer strengths of one sign, the additions up to `limit`; it names no maps."""
        entries = []
        for site, part in self.parts.items():
            if part.added:
                taken = {"latents": part.added, "weights": _rounded(sign * part.weights), "where": part.gate}
                entries.append({"site": site, "bounds": sorted([0.0, sign * limit])} | taken)
            if part.removed:
                shares = _rounded(sign * part.shares)
                taken = {"latents": part.removed, "weights": shares, "where": None, "operation": "ablate"}
                entries.append({"site": site, "bounds": sorted([0.0, float(sign)])} | taken)
        return entries, {}


class _Maps:
    """A linear map at each site, as a change of activations like an [`Intervention`]. Each reads what is there after
    the sites before it have moved, as it does while it steers."""

    def __init__(self, rows: dict[str, torch.Tensor], states: States):
        self.rows, self.states = rows, states
        self.maps = {site: LinearMap(own) for site, own in rows.items()}

    def __call__(self, state: State, rows: Sequence[int], added: float = 1.0) -> Changes:
        grids, sizes = self.states.grids, self.states.sizes
        steps = {site: grids[site].step(state.timestep, sizes[site]) for site in self.maps}
        return {site: partial(self._change, site, steps[site], added) for site in self.maps}

    def _change(self, site: str, step: Step, added: float, tokens: torch.Tensor) -> torch.Tensor:
        return added * self.maps[site](tokens, step)

    def stretched(self, factor: float) -> _Maps:
        """The same that move by `factor` times as much."""
        directions = {site: factor * own.directions.paths[:, 0] for site, own in self.maps.items()}
        return _Maps({site: own.with_directions(directions[site]) for site, own in self.maps.items()}, self.states)

    def entries(self, sign: int, limit: float) -> tuple[list[dict], dict[str, torch.Tensor]]:
        """Parts of a label that answer strengths of one sign up to `limit`, and the maps that these name."""
        entries, maps = [], {}
        for site in self.rows:
            name = f"{site}.{'away' if sign < 0 else 'towards'}"
            taken = {"latents": [], "weights": [], "where": None, "map": name}
            entries.append({"site": site, "bounds": sorted([0.0, sign * limit])} | taken)
            own = self.maps[site]
            maps[name] = own.with_directions(sign * own.directions.paths[:, 0])
        return entries, maps


@torch.no_grad()
def _moments(states: States, site: str) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sums over tokens of a site for least squares, at each anchor, from its activation, a constant and, on a grid, the
    place to what the other prompt changes in it: of the c inputs with themselves `(G c, G c)` and with the changes
    `(G c, d)`. Each state counts by the root of the size of its change, so that late steps, in which little changes,
    are not lost.
    """
    sae, grid, size = states.dictionary.sites[site], states.grids[site], states.sizes[site]
    width, anchors, one = sae.config.in_channels, len(sae.config.anchors), float(sae.spread.mean())
    count = next(states.all()).present[site].shape[1]
    told = torch.cat([torch.ones(count, 1), *(() if size is None else (waves(size),))], 1).double()
    square = torch.zeros((width + told.shape[1]) * anchors, (width + told.shape[1]) * anchors, dtype=torch.float64)
    product = torch.zeros(len(square), width, dtype=torch.float64)
    for state in states.all():
        coordinate = grid.coordinate(state.timestep)
        there = interpolate(torch.eye(anchors), coordinate).double()
        scale = float(interpolate(sae.spread, coordinate))
        present, goal = (values[site].double().cpu() / scale for values in (state.present, state.goal))
        moved = (goal - present)[states.told[state.pairs]].square().sum((1, 2))
        if not len(moved):
            continue
        weight = float(moved.mean().clamp(min=1e-6)) ** -0.5
        for tokens, change, share in ((present, goal - present, 1.0), (goal, None, _THERE**2)):
            tokens = torch.cat([tokens, (one / scale * told).expand(len(tokens), -1, -1)], 2).flatten(0, 1)
            square += share * weight * torch.kron(there[:, None] * there, tokens.T @ tokens)
            if change is not None:
                product += weight * torch.kron(there[:, None], tokens.T @ change.flatten(0, 1))
    return square, product


@torch.no_grad()
def _fit_maps(states: States, judges: States, rank: int) -> _Maps:
    """
    The linear map at each site that takes the activation with the "from" prompt to that with the "to" prompt, token by
    token, and leaves the latter where it is: reduced-rank ridge regression, no gradient, of the ridge with most effect
    on the held-out pairs.
    """
    for site, sae in states.dictionary.sites.items():
        if sae.config.activation == "input":
            raise ValueError(f"A linear map needs the output of {site}, of which the dictionary reads the input.")
    moments = {site: _moments(states, site) for site in states.dictionary.sites}

    def solved(ridge: float) -> _Maps:
        fitted = {}
        for site, (square, product) in moments.items():
            sae = states.dictionary.sites[site]
            regular = square + ridge * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
            solution = torch.linalg.solve(regular, product)
            changed = torch.linalg.eigh(solution.T @ regular @ solution).eigenvectors
            kept = changed[:, -rank:].flip(1)  # along which it changes most
            readers = (solution @ kept).T.unflatten(1, (len(sae.config.anchors), -1)).float()
            width, one = sae.config.in_channels, float(sae.spread.mean())
            offsets, places = one * readers[..., width], one * readers[..., width + 1 :]
            fitted[site] = LinearMap.rows(readers[..., :width], offsets, kept.T.float(), places)
        return _Maps(fitted, states)

    return max(map(solved, _RIDGES), key=lambda maps: float(_effect(judges, maps)[judges.told].mean()))


def _split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Pairs to fit, and every fourth, or fewer of many, to judge; few pairs are judged on other noise alone."""
    if len(pairs) < 8:
        return pairs, pairs
    every = max(4, len(pairs) // _JUDGES)
    return [pair for i, pair in enumerate(pairs) if i % every], pairs[::every]


class _Fitter:
    """States to fit and to judge on, and what to look for at each site."""

    def __init__(
        self, states: States, judges: States, surveys: dict[str, _Survey], generator: torch.Generator, bar
    ):  # fmt: skip
        self.states, self.surveys, self.generator, self.bar = states, surveys, generator, bar
        for site, survey in self.surveys.items():
            for group in (states, judges):
                group.read(site, sorted({*survey.candidates, *(survey.gate or ())}))

    def pursue(self, latents: int) -> _Latents:
        """Choose latents a few at a time, fit all weights after each choice, and leave out what that does not use."""
        parts = {site: Part(gate=survey.gate) for site, survey in self.surveys.items()}
        model = _Latents(parts, self.states)
        candidates = {site: survey.candidates for site, survey in self.surveys.items()}
        for start in range(0, latents, _ROUND):
            for site, added, latent in self.best(model, candidates)[: min(_ROUND, latents - start)]:
                part = model.parts[site]
                if added:
                    part.added, part.weights = [*part.added, latent], torch.cat([part.weights, torch.zeros(1)])
                else:
                    part.removed, part.shares = [*part.removed, latent], torch.cat([part.shares, torch.zeros(1)])
            optimise(model, self.states, _STEPS, self.generator, self.bar)
        optimise(model, self.states, _LAST, self.generator, self.bar)
        for part in model.parts.values():
            part.added, part.weights = _used(part.added, part.weights)
            part.removed, part.shares = _used(part.removed, part.shares)
        return model

    def best(self, model: Intervention, candidates: dict[str, list[int]]) -> list[tuple[str, bool, int]]:
        """`(site, added or removed, latent)` whose weight the effect depends on most for the size of what it changes,
        the best first."""
        found = []
        for site, order in first_order(model, candidates, _CHOICE, self.generator).items():
            part, density = model.parts[site], model.dictionary.sites[site].density.cpu()
            scores = order.removed / order.removed_length.clamp(min=1e-9)
            scores[[candidates[site].index(latent) for latent in part.removed]] = 0
            found += [(s, site, False, i) for s, i in zip(scores.tolist(), candidates[site], strict=True) if s > 0]
            scores = torch.where(density > 0, order.added.abs() / order.added_length.clamp(min=1e-9), 0.0)
            scores[part.added] = 0
            top = scores.topk(min(_ROUND, len(scores)))
            added = zip(top.values.tolist(), top.indices.tolist(), strict=True)
            found += [(s, site, True, i) for s, i in added if s > 0]
        return [choice for _, *choice in sorted(found, reverse=True)]


def _used(latents: list[int], weights: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    kept = [i for i, weight in enumerate(weights.tolist()) if abs(weight) >= 0.02]
    return [latents[i] for i in kept], weights[kept]


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


def _acts(window: dict[str, float], timestep: float) -> bool:
    return window.get("start", 0.0) <= 1 - timestep / 1000 <= window.get("end", 1.0)


def _during(model: Callable[..., Changes], window: dict[str, float]) -> Callable[..., Changes]:
    """A model that acts in a window of denoising time alone."""

    def changes(state: State, rows: Sequence[int], added: float = 1.0) -> Changes:
        return model(state, rows, added) if _acts(window, state.timestep) else {}

    return changes if window else model


def _effect(judges: States, model: Callable[..., Changes], strength: float = 1.0) -> torch.Tensor:
    """E of a model for each held-out pair, at a strength of its additions."""
    return judges.effects(lambda state, rows: model(state, rows, added=strength))


def _reach(judges: States, model: Callable[..., Changes]) -> float:
    """The largest strength, from 1 to 2, at which held-out pairs keep most of the effect that strength 1 has."""
    effect = {s: float(_effect(judges, model, s)[judges.told].mean()) for s in (1.0, 1.25, 1.5, 2.0)}
    return max(s for s in effect if effect[s] >= _REACHED * effect[1.0] or s == 1.0)


def _stretched(maps: _Maps, judges: States, window: dict[str, float]) -> _Maps:
    """Maps that move predictions as far as the other prompt does, or as far as they keep most of their effect; least
    squares falls short by what it cannot tell. Only towards a concept: instead of it there may be many things, and
    going as far as to one breaks pictures."""

    def effect(states: States, factor: float) -> float:
        return float(_effect(states, _during(maps.stretched(factor), window))[judges.told].mean())

    still, factor = judges.standing(), 1.0
    for _ in range(2):  # sites that read what others have moved make it other than linear
        far = 1 - effect(still, factor)  # squared
        factor = min(max(factor * max(far, 1e-6) ** -0.5, 1.0), _FARTHEST)
    least = _REACHED * effect(judges, 1.0)
    while factor > 1.05 and effect(judges, factor) < least:
        factor = (1 + factor) / 2
    return maps.stretched(factor)


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
    fitting, judging = _split(pairs)
    fitting = (fitting * -(-_PICTURES // len(fitting)))[: max(_PICTURES, len(fitting))]
    judging = (judging * -(-_PICTURES // 3 // len(judging)))[: max(_PICTURES // 3, len(judging))]
    rounds = [-(-count // _ROUND) * _STEPS + _LAST for count in (latents, min(_AWAY, latents))] if rank is None else []
    total = 2 * _CAPTURE + sum(rounds)
    gradients = frozen(pipeline, checkpointing) if rank is None else contextlib.nullcontext()
    with gradients, tqdm(total=total, disable=not progress) as bar:
        shared = {"adapter_name": adapter_name, "batch_size": batch_size, **call}
        bar.set_description("pictures")
        states = States(pipeline, fitting + (same[1::2] or same), seed=seed, **shared)
        bar.update(_CAPTURE)
        judges = States(pipeline, judging + same[::2], seed=seed + 1_000_000, **shared)
        bar.update(_CAPTURE)
        generator = torch.Generator().manual_seed(seed)

        def fitted(states: States, judges: States, surveys: dict[str, _Survey], latents: int) -> _Latents | _Maps:
            if rank is not None:
                return _fit_maps(states, judges, rank)
            return _Fitter(states, judges, surveys, generator, bar).pursue(latents)

        bar.set_description("towards")
        surveys = {site: _survey(states, site) for site in states.dictionary.sites}
        model = fitted(states, judges, surveys, latents)
        gains = judges.gains(model)
        window = _window({timestep: float(own[judges.told].mean()) for timestep, own in gains.items()})
        model = _stretched(model, judges, window) if rank is not None else model
        effects = _effect(judges, _during(model, window))
        limit = _reach(judges, _during(model, window))
        own = effects if rank is not None else _effect(judges, _fit_maps(states, judges, _RANK))
        ceiling = judges.effects(
            lambda state, rows: {s: (state.goal[s] - state.present[s])[list(rows)] for s in state.goal}
        )
        bar.set_description("away")
        backwards = [group.reversed() for group in (states, judges)]
        surveys_away = {site: _survey(backwards[0], site) for site in surveys} if rank is None else {}
        away = fitted(*backwards, surveys_away, min(_AWAY, latents))
        limit_away, effect_away = (find(backwards[1], _during(away, window)) for find in (_reach, _effect))
        bar.update(total - bar.n)
    told = judges.told
    measured = {
        "effect": round(float(effects[told].mean()), 4),
        "lowest": round(float(effects[told].min()), 4),
        "harm": round(float(-effects[~told].mean()), 4) if not told.all() else None,
        "map": round(float(own[told].mean()), 4),
        "ceiling": round(float(ceiling[told].mean()), 4),
        "effect_away": round(float(effect_away[told].mean()), 4),
        "latents": model.count if rank is None else None,
        "rank": rank,
        "pairs": int(told.sum()),
    }
    entries = [model.entries(1, limit), away.entries(-1, limit_away)]
    seen = [
        {"site": site, "latents": latents, "weights": [1.0] * len(latents), "where": None}
        for site, latents in ((site, survey.seen) for site, survey in surveys.items())
        if latents
    ]
    label = {
        "features": [entry for part, _ in entries for entry in part],
        "seen": seen,
        "edit": {"apply_to": "cond"} | window,
        "measured": {name: value for name, value in measured.items() if value is not None},
    }
    if not label["features"]:
        raise ValueError("No latent of the dictionary has an effect on these pairs.")
    return FittedFeature(label, entries[0][1] | entries[1][1])
