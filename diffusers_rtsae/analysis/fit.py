"""Fit a feature to what it is to do: few latents and signed weights, chosen by their effect on the prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from ..pipeline import get_denoiser
from .effect import Changes, Pair, State, States, check_pairs, frozen

_ROWS = 8  # states of one gradient
_RATE = 0.05  # of Adam, for weights in units of a typical activation
_ROUND = 4  # latents chosen at once, and the gradients they are chosen by, and the steps that fit them
_CHOICE, _STEPS, _LAST = 12, 40, 150
_REMOVED = 256  # candidates, the most active ones, for being taken away by their own activation
_CHUNK = 4096  # latents looked at together
_PICTURES, _CAPTURE = 24, 200  # pairs that are drawn to fit, and what that counts for on the bar
_AWAY = 8  # latents at most that take the concept away at negative strengths
_KEPT = 0.98  # share of the effect that a gate must keep
_REACHED = 0.9  # share of it that a strength beyond 1 must keep


@dataclass
class Part:
    """
    What is fitted at one site. On the tokens that `gate` names it adds latents, or a direction of its own; it takes
    away what is there of other latents, each by its own activation.

    Args:
        gate (`list[int]`, *optional*): only tokens on which one of these latents is active; everywhere without it.
        added (`list[int]`), weights (`torch.Tensor`): latents and how much of their typical activation, `(added,)`.
        removed (`list[int]`), shares (`torch.Tensor`): latents and which share of their activation, `(removed,)`.
        direction (`torch.Tensor`, *optional*): `(G, d)` in activation space.
    """

    gate: list[int] | None = None
    added: list[int] = field(default_factory=list)
    weights: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    removed: list[int] = field(default_factory=list)
    shares: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    direction: torch.Tensor | None = None

    @property
    def read(self) -> list[int]:
        return sorted({*(self.gate or ()), *self.removed})

    @property
    def fitted(self) -> list[torch.Tensor]:
        return [p for p in (self.weights, self.shares, self.direction) if p is not None and p.numel()]


class _Model:
    """The parts of all sites as a change of activations, differentiable in what is fitted."""

    def __init__(self, states: States, parts: dict[str, Part]):
        self.parts, self.dictionary, self.grids = parts, states.dictionary, states.grids
        self.columns: dict[str, dict[int, int]] = {}

    def read(self, *groups: States, also: dict[str, Sequence[int]] | None = None) -> None:
        """Have the states keep the activations of what the parts read, and of some further latents of each site."""
        for site, part in self.parts.items():
            latents = sorted({*part.read, *(also or {}).get(site, ())})
            self.columns[site] = {latent: i for i, latent in enumerate(latents)}
            for states in groups:
                states.read(site, latents)

    def gate(self, site: str, state: State, rows: Sequence[int]) -> torch.Tensor:
        """Which tokens a site's additions reach, `(rows, N or 1, 1)`."""
        part = self.parts[site]
        if part.gate is None:
            return torch.ones(len(rows), 1, 1)
        return (self.active(site, state, rows, part.gate) > 0).any(-1, keepdim=True).float()

    def active(self, site: str, state: State, rows: Sequence[int], latents: Sequence[int]) -> torch.Tensor:
        return state.codes[site][list(rows)][..., [self.columns[site][latent] for latent in latents]]

    def full(self, site: str, state: State, rows: Sequence[int], change: torch.Tensor | None) -> torch.Tensor:
        """A change of every token of some rows, `(rows, N, d)`, as a leaf."""
        tokens, width = state.codes[site].shape[1], self.dictionary.sites[site].config.in_channels
        zero = torch.zeros(len(rows), tokens, width, device=state.codes[site].device)
        return zero if change is None else (zero + change).detach()

    def shares_of_anchors(self, site: str, timestep: float) -> torch.Tensor:
        """What each anchor's direction weighs at a step, `(G,)`."""
        return self.at(site, torch.eye(len(self.dictionary.sites[site].config.anchors)).T[..., None], timestep)[..., 0]

    def directions(self, site: str, latents: Sequence[int], timestep: float) -> torch.Tensor:
        """`(latents, d)` at a step."""
        return self.at(site, self.dictionary.sites[site].feature_trajectories(list(latents)).float(), timestep)

    def at(self, site: str, paths: torch.Tensor, timestep: float) -> torch.Tensor:
        """Paths `(..., G, d)` at a step, `(..., d)`."""
        coordinate, last = self.grids[site].coordinate(timestep), paths.shape[-2] - 1
        low = min(int(coordinate), last)
        return torch.lerp(paths[..., low, :], paths[..., min(low + 1, last), :], coordinate - low)

    def __call__(self, state: State, rows: Sequence[int], added: float = 1.0) -> Changes:
        """What to add at each site; `added` is the strength of the additions alone."""
        changes = {}
        for site, part in self.parts.items():
            rtsae, terms = self.dictionary.sites[site], []
            if part.added:
                amounts = part.weights * rtsae.typical_activation[part.added]
                path = amounts @ self.directions(site, part.added, state.timestep)
                terms.append(added * self.gate(site, state, rows) * path)
            if part.direction is not None:
                path = self.at(site, part.direction, state.timestep)
                terms.append(added * self.gate(site, state, rows) * path)
            if part.removed:
                amounts = part.shares * self.active(site, state, rows, part.removed)
                terms.append(-amounts @ self.directions(site, part.removed, state.timestep))
            if terms:
                changes[site] = sum(terms[1:], terms[0])
        return changes


