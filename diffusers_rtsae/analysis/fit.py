"""Fit a feature to what it is to do: few latents and signed weights, chosen by their effect on the prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from ..pipeline import get_dictionary
from .effect import Changes, Pair, State, States, check_pairs, frozen

_ROWS = 8  # states of one gradient
_RATE = 0.05  # of Adam, for weights in units of a typical activation
_FOLLOWED = 256  # latents that are candidates for being taken away by their own activation


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

    def directions(self, site: str, latents: Sequence[int], timestep: float) -> torch.Tensor:
        """`(latents, d)` at a step."""
        return self.at(site, self.dictionary.sites[site].feature_trajectories(list(latents)).float(), timestep)

    def at(self, site: str, paths: torch.Tensor, timestep: float) -> torch.Tensor:
        """Paths `(..., G, d)` at a step, `(..., d)`."""
        coordinate, last = self.grids[site].coordinate(timestep), paths.shape[-2] - 1
        low = min(int(coordinate), last)
        return torch.lerp(paths[..., low, :], paths[..., min(low + 1, last), :], coordinate - low)

    def __call__(self, state: State, rows: Sequence[int]) -> Changes:
        changes = {}
        for site, part in self.parts.items():
            rtsae, terms = self.dictionary.sites[site], []
            if part.added:
                amounts = part.weights * rtsae.typical_activation[part.added]
                terms.append(self.gate(site, state, rows) * (amounts @ self.directions(site, part.added, state.timestep)))
            if part.direction is not None:
                terms.append(self.gate(site, state, rows) * self.at(site, part.direction, state.timestep))
            if part.removed:
                amounts = part.shares * self.active(site, state, rows, part.removed)
                terms.append(-amounts @ self.directions(site, part.removed, state.timestep))
            if terms:
                changes[site] = sum(terms[1:], terms[0])
        return changes


def _optimise(model: _Model, groups: list[States], steps: int, generator: torch.Generator, rate: float, bar) -> None:
    """Fit the weights of a model by gradient on the effect (Adam, rate falling to zero)."""
    fitted = [p for part in model.parts.values() for p in part.fitted]
    for parameter in fitted:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(fitted, rate, betas=(0.9, 0.98))
    draws = [_forever(states, generator) for states in groups]
    try:
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1.0, 2 * (1 - step / steps))
            optimiser.zero_grad()
            for states, drawn in zip(groups, draws, strict=True):
                state, rows, weight = next(drawn)
                loss = states.error(state, rows, model(state, rows)) * weight
                gradients = torch.autograd.grad(loss, fitted)
                for parameter, gradient in zip(fitted, gradients, strict=True):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            if not all(parameter.grad.isfinite().all() for parameter in fitted):
                raise ValueError("The gradient of the effect is NaN or inf; use float32 or bfloat16.")
            optimiser.step()
            with torch.no_grad():
                for part in model.parts.values():
                    part.shares.clamp_(min=0)
            bar.update()
    finally:
        for parameter in fitted:
            parameter.requires_grad_(False)


def _forever(states: States, generator: torch.Generator):
    while True:
        yield from states.draw(64, _ROWS, generator)
