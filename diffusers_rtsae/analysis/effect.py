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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from ..denoiser import get_denoiser, is_compiled
from ..models import interpolate
from ..steering import Edit, Fold, fold_edits, read_by, total
from .states import CHUNK, Changes, Pair, State, States, check_prompts, finite

__all__ = [
    "CHUNK", "Changes", "FirstOrder", "Intervention", "Pair", "State", "States", "adding", "check_pairs",
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
    if is_compiled(denoiser, pipeline):
        raise ValueError(
            "Effects are gradients through the denoiser, and a compiled one gives none; load a plain one."
        )
    if any(_casts_weights(module) for module in denoiser.modules()):
        raise ValueError(
            "Effects are gradients through the denoiser, and layerwise casting has its weights in another precision "
            "again when these are computed; load one without."
        )
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


@contextlib.contextmanager
def memory_told(batch_size: int):
    """Raise `torch.OutOfMemoryError` that says what needs less, if a device runs out of memory inside the `with`
    block."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"The device ran out of memory with batch_size={batch_size}: a smaller one needs less, and "
            "checkpointing=True less for gradients."
        ) from error


def _casts_weights(module: torch.nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook("layerwise_casting") is not None


class Intervention:
    """
    Edits at some sites as changes of a state's activations: what they do when they steer, by the same folds, and
    differentiable in their weights. It is called with a state and some of its rows.

    Args:
        edits (`dict[str, list[Edit]]`): of each site; those of no latents and no map are left out.
        states (`States`): that it acts on, or others of the same dictionary.
        reached (*optional*): what the changes at a site are multiplied by on each token of some rows of a state,
            `(rows, N, 1)`.

    Raises:
        `ValueError`: an edit reads latents, and the states know none.
    """

    def __init__(
        self, edits: dict[str, list[Edit]], states: States,
        reached: Callable[[str, State, Sequence[int]], torch.Tensor] | None = None,
    ):  # fmt: skip
        self.states, self.reached, self._folds, self._rows = states, reached, {}, {}
        for site, own in edits.items():
            own = [edit for edit in own if edit.latents or edit.map is not None]
            rows = self._rows[site] = read_by(own)
            if rows and not all(site in state.codes for state in states.all()):
                raise ValueError(f"Latents of {site} are read, and these states were drawn without: codes=True.")
            self._folds[site] = fold_edits(own, states.dictionary.sites[site], rows, states.device)

    @property
    def edits(self) -> dict[str, list[Edit]]:
        """Its edits, with their weights as they are now."""
        return {site: [edit for fold in folds for edit in fold.edits_now()] for site, folds in self._folds.items()}

    def variant(self, **options) -> Intervention:
        """The same with other options of all its edits, e.g. `strength=1.5`."""
        edits = {site: [replace(edit, **options) for edit in own] for site, own in self.edits.items()}
        return Intervention(edits, self.states, self.reached)

    def with_edits(self, edits: dict[str, list[Edit]]) -> Intervention:
        """Other edits that act on the same tokens."""
        return Intervention(edits, self.states, self.reached)

    def folds(self) -> list[Fold]:
        """Of edits of latents, which have weights."""
        return [fold for folds in self._folds.values() for fold in folds if len(fold.weights)]

    def changes(
        self, site: str, state: State, rows: Sequence[int], tokens: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What each fold of a site adds to these tokens `(rows, N, d)`: see [`Fold.change`]."""
        step, latents = self.states.step(site, state), None
        if self._rows[site]:
            latents = state.codes[site].dense(self._rows[site])[list(rows)]
        reached = None if self.reached is None else self.reached(site, state, rows).to(tokens.device)
        folds = [fold for fold in self._folds[site] if fold.options.acts_at(state.timestep)]
        return [fold.change(tokens.to(fold.device), latents, step, reached=reached) for fold in folds]

    def __call__(self, state: State, rows: Sequence[int]) -> Changes:
        """What to add at each site at which something acts."""
        acting = {
            site: any(fold.options.acts_at(state.timestep) for fold in folds) for site, folds in self._folds.items()
        }
        return {site: partial(self._change, site, state, rows) for site, acts in acting.items() if acts}

    def _change(self, site: str, state: State, rows: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
        return total(self.changes(site, state, rows, tokens), tokens)


def adding(site: str, latent: int, states: States, strength: float = 1.0) -> Intervention:
    """A latent that is added everywhere, as far as its typical activation times a strength."""
    edit = Edit(latents=(latent,), weights=(1.0,), strength=strength, clip=False)
    return Intervention({site: [edit]}, states)


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


class _Leaves:
    """Changes of activations by what an intervention does, as leaves to differentiate with respect to; and what
    probes would add to the same tokens."""

    def __init__(self, model: Intervention, probes: Intervention, state: State, rows: Sequence[int]):
        self.model, self.probes, self.state, self.rows = model, probes, state, rows
        self.made: dict[str, torch.Tensor] = {}
        self.probed: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def __call__(self, sites: Iterable[str]) -> Changes:
        there = self.model(self.state, self.rows)
        return {site: partial(self._make, site, there.get(site)) for site in sites}

    def _make(self, site: str, change: Callable | None, tokens: torch.Tensor) -> torch.Tensor:
        if site not in self.made:  # checkpointed gradients run a site twice
            with torch.no_grad():
                leaf = torch.zeros(tokens.shape, device=tokens.device)
                leaf += 0 if change is None else change(tokens)
                self.probed[site] = self.probes.changes(site, self.state, self.rows, tokens)
            self.made[site] = leaf.requires_grad_()
        return self.made[site]


def first_order(
    model: Intervention, count: int, generator: torch.Generator, where: dict[str, Sequence[int] | None] | None = None,
    candidates: dict[str, list[int]] | None = None, passes: list[Pass] | None = None,
) -> dict[str, FirstOrder]:  # fmt: skip
    """
    Attribution patching: all latents of all sites of a dictionary at once, from `count` backward passes.

    Args:
        where (`dict[str, Sequence[int]]`, *optional*): latents of each site; additions reach tokens on which one of
            them is active. Without: all tokens that the model reaches.
        candidates (`dict[str, list[int]]`, *optional*): latents of each site that might be taken away; the states
            must have read them.
        passes (`list[Pass]`, *optional*): the passes are added to it.

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
        gradients = gradient(errors, [leaves.made[site] for site in configs])
        seen, share = Pass(state, rows, weight, {}), weight / len(rows)
        for site, own in zip(configs, gradients, strict=True):
            at = interpolate(torch.eye(len(sums[site])), states.grids[site].coordinate(state.timestep))
            (reach, _), *taken = leaves.probed[site]
            slopes = seen.slopes[site] = -(own * reach).sum(1).cpu()
            sums[site] += share * at[:, None] * slopes.sum(0)
            sizes[site] += weight * at * float(reach.square().mean()) * own.shape[1]
            for amounts, paths in taken:
                removed[site][0] -= share * torch.einsum("bnk,bnd,bkd->k", amounts, own, paths).cpu()
                removed[site][1] += share * (amounts.square().sum(1) * paths.square().sum(2)).sum(0).cpu()
        if passes is not None:
            passes.append(seen)
    found = {}
    for site, sae in dictionary.sites.items():
        added = torch.zeros(2, sae.config.num_latents)
        for start in range(0, sae.config.num_latents, CHUNK):
            rows = list(range(start, min(start + CHUNK, sae.config.num_latents)))
            typical = sae.typical_activation[rows, None, None].cpu()
            paths = sae.feature_trajectories(rows).detach().float().cpu() * typical
            added[0, rows] = torch.einsum("mgd,gd->m", paths, sums[site])
            added[1, rows] = torch.einsum("mgd,mgd,g->m", paths, paths, sizes[site])
        gain, square = removed.get(site, torch.zeros(2, 0)) / count
        found[site] = FirstOrder(added[0] / count, (added[1] / count).sqrt(), gain, square.sqrt())
    return found


def _probes(where: Sequence[int] | None, candidates: Sequence[int]) -> list[Edit]:
    """An edit that adds a latent on the tokens that additions reach, and one that takes candidates away."""
    where, ones = None if where is None else tuple(where), (1.0,) * len(candidates)
    return [
        Edit(latents=(0,), weights=(1.0,), strength=1.0, where=where, clip=False),
        Edit(latents=tuple(candidates), weights=ones, strength=1.0, operation="ablate", clip=False),
    ]


def gradient(loss: torch.Tensor, of: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Of a loss through the denoiser; raises `ValueError` if there is none, or it is NaN or inf."""
    if not loss.requires_grad:
        raise ValueError("The denoiser gives no gradient, and by that latents are chosen; a linear map needs none.")
    return tuple(finite(own) for own in torch.autograd.grad(loss, of))