def _optimise(model: _Model, states: States, steps: int, generator: torch.Generator, bar, rate: float = _RATE) -> None:
    """Fit the weights of a model by gradient on the effect (Adam, its rate falls to zero)."""
    fitted = [p for part in model.parts.values() for p in part.fitted]
    for parameter in fitted:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(fitted, rate, betas=(0.9, 0.98))
    try:
        for step, (state, rows, weight) in enumerate(states.draw(steps, _ROWS, generator)):
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1.0, 2 * (1 - step / steps))
            loss = states.errors(state, rows, model(state, rows)).mean() * weight
            for parameter, gradient in zip(fitted, torch.autograd.grad(loss, fitted), strict=True):
                if not gradient.isfinite().all():
                    raise ValueError("The gradient of the effect is NaN or inf; use float32 or bfloat16.")
                parameter.grad = gradient
            optimiser.step()
            with torch.no_grad():
                for part in model.parts.values():
                    part.shares.clamp_(min=0)
            bar.update()
    finally:
        for parameter in fitted:
            parameter.requires_grad_(False)


def _best(
    model: _Model, states: States, candidates: dict[str, list[int]], adding: bool, generator: torch.Generator
) -> list[tuple[str, bool, int]]:
    """
    The latents of all sites whose weight the effect depends on most, for the size of the change they make: `(site,
    added, latent)`, the best first. Attribution patching at the present weights.
    """
    sums: dict[str, torch.Tensor] = {}  # gradient that reaches a constant addition at each anchor, (G, d)
    sizes: dict[str, torch.Tensor] = {}  # squared size of such an addition at each anchor, (G,)
    gains = {site: torch.zeros(len(latents)) for site, latents in candidates.items()}
    squares = {site: torch.zeros(len(latents)) for site, latents in candidates.items()}
    for state, rows, weight in states.draw(_CHOICE, _ROWS, generator):
        there = model(state, rows)
        changes = {site: model.full(site, state, rows, there.get(site)).requires_grad_() for site in model.parts}
        loss = states.errors(state, rows, changes).mean() * weight
        for site, gradient in zip(changes, torch.autograd.grad(loss, list(changes.values())), strict=True):
            gate = model.gate(site, state, rows)
            at = model.shares_of_anchors(site, state.timestep)
            sums[site] = sums.get(site, 0) + at[:, None] * (gradient * gate).sum((0, 1))
            sizes[site] = sizes.get(site, 0) + weight * at * gate.mean() * gradient.shape[1]
            active = model.active(site, state, rows, candidates[site])
            paths = model.directions(site, candidates[site], state.timestep)
            gains[site] += torch.einsum("bnk,bnd,kd->k", active, gradient, paths)
            squares[site] += weight * active.square().sum((0, 1)) / len(rows) * paths.square().sum(1)
    found = []
    for site, part in model.parts.items():
        rtsae = model.dictionary.sites[site]
        score = gains[site] / squares[site].sqrt().clamp(min=1e-9)
        found += [
            (float(value), site, False, latent)
            for latent, value in zip(candidates[site], score, strict=True)
            if latent not in part.removed and value > 0
        ]
        for start in range(0, rtsae.config.num_latents if adding else 0, _CHUNK):
            rows = range(start, min(start + _CHUNK, rtsae.config.num_latents))
            paths = rtsae.feature_trajectories(list(rows)).detach().float()
            gain = torch.einsum("mgd,gd->m", paths, sums[site])
            length = torch.einsum("mgd,mgd,g->m", paths, paths, sizes[site]).sqrt()
            score = torch.where(rtsae.density[list(rows)] > 0, gain.abs() / length.clamp(min=1e-9), 0.0)
            best = score.topk(min(_ROUND + len(part.added), len(score)))
            found += [
                (float(value), site, True, rows[index])
                for value, index in zip(best.values, best.indices.tolist(), strict=True)
                if rows[index] not in part.added
            ]
    return [rest for _, *rest in sorted(found, reverse=True)]


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
    told = [[states.told[pair] for pair in state.pairs] for state in states.all()]
    before, gained, fired, inside = (torch.zeros(count) for _ in range(4))
    for start in range(0, count, _CHUNK):
        part = range(start, min(start + _CHUNK, count))
        for (_, codes), where, rows in zip(states.latents(site, part), concerned, told, strict=True):
            codes, where, active = codes[rows].cpu(), where[rows].cpu(), (codes[rows] > 0).float().cpu()
            before[part.start : part.stop] += codes.mean((0, 1))
            fired[part.start : part.stop] += active.sum((0, 1))
            inside[part.start : part.stop] += (active * where[..., None]).sum((0, 1))
        for (state, codes), rows in zip(states.latents(site, part, own=True), told, strict=True):
            goal = [state.samples[row] != state.texts[row] for row in range(len(state))]
            start_ = [one and not other for one, other in zip(rows, goal, strict=True)]
            gained[part.start : part.stop] += (codes[goal].mean((0, 1)) - codes[start_].mean((0, 1))).cpu()
    typical = rtsae.typical_activation.cpu()
    present = gained / typical
    seen = [i for i in present.topk(min(4, count)).indices.tolist() if present[i] > 0.25 * present.max()]
    share = torch.cat([where[rows].flatten().float() for where, rows in zip(concerned, told, strict=True)]).mean()
    gate = ((inside >= 0.9 * fired) & (fired >= 5)).nonzero()[:, 0].tolist() if share < 0.5 else []
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

    def model(self, gated: bool, direction: bool) -> _Model:
        """Nothing yet: on the tokens that a site's survey found or on all, with a direction or with latents alone."""
        parts = {}
        for site, survey in self.surveys.items():
            shape = self.states.dictionary.sites[site].decoder_bias.shape
            path = torch.zeros(shape) if direction else None
            parts[site] = Part(gate=survey.gate if gated else None, direction=path)
        model = _Model(self.states, parts)
        model.read(self.states, self.judges, also={site: s.candidates for site, s in self.surveys.items()})
        return model

    def optimise(self, model: _Model, steps: int) -> None:
        _optimise(model, self.states, steps, self.generator, self.bar)

    def pursue(self, model: _Model, latents: int, adding: bool) -> None:
        """Choose latents a few at a time, fit all weights after each choice, and leave out what that does not use."""
        candidates = {site: survey.candidates for site, survey in self.surveys.items()}
        for start in range(0, latents, _ROUND):
            best = _best(model, self.states, candidates, adding, self.generator)
            for site, added, latent in best[: min(_ROUND, latents - start)]:
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

    def effect(self, model: _Model) -> float:
        """Mean effect on held-out pairs, less the harm to what was to stay."""
        effects, told = self.judges.effects(model), self.judges.told
        return float(effects[told].mean() + (effects[~told].mean() if not told.all() else 0))


