"""
Effect: how much of what another prompt would change in a denoiser's prediction an edit of its activations changes.

With v the prediction, x a noisy latent, and a "from" and a "to" prompt that differ in a concept,

    E(edit) = 1 − Σ ‖v(x, from; edit) − v(x, to)‖² / Σ ‖v(x, from) − v(x, to)‖²

over steps and over noisy latents of both prompts' own runs; the mean over pairs. 1: the edit does what changing the
prompt does; 0: nothing; below 0: harm. It needs no scorer and no picture. Its gradient at no edit ranks all latents at
once (attribution patching: Nanda 2022; Kramár et al. 2024, 2403.00745).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..denoiser import get_denoiser, is_compiled
from ..models import interpolate
from .states import CHUNK, Changes, Pair, State, States, check_prompts, finite

__all__ = [
    "CHUNK", "Changes", "FirstOrder", "Intervention", "Pair", "Part", "State", "States", "check_pairs",
    "check_prompts", "finite", "first_order", "frozen",
]  # fmt: skip


def check_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs of different prompts; raises `ValueError` with the first that is none."""
    if isinstance(pairs, str) or not pairs:
        raise ValueError("Expected pairs (from, to) of prompts, got none.")
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
            raise ValueError(f"Expected pairs (from, to) of prompts, got {pair!r}.")
        if pair[0] == pair[1]:
            raise ValueError(
                f"The prompts of a pair must differ, or there is no effect to have a share of: both are {pair[0]!r}. "
                "Prompts in which nothing is to change go in `unchanged`."
            )
    return [tuple(pair) for pair in pairs]


@contextlib.contextmanager
def frozen(pipeline, checkpointing: bool = False):
    """The denoiser can be differentiated with respect to its activations alone inside the `with` block."""
    denoiser = get_denoiser(pipeline)
    compiled = is_compiled(denoiser, pipeline)
    if getattr(denoiser, "is_quantized", False) or compiled:
        kind = "compiled" if compiled else "quantized"
        raise ValueError(f"Effects are gradients through the denoiser, and a {kind} one gives none; load a plain one.")
    wanted = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    try:
        with torch.enable_grad():
            yield
    finally:
        if checkpointing:
            denoiser.disable_gradient_checkpointing()
        for parameter in wanted:
            parameter.requires_grad_(True)


@dataclass
class Part:
    """
    Latents that are fitted at one site. On the tokens that `gate` names some are added; others are taken away, each by
    its own activation.

    Args:
        gate (`list[int]`, *optional*): only tokens on which one of these latents is active; everywhere without it.
        added (`list[int]`), weights (`torch.Tensor`): latents and how much of their typical activation, `(added,)`.
        removed (`list[int]`), shares (`torch.Tensor`): latents and which share of their activation, `(removed,)`.
    """

    gate: list[int] | None = None
    added: list[int] = field(default_factory=list)
    weights: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    removed: list[int] = field(default_factory=list)
    shares: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def read(self) -> list[int]:
        return sorted({*(self.gate or ()), *self.removed})

    @property
    def fitted(self) -> list[torch.Tensor]:
        return [p for p in (self.weights, self.shares) if p.numel()]


class Intervention:
    """Parts at some sites as a change of activations, differentiable in what is fitted. It is called with a state and
    some of its rows."""

    def __init__(self, parts: dict[str, Part], states: States):
        self.parts, self.states = parts, states
        self.dictionary, self.grids = states.dictionary, states.grids

    def read(self) -> None:
        """Raise `ValueError` if a part reads latents and the states know none."""
        for site, part in self.parts.items():
            if part.read and not all(site in state.codes for state in self.states.all()):
                raise ValueError(f"Latents of {site} are read, and these states were drawn without: codes=True.")

    def gate(self, site: str, state: State, rows: Sequence[int]) -> torch.Tensor:
        """Which tokens a site's additions reach, `(rows, N or 1, 1)`."""
        part = self.parts[site]
        if part.gate is None:
            return torch.ones(len(rows), 1, 1)
        return (self.active(site, state, rows, part.gate) > 0).any(-1, keepdim=True).float()

    def gain(self, site: str, state: State, rows: Sequence[int]) -> torch.Tensor | float:
        """How many times its direction a latent moves each token by, `(rows, N, 1)`, where that varies."""
        return state.gains[site][list(rows)] if site in state.gains else 1.0

    def active(self, site: str, state: State, rows: Sequence[int], latents: Sequence[int]) -> torch.Tensor:
        """How active some latents are, `(rows, N, latents)`."""
        return state.codes[site].dense(latents)[list(rows)]

    def full(self, site: str, state: State, rows: Sequence[int], change: torch.Tensor | None) -> torch.Tensor:
        """A change of every token of some rows, `(rows, N, d)`, as a leaf."""
        width = self.dictionary.sites[site].config.in_channels
        zero = torch.zeros(len(rows), state.tokens[site], width, device=state.device)
        return zero if change is None else (zero + change).detach()

    def shares_of_anchors(self, site: str, timestep: float) -> torch.Tensor:
        """What each anchor's direction weighs at a step, `(G,)`."""
        anchors = torch.eye(len(self.dictionary.sites[site].config.anchors))
        return interpolate(anchors, self.grids[site].coordinate(timestep))

    def directions(self, site: str, latents: Sequence[int], state: State) -> torch.Tensor:
        """`(latents, d)` at a state's step, where its activations are."""
        step = self.grids[site].step(state.timestep)
        return self.dictionary.sites[site].directions(list(latents)).at(step).to(state.device, torch.float32)

    def __call__(self, state: State, rows: Sequence[int], added: float = 1.0) -> Changes:
        """What to add at each site; `added` is the strength of the additions alone."""
        changes = {}
        for site, part in self.parts.items():
            rtsae, terms, gain = self.dictionary.sites[site], [], self.gain(site, state, rows)
            if part.added:
                amounts = part.weights * rtsae.typical_activation[part.added].to(part.weights)
                path = amounts.to(state.device) @ self.directions(site, part.added, state)
                terms.append(added * self.gate(site, state, rows).to(state.device) * gain * path)
            if part.removed:
                amounts = gain * part.shares.to(state.device) * self.active(site, state, rows, part.removed)
                terms.append(-amounts @ self.directions(site, part.removed, state))
            if terms:
                changes[site] = sum(terms[1:], terms[0])
        return changes


