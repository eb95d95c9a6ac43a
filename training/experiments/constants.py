"""Constant additions to a site at each anchor: their effect on the prediction, the best of them, and the latents that
come nearest to it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tqdm import tqdm

from diffusers_rtsae import Dictionary, SparseDictionary
from diffusers_rtsae.analysis.effect import Intervention, State, States, first_order
from diffusers_rtsae.analysis.pursuit import optimise
from diffusers_rtsae.models import interpolate
from diffusers_rtsae.steering import Edit

from .steering import as_dictionary

PASSES = 20  # backward passes of a slope


def axes(like: SparseDictionary) -> Dictionary:
    """A dictionary each of whose latents adds 1 to one channel of a site at one anchor."""
    site, shape = like.config.site, (len(like.config.anchors), like.config.in_channels)
    sae = as_dictionary(site, list(like.config.anchors), torch.eye(shape[0] * shape[1]).unflatten(1, shape))
    sae.density.fill_(1.0)
    return Dictionary({site: sae})


def concern(states: States, site: str) -> dict[int, torch.Tensor]:
    """The tokens `(states, N)` on which the two prompts make a difference, by the `id` of each state."""
    return {id(state): where for state, where in zip(states.all(), states.differing_tokens(site), strict=True)}


def concerned(edits: dict[str, list[Edit]], states: States) -> Intervention:
    """Edits that act on the tokens on which the two prompts make a difference."""
    where = {site: concern(states, site) for site in states.dictionary.sites}

    def reached(site: str, state: State, rows) -> torch.Tensor:
        return where[site][id(state)][list(rows)][..., None].float()

    return Intervention(edits, states, reached)


@torch.no_grad()
def mean_change(states: States, site: str) -> torch.Tensor:
    """
    `(G, d)`: the constants at the anchors whose interpolation comes nearest to the change of the activation from one
    prompt to the other, on the tokens where the prompts make a difference. States are weighed as in `fit_feature`.
    """
    sae = states.dictionary.sites[site]
    anchors = len(sae.config.anchors)
    square, product = torch.zeros(anchors, anchors), torch.zeros(anchors, sae.config.in_channels)
    for state, where in zip(states.all(), states.differing_tokens(site), strict=True):
        shares = interpolate(torch.eye(anchors), states.grids[site].coordinate(state.timestep))
        change = state.goal[site] - state.present[site]
        differ = states.differs[state.pairs]
        weight = float((change[differ].square().sum((1, 2)).mean() / sae.spread.mean() ** 2).clamp(min=1e-6)) ** -0.5
        chosen = where & differ[:, None]
        square += weight * float(chosen.sum()) * shares[:, None] * shares
        product += weight * shares[:, None] * change[chosen].sum(0)
    return torch.linalg.solve(square, product).contiguous()


def free_direction(states: States, steps: int) -> torch.Tensor:
    """`(G, d)`: the constants at the anchors with the largest effect, on the tokens where the prompts make a
    difference, fitted by gradient through the frozen denoiser. The states must be of a dictionary of `axes`."""
    ((site, sae),) = states.dictionary.sites.items()
    count, unit = sae.config.num_latents, mean_change(states, site).square().mean().sqrt()  # of the optimiser's steps
    sae.typical_activation.fill_(unit)
    edit = Edit(latents=tuple(range(count)), weights=(0.0,) * count, strength=1.0, clip=False)
    model = concerned({site: [edit]}, states)
    with tqdm(total=steps, desc="free direction", leave=False) as bar:
        optimise(model, states, steps, torch.Generator().manual_seed(0), bar.update)
    sae.typical_activation.fill_(1.0)
    return unit * model.folds()[0].weights.cpu().view(len(sae.config.anchors), -1)


class Slope(NamedTuple):
    """
    The first-order effect of a target's pairs of prompts, for any dictionary with the same anchors.

    Args:
        slope (`torch.Tensor`): gradient of the effect with respect to a constant addition at each anchor, `(G, d)`.
        size (`torch.Tensor`): weight of the squared length of such an addition at each anchor, `(G,)`.
        length (`float`): length of the mean change of the activation with the prompt, over all anchors.
    """

    slope: torch.Tensor
    size: torch.Tensor
    length: float

    @classmethod
    def of(cls, model: Intervention) -> Slope:
        """Measured at an addition of 0, on the tokens that the intervention acts on. Its states must be of a
        dictionary of `axes`."""
        ((site, sae),) = model.states.dictionary.sites.items()
        shape = len(sae.config.anchors), -1
        order = first_order(model, PASSES, torch.Generator().manual_seed(0))[site]
        size = order.added_length.square().view(shape)[:, 0]
        return cls(order.added.view(shape), size, float(mean_change(model.states, site).norm()))


@torch.no_grad()
def effect_features(
    sae: SparseDictionary, slopes: list[Slope], targets: list[tuple[str, str]], count: int
) -> dict[str, dict]:
    """Labels: for each (factor, value) the `count` latents with the largest effect for the length of their trajectory,
    weighed in proportion to it. Together they are as long as the mean change of the activation with the prompt."""
    paths = sae.feature_trajectories() * sae.typical_activation[:, None, None]
    labels = {}
    for (factor, value), of in zip(targets, slopes, strict=True):
        size = (paths.square().sum(2) @ of.size).sqrt()
        score = torch.where(sae.density > 0, torch.einsum("mgd,gd->m", paths, of.slope) / size, 0.0).nan_to_num()
        chosen = score.abs().topk(count).indices
        weights = score[chosen] / size[chosen]
        weights *= of.length / torch.einsum("k,kgd->gd", weights, paths[chosen]).norm()
        labels[f"{factor}={value}"] = as_label(sae, factor, value, chosen, weights)
    return labels


def as_label(sae: SparseDictionary, factor: str, value: str, latents: torch.Tensor, weights: torch.Tensor) -> dict:
    """A label of some latents, without edit options."""
    entry = {"site": sae.config.site, "latents": latents.tolist(), "weights": weights.tolist(), "where": None}
    return {"factor": factor, "value": value, "features": [entry], "edit": {}}