def _used(latents: list[int], weights: torch.Tensor) -> tuple[list[int], torch.Tensor]:
    kept = [i for i, weight in enumerate(weights.tolist()) if abs(weight) >= 0.02]
    return [latents[i] for i in kept], weights[kept]


def _reach(fitter: _Fitter, model: _Model) -> float:
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
    total = 2 * _CAPTURE + 3 * _LAST + rounds + away_rounds
    with frozen(get_denoiser(pipeline), checkpointing), tqdm(total=total, disable=not progress) as bar:
        shared = {"adapter_name": adapter_name, "batch_size": batch_size, **call}
        bar.set_description("pictures")
        states = States(pipeline, fitting + (same[1::2] or same), seed=seed, **shared)
        bar.update(_CAPTURE)
        judges = States(pipeline, judging + same[::2], seed=seed + 1_000_000, **shared)
        bar.update(_CAPTURE)
        generator = torch.Generator().manual_seed(seed)
        fitter = _Fitter(states, judges, generator, bar)

        bar.set_description("free direction")
        free = [fitter.model(gated, direction=True) for gated in (False, True)]
        if all(survey.gate is None for survey in fitter.surveys.values()):
            free = free[:1]
        for model in free:
            fitter.optimise(model, _LAST)
        reached = [fitter.effect(model) for model in free]
        gated = len(free) == 2 and reached[1] >= _KEPT * reached[0]

        bar.set_description("latents")
        model = free[gated] if direction else fitter.model(gated, direction=False)
        fitter.pursue(model, latents, adding=not direction)
        limit = _reach(fitter, model)
        effects = judges.effects(model)

        bar.set_description("away")
        backwards = _Fitter(states.reversed(), judges.reversed(), generator, bar)
        away = backwards.model(gated, direction=False)
        backwards.pursue(away, min(_AWAY, latents), adding=True)
        effect_away = backwards.judges.effects(away)[judges.told].mean()
        bar.update(total - bar.n)
    told = judges.told
    parts = model.parts.values()
    measured = {
        "effect": round(float(effects[told].mean()), 4),
        "lowest": round(float(effects[told].min()), 4),
        "harm": round(float(-effects[~told].mean()), 4) if not told.all() else None,
        "direction": round(max(reached), 4),
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
    return FittedFeature(label, {s: p.direction for s, p in model.parts.items() if p.direction is not None})
