"""Feature absorption: does a special latent speak for a general one, which should be active as well and is not?"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch

from diffusers_rtsae import SparseDictionary

from ..worlds import World
from .probes import Seen
from .steering import tokens_on

_GAIN = 0.03  # of F1, for which a latent more stands for a value
_MOST = 4  # latents that stand for a value
_SHARE, _COSINE = 0.4, 0.1  # of the value's direction, that an absorbing latent carries, and its own with it
_PRECISION, _RECALL = 0.9, 0.5  # a special latent is nearly always of the value, and of few of its tokens


class Absorption(NamedTuple):
    """
    rate (`float`): the share of a value's tokens on which it is absorbed.
    main (`list[int]`): the latents that stand for the value.
    f1 (`float`): how well these tell it, on the tokens that are counted.
    absorbing (`list[int]`): the latents that spoke for them.
    """

    rate: float
    main: list[int]
    f1: float
    absorbing: list[int]


def _counts(active: torch.Tensor, shows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """On how many tokens each latent is active, `active (tokens, m)` float, and on how many of these `shows` holds."""
    both = torch.stack([torch.ones(len(shows)), shows.float()]) @ active
    return both[0], both[1]


def value_direction(tokens: torch.Tensor, shows: torch.Tensor, ridge: float = 1e-3) -> torch.Tensor:
    """The direction `(d,)` of length 1 that tells tokens that show a value from others: ridge regression, both sides
    counting alike."""
    tokens, signs = tokens.double(), shows.double()
    weight = torch.where(shows, 0.5 / shows.sum(), 0.5 / (~shows).sum()).double()
    centred = tokens - weight @ tokens
    square = centred.T @ (weight[:, None] * centred)
    square.diagonal().add_(ridge * square.diagonal().mean())
    direction = torch.linalg.solve(square, centred.T @ (weight * (signs - weight @ signs)))
    return (direction / direction.norm()).float()


@torch.no_grad()
def absorption(
    tokens: torch.Tensor, codes: torch.Tensor, directions: torch.Tensor, shows: torch.Tensor, chosen: torch.Tensor
) -> Absorption:
    """
    Absorption of one value, after the measure of SAEBench (2503.09532) and Chanin et al. (2409.14507).

    A probe of the tokens is the value's direction. The latents that stand for it are those that tell it best by being
    active, one after the other while that raises F1. Of the tokens that show the value, those count as absorbed on
    which all of these are silent and one other latent carries the direction: it adds at least 0.4 of what the token
    has of it, more than any other; its cosine with it is at least 0.1; and it is special, of the value in 0.9 of the
    tokens it is active on, but active on less than half of the value's.

    Args:
        tokens (`torch.Tensor`): activations `(tokens, d)`.
        codes (`torch.Tensor`): of the latents, `(tokens, m)`.
        directions (`torch.Tensor`): of the latents, `(m, d)`, at the tokens' step.
        shows (`torch.Tensor`): which tokens show the value, `(tokens,)` bool.
        chosen (`torch.Tensor`): which tokens fit the probe and choose latents, `(tokens,)` bool; the others are
            counted.

    Raises:
        `ValueError`: a side has no token that shows the value, or none that does not.
    """
    for side in (chosen, ~chosen):
        if not 0 < int((side & shows).sum()) < int(side.sum()):
            raise ValueError("Expected tokens that show the value and others that do not, to choose and to count.")
    active = codes > 0
    here, true = active[chosen].float(), shows[chosen]
    direction = value_direction(tokens[chosen], true)
    main: list[int] = []
    said, f1 = torch.zeros(len(true), dtype=torch.bool), 0.0
    while len(main) < _MOST:
        fired, right = _counts(here[~said], true[~said])  # besides those that were chosen before
        scores = 2 * (right + (said & true).sum()) / (fired + said.sum() + true.sum())
        best = int(scores.argmax())
        if float(scores[best]) < f1 + (_GAIN if main else 0.0) or best in main:
            break
        main, f1 = [*main, best], float(scores[best])
        said |= here[:, best] > 0
    fired, right = _counts(here, true)
    special = (right >= _PRECISION * fired) & (right < _RECALL * true.sum()) & (fired > 0)
    along = directions @ direction
    special &= along >= _COSINE * directions.norm(dim=1)
    silent = shows & ~chosen & ~active[:, main].any(1)
    has = (tokens - tokens[chosen & ~shows].mean(0)) @ direction
    carried, latent = (codes[silent] * along).max(1)
    absorbed = special[latent] & (carried >= _SHARE * has[silent]) & (has[silent] > 0)
    told, true = active[~chosen][:, main].any(1), shows[~chosen]
    f1 = 2 * int((told & true).sum()) / int(told.sum() + true.sum())
    return Absorption(int(absorbed.sum()) / int(true.sum()), main, f1, sorted(set(latent[absorbed].tolist())))


@torch.no_grad()
def mean_absorption(sae: SparseDictionary, seen: Seen, world: World) -> dict[str, float]:
    """Over all values and anchors, on the tokens of the objects: the rate of absorption, and the F1 of the latents
    that stand for a value. Even pictures fit and choose, odd ones are counted; of values that both have. The code of
    a whole trajectory, where a kind has one, counts at every anchor."""
    where = tokens_on(world.masks(seen.scenes, world.image_size), seen.size[0])
    tokens, picture, found = seen.trajectories[where].float(), where.nonzero()[:, 0], []
    paths, codes = sae.feature_trajectories().float(), None
    reading = sae.codes(tokens)
    for g in range(tokens.shape[1]):
        codes = next(reading, codes)
        for factor, value in world.targets:
            shows, chosen = torch.tensor([scene[factor] == value for scene in seen.scenes])[picture], picture % 2 == 0
            if shows[chosen].any() and shows[~chosen].any():
                found.append(absorption(tokens[:, g], codes, paths[:, g], shows, chosen))
    rates, f1 = [one.rate for one in found], [one.f1 for one in found]
    return {"absorption": round(statistics.mean(rates), 5), "f1": round(statistics.mean(f1), 4)}
