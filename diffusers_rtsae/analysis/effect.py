"""
Effect: how far an edit of activations moves a denoiser's prediction towards its prediction for another prompt.

With v the prediction, x a noisy latent, and a "from" and a "to" prompt that differ in a concept,

    E(edit) = 1 − Σ ‖v(x, from; edit) − v(x, to)‖² / Σ ‖v(x, from) − v(x, to)‖²

The sums go over the steps and the noisy latents of both prompts' own generations; E is averaged over pairs. 1 means
that the edit does what changing the prompt does, 0 that it does nothing, less than 0 that it does harm. No scorer and
no picture is needed. The gradient of E without an edit ranks all latents at once (attribution patching: Nanda 2022;
Kramár et al. 2024, 2403.00745).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from ..denoiser import get_denoiser, is_compiled
from ..models import interpolate
from ..steering import Edit, Fold, fold_edits, read_by, total
from .states import CHUNK, Changes, Pair, State, States, check_prompts, finite

__all__ = [
    "CHUNK", "Changes", "FirstOrder", "Intervention", "Pair", "State", "States", "adding", "check_pairs",
    "check_prompts", "finite", "first_order", "frozen",
]  # fmt: skip


Key = TypeVar("Key", str, int)


def check_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs as a list of tuples; raise `ValueError` unless each has two different prompts."""
    if isinstance(pairs, str) or not pairs:
        raise ValueError("Expected pairs (from, to) of prompts, got none.")
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
            raise ValueError(f"Expected pairs (from, to) of prompts, got {pair!r}.")
        if pair[0] == pair[1]:
            raise ValueError(
                f"Expected the two prompts of a pair to differ, got {pair[0]!r} twice; prompts that must not change "
                "go in `unchanged`."
            )
    return [tuple(pair) for pair in pairs]