@dataclass
class FirstOrder:
    """
    How the effect grows with the weight of each latent of a site, at the present weights.

    Args:
        added (`torch.Tensor`): dE by weight of its constant addition, `(m,)`, in units of its typical activation.
        added_length (`torch.Tensor`): root mean square size of that addition in activation space, `(m,)`.
        removed, removed_length (`torch.Tensor`): the same by share of what is there of each candidate,
            `(candidates,)`.
    """

    added: torch.Tensor
    added_length: torch.Tensor
    removed: torch.Tensor
    removed_length: torch.Tensor


@dataclass
class Pass:
    """
    One backward pass.

    Args:
        state (`State`), rows (`list[int]`), weight (`float`): of what, and what it counts.
        slopes (`dict[str, torch.Tensor]`): how the effect on each row grows with a constant addition at each site,
            `(rows, d)`, on the CPU.
    """

    state: State
    rows: list[int]
    weight: float
    slopes: dict[str, torch.Tensor]


def first_order(
    model: Intervention, candidates: dict[str, list[int]], count: int, generator: torch.Generator,
    passes: list[Pass] | None = None,
) -> dict[str, FirstOrder]:  # fmt: skip
    """
    Attribution patching: all latents of all sites of an intervention at once, from `count` backward passes.

    Args:
        candidates (`dict[str, list[int]]`): latents of each site that might be taken away; the states must have read
            them.
        passes (`list[Pass]`, *optional*): the passes are added to it.

    Raises:
        `ValueError`: the denoiser gives no gradient, or one that is NaN or inf.
    """
    states, dictionary = model.states, model.dictionary
    configs = {site: dictionary.sites[site].config for site in model.parts}
    sums = {site: torch.zeros(len(config.anchors), config.in_channels) for site, config in configs.items()}
    sizes = {site: torch.zeros(len(config.anchors)) for site, config in configs.items()}
    removed = {site: torch.zeros(2, len(latents)) for site, latents in candidates.items()}
    for state, rows, weight in states.draw(count, generator):
        there = model(state, rows)
        changes = {site: model.full(site, state, rows, there.get(site)).requires_grad_() for site in model.parts}
        gradients = gradient(states.errors(state, rows, changes).sum(), list(changes.values()))
        seen, share = Pass(state, rows, weight, {}), weight / len(rows)
        for site, own in zip(changes, gradients, strict=True):
            gain, at = model.gain(site, state, rows), model.shares_of_anchors(site, state.timestep)
            gate = model.gate(site, state, rows).to(own.device) * gain
            slopes = seen.slopes[site] = -(own * gate).sum(1).cpu()
            sums[site] += share * at[:, None] * slopes.sum(0)
            sizes[site] += weight * at * float(gate.square().mean()) * own.shape[1]
            if candidates.get(site):
                active = gain * model.active(site, state, rows, candidates[site])
                paths = model.directions(site, candidates[site], state)
                removed[site][0] += share * torch.einsum("bnk,bnd,kd->k", active, own, paths).cpu()
                removed[site][1] += share * (active.square().sum((0, 1)) * paths.square().sum(1)).cpu()
        if passes is not None:
            passes.append(seen)
    found = {}
    for site in model.parts:
        rtsae = dictionary.sites[site]
        added = torch.zeros(2, rtsae.config.num_latents)
        for start in range(0, rtsae.config.num_latents, CHUNK):
            rows = list(range(start, min(start + CHUNK, rtsae.config.num_latents)))
            typical = rtsae.typical_activation[rows, None, None].cpu()
            paths = rtsae.feature_trajectories(rows).detach().float().cpu() * typical
            added[0, rows] = torch.einsum("mgd,gd->m", paths, sums[site])
            added[1, rows] = torch.einsum("mgd,mgd,g->m", paths, paths, sizes[site])
        gain, square = removed.get(site, torch.zeros(2, 0)) / count
        found[site] = FirstOrder(added[0] / count, (added[1] / count).sqrt(), gain, square.sqrt())
    return found


def gradient(loss: torch.Tensor, of: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Of a loss through the denoiser; raises `ValueError` if there is none, or it is NaN or inf."""
    if not loss.requires_grad:
        raise ValueError("The denoiser gives no gradient, and by that latents are chosen; a linear map needs none.")
    return tuple(finite(own) for own in torch.autograd.grad(loss, of))
