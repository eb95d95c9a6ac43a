"""Fit a feature to what it is to do: few latents and signed weights, chosen by their effect on the prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from .effect import (
    CHUNK,
    ROWS,
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
_OWN_RATE = 0.01  # for directions, in units of the activation's scale; faster, they outrun what is taken away
_ROUND = 4  # latents chosen at once, and the gradients they are chosen by, and the steps that fit them
_CHOICE, _STEPS, _LAST = 10, 30, 120
_REMOVED = 256  # candidates, the most active ones, for being taken away by their own activation
_PICTURES, _CAPTURE = 24, 200  # pairs that are drawn to fit, and what that counts for on the bar
_AWAY = 8  # latents at most that take the concept away at negative strengths
_REACHED = 0.9  # share of it that a strength beyond 1 must keep


def _optimise(model: Intervention, states: States, steps: int, generator: torch.Generator, bar) -> None:
    """Fit the weights of a model by gradient on the effect (Adam, its rate falls to zero). Pairs of which more is left
    weigh more, so that one that is hard is not given up for many that are easy."""
    fitted = [p for part in model.parts.values() for p in part.fitted]
    if not fitted:
        return
    for parameter in fitted:
        parameter.requires_grad_(True)
    own = {id(part.direction) for part in model.parts.values()}
    rates = [_OWN_RATE if id(parameter) in own else _RATE for parameter in fitted]
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in zip(fitted, rates, strict=True)]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.98))
    left = torch.ones(len(states.pairs))  # share of each pair's distance
    try:
        for step, (state, rows, weight) in enumerate(states.draw(steps, ROWS, generator)):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * min(1.0, 2 * (1 - step / steps))
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
        directions (`dict[str, torch.Tensor]`): by site, `(G, d)` in activation space, if it has any of its own.
    """

    label: dict
    directions: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def measured(self) -> dict[str, float]:
        """`effect` on held-out pairs (1: what changing the prompt does) and its `lowest` over these; `harm`, the
        change of prompts that were to stay, in the same unit; `direction`, the effect of a free direction alone;
        `effect_away`, of strength −1 from "to" to "from"; `latents` in use; `pairs` held out."""
        return self.label["measured"]

    def __repr__(self) -> str:
        told = ", ".join(f"{name} {value:.3g}" for name, value in self.measured.items())
        return f"FittedFeature({'direction' if self.directions else 'latents'}: {told})"


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def _entries(parts: dict[str, Part], sign: int, limit: float) -> list[dict]:
    """Parts as entries of a label that answer strengths of one sign, the additions up to `limit`."""
    entries = []
    for site, part in parts.items():
        reach = sorted([0.0, sign * limit])
        if part.added:
            entries.append({"latents": part.added, "weights": _rounded(sign * part.weights), "where": part.gate})
        if part.direction is not None:
            entries.append({"latents": [], "weights": [], "where": part.gate, "direction": site})
        entries = [{"site": site, "bounds": reach} | entry if "site" not in entry else entry for entry in entries]
        if part.removed:
            shares = _rounded(sign * part.shares)
            taken = {"latents": part.removed, "weights": shares, "where": None, "operation": "ablate"}
            entries.append({"site": site, "bounds": sorted([0.0, float(sign)])} | taken)
    return entries


def _leaves_open(pair: Pair) -> bool:
    """Whether the "from" prompt only leaves out words of the "to" prompt."""
    words = iter(pair[1].split())
    return all(word in words for word in pair[0].removeprefix("an ").removeprefix("a ").split())