@contextlib.contextmanager
def frozen(pipeline, checkpointing: bool = False):
    """
    Inside the `with` block gradients flow through the denoiser to its activations, but not to its weights.

    Args:
        checkpointing (`bool`): recompute activations in the backward pass, which needs less memory and more time.

    Raises:
        `ValueError`: the denoiser is compiled, or uses layerwise casting.
    """
    denoiser = get_denoiser(pipeline)
    if is_compiled(denoiser, pipeline):
        raise ValueError(
            "Expected a denoiser that gives gradients, got a compiled one; load it without torch.compile."
        )
    if any(_casts_weights(module) for module in denoiser.modules()):
        raise ValueError(
            "Expected a denoiser that gives gradients, got one with layerwise casting, whose weights are in another "
            "precision again when gradients are computed; load it without."
        )
    trainable = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    try:
        with torch.enable_grad():
            yield
    finally:
        if checkpointing:
            denoiser.disable_gradient_checkpointing()
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def explain_out_of_memory(batch_size: int):
    """If a device runs out of memory inside the `with` block, raise a `torch.OutOfMemoryError` that says which
    arguments need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"The device ran out of memory with batch_size={batch_size}: a smaller batch needs less, and "
            "checkpointing=True needs less for gradients."
        ) from error


def _casts_weights(module: torch.nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook("layerwise_casting") is not None


class Intervention:
    """
    Edits applied to the activations of states. It uses the same [`Fold`]s as steering, so it changes exactly what
    steering changes, and its changes are differentiable in the edits' weights. Call it with a state and some of its
    rows.

    Args:
        edits (`dict[str, list[Edit]]`): by site. Edits that have neither latents nor a map are left out.
        states (`States`): the states that it is called with, or others of the same dictionary.
        reached (*optional*): computes for a site, a state and some of its rows a factor for the change of each token,
            `(rows, N, 1)`.

    Raises:
        `ValueError`: an edit reads latents, but the states were drawn with `codes=False`.
    """

    def __init__(
        self, edits: dict[str, list[Edit]], states: States,
        reached: Callable[[str, State, Sequence[int]], torch.Tensor] | None = None,
    ):  # fmt: skip
        self.states, self.reached, self._folds, self._rows = states, reached, {}, {}
        for site, site_edits in edits.items():
            site_edits = [edit for edit in site_edits if edit.latents or edit.map is not None]
            rows = self._rows[site] = read_by(site_edits)
            if rows and not all(site in state.codes for state in states.all()):
                raise ValueError(f"The edits at {site} read latents: expected states drawn with codes=True.")
            self._folds[site] = fold_edits(site_edits, states.dictionary.sites[site], rows, states.device)

    @property
    def edits(self) -> dict[str, list[Edit]]:
        """The edits of each site, with their current weights."""
        return {site: [edit for fold in folds for edit in fold.edits_now()] for site, folds in self._folds.items()}

    def variant(self, **options) -> Intervention:
        """A copy with other options for all its edits, e.g. `strength=1.5`."""
        edits = {site: [replace(edit, **options) for edit in edits] for site, edits in self.edits.items()}
        return Intervention(edits, self.states, self.reached)

    def with_edits(self, edits: dict[str, list[Edit]]) -> Intervention:
        """A copy with other edits and the same `reached`."""
        return Intervention(edits, self.states, self.reached)

    def folds(self) -> list[Fold]:
        """The folds that have weights: those of edits of latents."""
        return [fold for folds in self._folds.values() for fold in folds if len(fold.weights)]

    def changes(
        self, site: str, state: State, rows: Sequence[int], tokens: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What each fold of a site adds to tokens `(rows, N, d)`, as [`Fold.change`] returns it."""
        step, latents = self.states.step(site, state), None
        if self._rows[site]:
            latents = state.codes[site].dense(self._rows[site])[list(rows)]
        reached = None if self.reached is None else self.reached(site, state, rows).to(tokens.device)
        folds = [fold for fold in self._folds[site] if fold.options.acts_at(state.timestep)]
        return [fold.change(tokens.to(fold.device), latents, step, token_scale=reached) for fold in folds]

    def __call__(self, state: State, rows: Sequence[int]) -> Changes:
        """The changes at the sites that have an edit in its window at this step."""
        acting = {
            site: any(fold.options.acts_at(state.timestep) for fold in folds) for site, folds in self._folds.items()
        }
        return {site: partial(self._change, site, state, rows) for site, acts in acting.items() if acts}

    def _change(self, site: str, state: State, rows: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
        return total(self.changes(site, state, rows, tokens), tokens)


def adding(site: str, latent: int, states: States, strength: float = 1.0) -> Intervention:
    """An edit that adds a latent to every token: `strength` times its typical activation."""
    edit = Edit(latents=(latent,), weights=(1.0,), strength=strength, clip=False)
    return Intervention({site: [edit]}, states)


@dataclass
class FirstOrder:
    """
    The derivative of the effect with respect to each latent's weight at a site, at the present weights.

    Args:
        added (`torch.Tensor`): derivative with respect to the weight of the latent when it is added, `(m,)`; weight 1
            is its typical activation.
        added_length (`torch.Tensor`): root mean square length of that addition in activation space, `(m,)`.
        removed, removed_length (`torch.Tensor`): the same for each candidate when a share of its own activation is
            taken away, `(candidates,)`.
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
        state (`State`), rows (`list[int]`): the state and its rows that were differentiated.
        weight (`float`): its weight in the average over states.
        slopes (`dict[str, torch.Tensor]`): for each site, the derivative of each row's effect with respect to a
            vector that is added to all its tokens, `(rows, d)`, on the CPU.
    """

    state: State
    rows: list[int]
    weight: float
    slopes: dict[str, torch.Tensor]


class _Leaves:
    """The changes that an intervention makes, as leaf tensors that a gradient is taken of; and the changes that the
    probes would make to the same tokens."""

    def __init__(self, model: Intervention, probes: Intervention, state: State, rows: Sequence[int]):
        self.model, self.probes, self.state, self.rows = model, probes, state, rows
        self.leaves: dict[str, torch.Tensor] = {}
        self.probed: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def __call__(self, sites: Iterable[str]) -> Changes:
        changes = self.model(self.state, self.rows)
        return {site: partial(self._make, site, changes.get(site)) for site in sites}

    def _make(self, site: str, change: Callable | None, tokens: torch.Tensor) -> torch.Tensor:
        if site not in self.leaves:  # gradient checkpointing runs a site twice
            with torch.no_grad():
                leaf = torch.zeros(tokens.shape, device=tokens.device)
                leaf += 0 if change is None else change(tokens)
                self.probed[site] = self.probes.changes(site, self.state, self.rows, tokens)
            self.leaves[site] = leaf.requires_grad_()
        return self.leaves[site]


def first_order(
    model: Intervention, count: int, generator: torch.Generator, where: dict[str, Sequence[int] | None] | None = None,
    candidates: dict[str, list[int]] | None = None, passes: list[Pass] | None = None,
) -> dict[str, FirstOrder]:  # fmt: skip
    """
    Attribution patching: the first-order effect of all latents of all sites of a dictionary, from `count` backward
    passes.

    Args:
        model (`Intervention`): the edits at which the derivatives are taken.
        where (`dict[str, Sequence[int]]`, *optional*): latents of each site. Additions act on tokens on which one of
            them is active; without it, on all tokens that `model` reaches.
        candidates (`dict[str, list[int]]`, *optional*): latents of each site whose removal is differentiated too; the
            states must have read them.
        passes (`list[Pass]`, *optional*): each pass is appended to it.

    Raises:
        `ValueError`: the denoiser gives no gradient, or one that is NaN or inf.
    """
    states, dictionary, candidates = model.states, model.states.dictionary, candidates or {}
    configs = {site: sae.config for site, sae in dictionary.sites.items()}
    sums = {site: torch.zeros(len(config.anchors), config.in_channels) for site, config in configs.items()}
    sizes = {site: torch.zeros(len(config.anchors)) for site, config in configs.items()}
    removed = {site: torch.zeros(2, len(latents)) for site, latents in candidates.items()}
    probes = model.with_edits({s: _probes((where or {}).get(s), candidates.get(s, ())) for s in configs})
    for state, rows, weight in states.draw(count, generator):
        leaves = _Leaves(model, probes, state, rows)
        errors = states.errors(state, rows, leaves(configs)).sum()
        gradients = gradient(errors, {site: leaves.leaves[site] for site in configs})
        one_pass, share = Pass(state, rows, weight, {}), weight / len(rows)
        for site, site_gradient in gradients.items():
            at = interpolate(torch.eye(len(sums[site])), states.grids[site].coordinate(state.timestep))
            (reach, _), *removals = leaves.probed[site]
            slopes = one_pass.slopes[site] = -(site_gradient * reach).sum(1).cpu()
            sums[site] += share * at[:, None] * slopes.sum(0)
            sizes[site] += weight * at * float(reach.square().mean()) * site_gradient.shape[1]
            for amounts, paths in removals:
                removed[site][0] -= share * torch.einsum("bnk,bnd,bkd->k", amounts, site_gradient, paths).cpu()
                removed[site][1] += share * (amounts.square().sum(1) * paths.square().sum(2)).sum(0).cpu()
        if passes is not None:
            passes.append(one_pass)
    orders = {}
    for site, sae in dictionary.sites.items():
        added = torch.zeros(2, sae.config.num_latents)
        for start in range(0, sae.config.num_latents, CHUNK):
            rows = list(range(start, min(start + CHUNK, sae.config.num_latents)))
            typical = sae.typical_activation[rows, None, None].cpu()
            paths = sae.feature_trajectories(rows).detach().float().cpu() * typical
            added[0, rows] = torch.einsum("mgd,gd->m", paths, sums[site])
            added[1, rows] = torch.einsum("mgd,mgd,g->m", paths, paths, sizes[site])
        gain, square = removed.get(site, torch.zeros(2, 0)) / count
        orders[site] = FirstOrder(added[0] / count, (added[1] / count).sqrt(), gain, square.sqrt())
    return orders


def _probes(where: Sequence[int] | None, candidates: Sequence[int]) -> list[Edit]:
    """An edit that adds a latent, to learn which tokens additions reach, and one that takes candidates away."""
    where, ones = None if where is None else tuple(where), (1.0,) * len(candidates)
    return [
        Edit(latents=(0,), weights=(1.0,), strength=1.0, where=where, clip=False),
        Edit(latents=tuple(candidates), weights=ones, strength=1.0, operation="ablate", clip=False),
    ]


def gradient(loss: torch.Tensor, of: dict[Key, torch.Tensor], keep: bool = False) -> dict[Key, torch.Tensor]:
    """
    The gradients of a loss through the denoiser.

    Args:
        loss (`torch.Tensor`): a number.
        of (`dict`): by site, or by number, the tensors that the loss is differentiated by.
        keep (`bool`): whether another gradient will be taken of the same predictions.

    Raises:
        `ValueError`: the denoiser gives no gradient at a site, or one that is NaN or inf.
    """
    gradients = [None] * len(of)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, [*of.values()], retain_graph=keep, allow_unused=True)
    found = dict(zip(of, gradients, strict=True))
    if none := [place for place, values in found.items() if values is None]:
        raise ValueError(
            f"Latents are chosen and explained by gradients, and this denoiser gives none at {none[0]}: expected a "
            "site that its prediction depends on, and layers that gradients flow through; a linear map (`rank`) needs "
            "none."
        )
    return {place: finite(values) for place, values in found.items()}
