"""Gradient pursuit: which latents stand for a difference of prompts, and with which weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..steering import Edit
from .effect import Intervention, first_order, gradient
from .states import States

_RATE = 0.05  # of Adam, for weights in units of a typical activation
_ROUND = 4  # latents that are chosen at once
_CHOICE, _STEPS, _LAST = 10, 30, 120  # gradients a choice, steps of fitting after each choice and after the last
_REMOVED = 256  # most active latents, which are the candidates for removal
REMOVE = "ablate"  # operation on latents that stand for what the concept replaces


def gradients_for(latents: int) -> int:
    """The number of gradients that choosing and fitting so many latents takes."""
    return -(-latents // _ROUND) * (_CHOICE + _STEPS) + _LAST


def optimise(
    model: Intervention, states: States, steps: int, generator: torch.Generator, stepped: Callable[[], object]
) -> None:
    """Fit the weights of an intervention to the effect by gradient (Adam, with a rate that falls to zero). Pairs that
    are still far from their target weigh more, so that hard pairs are not given up for many easy ones. `stepped` is
    called after each step."""
    folds = model.folds()
    if not folds:
        return
    fitted = [fold.weights.requires_grad_() for fold in folds]
    optimiser = torch.optim.Adam(fitted, lr=_RATE, betas=(0.9, 0.98))
    left = torch.ones(len(states.pairs))  # share of each pair's distance that is left
    try:
        for step, (state, rows, weight) in enumerate(states.draw(steps, generator)):
            optimiser.param_groups[0]["lr"] = _RATE * min(1.0, 2 * (1 - step / steps))
            errors, pairs = states.errors(state, rows, model(state, rows)), [state.pairs[row] for row in rows]
            harder = (left[pairs] / left[states.differs].mean()).clamp(1 / 3, 3)
            loss = (errors * harder.to(errors.device)).mean() * weight
            for i, its_gradient in gradient(loss, dict(enumerate(fitted))).items():
                fitted[i].grad = its_gradient
            optimiser.step()
            with torch.no_grad():
                for fold in folds:
                    if fold.options.operation == REMOVE:
                        fold.weights.clamp_(min=0)
                now = errors.cpu() * states.scale[pairs] / state.distance[rows].clamp(min=1e-9)
                differ = states.differs[pairs]
                for pair, share in zip(torch.tensor(pairs)[differ].tolist(), now[differ].tolist(), strict=True):
                    left[pair] += 0.1 * (min(share, 2.0) - left[pair])
            stepped()
    finally:
        for parameter in fitted:
            parameter.requires_grad_(False)


@dataclass
class Survey:
    """
    Which latents are active at one site.

    Args:
        candidates (`list[int]`): those that are most active with the "from" prompts; the candidates for removal.
        gate (`list[int]`, *optional*): those that are active only on tokens that the prompts change. `None` if the
            prompts change almost every token.
        indicators (`list[int]`): those that are more active with the "to" prompts.
    """

    candidates: list[int]
    gate: list[int] | None
    indicators: list[int]


@torch.no_grad()
def survey(states: States, site: str) -> Survey:
    sae = states.dictionary.sites[site]
    count = sae.config.num_latents
    before, gained, fired, inside = torch.zeros(4, count)
    changed = tokens = 0  # tokens that the prompts change, and all tokens
    for state, where in zip(states.all(), states.differing_tokens(site), strict=True):
        codes, differs = state.codes[site], states.differs[state.pairs][:, None]
        with_from = state.drawn_with_from[:, None]
        before += codes.sums(differs)
        fired += codes.sums(differs, active=True)
        inside += codes.sums(differs & where, active=True)
        gained += state.goal_codes[site].sums(differs & ~with_from) - codes.sums(differs & with_from)
        changed, tokens = changed + int((differs & where).sum()), tokens + int(differs.sum()) * where.shape[1]
    typical = sae.typical_activation.cpu()
    rise = gained / typical
    indicators = [i for i in rise.topk(min(4, count)).indices.tolist() if rise[i] > 0.25 * rise.max()]
    gate = []
    if changed < 0.5 * tokens:
        gate = ((inside >= 0.97 * fired) & (fired >= 20)).nonzero()[:, 0].tolist()
    return Survey((before / typical).topk(min(_REMOVED, count)).indices.tolist(), gate or None, indicators)


class Pursuit:
    """Gradient pursuit: chooses a few latents at a time, to add or to take away, and fits the weights of all.
    `counted` is called with the number of gradients taken."""

    def __init__(
        self, states: States, surveys: dict[str, Survey], generator: torch.Generator, counted: Callable[[int], object]
    ):  # fmt: skip
        self.states, self.surveys, self.generator, self.counted = states, surveys, generator, counted
        empty = {"latents": (), "weights": (), "strength": 1.0, "clip": False}
        self.edits: dict[tuple[str, str], Edit] = {}  # by site and operation
        for site, survey in surveys.items():
            where = None if survey.gate is None else tuple(survey.gate)
            self.edits[site, "add"] = Edit(where=where, **empty)
            self.edits[site, REMOVE] = Edit(operation=REMOVE, bounds=(0.0, 1.0), **empty)

    def run(self, latents: int) -> Intervention:
        """Choose up to so many latents, fit all weights after each choice, and drop latents with hardly any weight."""
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
        optimise(model, self.states, steps, self.generator, lambda: self.counted(1))
        self.edits |= {(site, edit.operation): edit for site, edits in model.edits.items() for edit in edits}

    def _best(self) -> list[tuple[str, str, int]]:
        """Choices `(site, operation, latent)`, the best first: those whose weight changes the effect most, relative to
        the length of what it adds or takes away."""
        choices, sites = [], self.states.dictionary.sites
        gates = {site: survey.gate for site, survey in self.surveys.items()}
        candidates = {site: survey.candidates for site, survey in self.surveys.items()}
        orders = first_order(self._model(), _CHOICE, self.generator, gates, candidates)
        self.counted(_CHOICE)
        for site, order in orders.items():
            scores = order.removed / order.removed_length.clamp(min=1e-9)
            scores[[candidates[site].index(latent) for latent in self.edits[site, REMOVE].latents]] = 0
            removed = zip(scores.tolist(), candidates[site], strict=True)
            choices += [(score, site, REMOVE, latent) for score, latent in removed if score > 0]
            density = sites[site].density.cpu()
            scores = torch.where(density > 0, order.added.abs() / order.added_length.clamp(min=1e-9), 0.0)
            scores[list(self.edits[site, "add"].latents)] = 0
            top = scores.topk(min(_ROUND, len(scores)))
            added = zip(top.values.tolist(), top.indices.tolist(), strict=True)
            choices += [(score, site, "add", latent) for score, latent in added if score > 0]
        return [choice for _, *choice in sorted(choices, reverse=True)]


def _used(edit: Edit) -> Edit:
    """The edit without latents of hardly any weight."""
    used = [pair for pair in zip(edit.latents, edit.weights, strict=True) if abs(pair[1]) >= 0.02]
    latents, weights = zip(*used, strict=True) if used else ((), ())
    return replace(edit, latents=latents, weights=weights)