def _split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Pairs to fit, and every fourth to judge; few pairs are judged on other noise alone."""
    if len(pairs) < 8:
        return pairs, pairs
    return [pair for i, pair in enumerate(pairs) if i % 4], pairs[::4]


class _Fitter:
    """States to fit and to judge on, and what to look for at each site."""

    def __init__(self, states: States, judges: States, generator: torch.Generator, bar):
        self.states, self.judges, self.generator, self.bar = states, judges, generator, bar
        self.surveys = {site: _survey(states, site) for site in states.dictionary.sites}
        for site, survey in self.surveys.items():
            for group in (states, judges):
                group.read(site, sorted({*survey.candidates, *(survey.gate or ())}))

    def model(self, direction: bool) -> Intervention:
        """Nothing yet, with a direction at each site or with latents alone."""
        parts = {}
        for site, survey in self.surveys.items():
            config = self.states.dictionary.sites[site].config
            path = torch.zeros(len(config.anchors), config.in_channels) if direction else None
            parts[site] = Part(gate=survey.gate, direction=path)
        return Intervention(parts, self.states)

    def optimise(self, model: Intervention, steps: int) -> None:
        _optimise(model, self.states, steps, self.generator, self.bar)

    def pursue(self, model: Intervention, latents: int, adding: bool) -> None:
        """Choose latents a few at a time, fit all weights after each choice, and leave out what that does not use."""
        candidates = {site: survey.candidates for site, survey in self.surveys.items()}
        for start in range(0, latents, _ROUND):
            for site, added, latent in self.best(model, candidates, adding)[: min(_ROUND, latents - start)]:
                part = model.parts[site]
                if added:
                    part.added, part.weights = [*part.added, latent], torch.cat([part.weights, torch.zeros(1)])
                else:
                    part.removed, part.shares = [*part.removed, latent], torch.cat([part.shares, torch.zeros(1)])
            self.optimise(model, _STEPS)
        self.optimise(model, _LAST)
        for part in model.parts.values():
            part.added, part.weights = _used(part.added, part.weights)
            part.removed, part.shares = _used(part.removed, part.shares)

    def best(self, model: Intervention, candidates: dict[str, list[int]], adding: bool) -> list[tuple[str, bool, int]]:
        """`(site, added or removed, latent)` whose weight the effect depends on most for the size of what it changes,
        the best first."""
        found = []
        for site, order in first_order(model, candidates, _CHOICE, self.generator).items():
            part, density = model.parts[site], model.dictionary.sites[site].density.cpu()
            scores = order.removed / order.removed_length.clamp(min=1e-9)
            scores[[candidates[site].index(latent) for latent in part.removed]] = 0
            found += [(s, site, False, i) for s, i in zip(scores.tolist(), candidates[site], strict=True) if s > 0]
            if adding:
                scores = torch.where(density > 0, order.added.abs() / order.added_length.clamp(min=1e-9), 0.0)
                scores[part.added] = 0
                top = scores.topk(min(_ROUND, len(scores)))
                added = zip(top.values.tolist(), top.indices.tolist(), strict=True)
                found += [(s, site, True, i) for s, i in added if s > 0]
        return [choice for _, *choice in sorted(found, reverse=True)]


def _used(latents: list[int], weights: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    kept = [i for i, weight in enumerate(weights.tolist()) if abs(weight) >= 0.02]
    return [latents[i] for i in kept], weights[kept]


def _reach(fitter: _Fitter, model: Intervention) -> float:
    """The largest strength, from 1 to 2, at which held-out pairs keep most of the effect that strength 1 has."""

    def at(strength: float) -> float:
        def changes(state: State, rows: Sequence[int]) -> Changes:
            return model(state, rows, added=strength)

        return float(fitter.judges.effects(changes)[fitter.judges.told].mean())

    whole = at(1.0)
    return max((s for s in (1.25, 1.5, 2.0) if at(s) >= _REACHED * whole), default=1.0)


def fit_feature(
    pipeline, pairs: Sequence[Pair], latents: int = 16, unchanged: Sequence[str] = (), direction: bool = False,
    adapter_name: str | None = None, seed: int = 0, batch_size: int = 16, checkpointing: bool = False,
    progress: bool = True, **call,
) -> FittedFeature:  # fmt: skip
    """
    A feature that does to a prediction what changing the prompt does: few latents of a loaded dictionary with signed
    weights, chosen by gradient pursuit on the effect E and fitted through the frozen denoiser (see
    [`analysis.effect`]). A constant part is added on the tokens that the prompts make a difference on; latents that
    stand for what is there instead are taken away, each by its own activation.

    Args:
        pipeline (`DiffusionPipeline`): with a dictionary loaded.
        pairs (`Sequence[tuple[str, str]]`): prompts (from, to) that differ in the concept alone: some that leave it
            open, some that contradict it. Of eight or more, every fourth is held out to judge; fewer are judged on
            other noise.
        latents (`int`): at most.
        unchanged (`Sequence[str]`): prompts that show it already or have nothing to do with it.
        direction (`bool`): add a direction of its own at each site instead of latents; what is taken away are latents
            still.
        adapter_name (`str`, *optional*): of the dictionary.
        seed (`int`): of the noise, and of all that is random here.
        batch_size (`int`): pictures drawn at once.
        checkpointing (`bool`): trade time for memory in the denoiser's gradients.
        progress (`bool`): show a bar.
        call: passed to the pipeline, e.g. `num_inference_steps` and `guidance_scale`.

    Returns:
        [`FittedFeature`]: for `pipe.add_rtsae_label(name, fitted)`. The effect is that on the conditional prediction,
        and so is the half of guidance that it steers.

    Raises:
        `ValueError`: the prompts are no pairs, or the denoiser gives no gradient.

    Example:
        ```py
        >>> fitted = fit_feature(pipe, [("a blue star", "a red star"), ("a star", "a red star")])
        >>> pipe.add_rtsae_label("red", fitted)
        ```
    """
    pairs, same = check_pairs(pairs), [(prompt, prompt) for prompt in unchanged]
    if latents < 1:
        raise ValueError(f"Expected at least one latent, got latents={latents!r}.")
    fitting, judging = _split(pairs)
    fitting = (fitting * -(-_PICTURES // len(fitting)))[: max(_PICTURES, len(fitting))]
    judging = (judging * -(-_PICTURES // 3 // len(judging)))[: max(_PICTURES // 3, len(judging))]
    rounds = -(-latents // _ROUND) * _STEPS + _LAST
    away_rounds = -(-_AWAY // _ROUND) * _STEPS + _LAST
    total = 2 * _CAPTURE + _LAST + rounds + away_rounds
    with frozen(pipeline, checkpointing), tqdm(total=total, disable=not progress) as bar:
        shared = {"adapter_name": adapter_name, "batch_size": batch_size, **call}
        bar.set_description("pictures")
        states = States(pipeline, fitting + (same[1::2] or same), seed=seed, **shared)
        bar.update(_CAPTURE)
        judges = States(pipeline, judging + same[::2], seed=seed + 1_000_000, **shared)
        bar.update(_CAPTURE)
        generator = torch.Generator().manual_seed(seed)
        fitter = _Fitter(states, judges, generator, bar)

        bar.set_description("direction")
        free = fitter.model(direction=True)
        fitter.optimise(free, _LAST)
        reached = float(judges.effects(free)[judges.told].mean())

        bar.set_description("latents")
        model = free if direction else fitter.model(direction=False)
        fitter.pursue(model, latents, adding=not direction)
        limit = _reach(fitter, model)
        effects = judges.effects(model)

        bar.set_description("away")
        backwards = _Fitter(states.reversed(_leaves_open), judges.reversed(_leaves_open), generator, bar)
        away = backwards.model(direction=False)
        backwards.pursue(away, min(_AWAY, latents), adding=True)
        effect_away = backwards.judges.effects(away)[backwards.judges.told].mean()
        bar.update(total - bar.n)
    told = judges.told
    parts = model.parts.values()
    measured = {
        "effect": round(float(effects[told].mean()), 4),
        "lowest": round(float(effects[told].min()), 4),
        "harm": round(float(-effects[~told].mean()), 4) if not told.all() else None,
        "direction": round(reached, 4),
        "effect_away": round(float(effect_away), 4),
        "latents": sum(len(part.added) + len(part.removed) for part in parts),
        "pairs": int(told.sum()),
    }
    seen = [
        {"site": site, "latents": survey.seen, "weights": [1.0] * len(survey.seen), "where": None}
        for site, survey in fitter.surveys.items()
        if survey.seen
    ]
    label = {
        "features": _entries(model.parts, 1, limit) + _entries(away.parts, -1, 1.0),
        "seen": seen,
        "edit": {"apply_to": "cond"},
        "measured": {name: value for name, value in measured.items() if value is not None},
    }
    if not label["features"]:
        raise ValueError("No latent of the dictionary has an effect on these pairs.")
    directions = {
        site: part.direction * states.dictionary.sites[site].spread[:, None].cpu()
        for site, part in model.parts.items()
        if part.direction is not None
    }
    return FittedFeature(label, directions)
