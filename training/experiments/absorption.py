"""Feature absorption: is a general latent silent because a more special one has taken over its part?"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch

from diffusers_rtsae import SparseDictionary

from ..worlds import World
from .probes import Seen
from .steering import tokens_on

_GAIN = 0.03  # of F1 that a further latent must bring
_MOST = 4  # main latents of a value
_SHARE, _COSINE = 0.4, 0.1  # of the value's direction: share that an absorbing latent adds, and its cosine with it
_PRECISION, _RECALL = 0.9, 0.5  # an absorbing latent has at least this precision for the value, and less recall


class Absorption(NamedTuple):
    """
    rate (`float`): the share of a value's tokens on which it is absorbed.
    main (`list[int]`): the main latents of the value, which should be active where it is shown.
    f1 (`float`): of the main latents, on the tokens that are counted.
    absorbing (`list[int]`): the latents that took over their part.
    """

    rate: float
    main: list[int]
    f1: float
    absorbing: list[int]


def _counts(active: torch.Tensor, shows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of tokens on which each latent of `active (tokens, m)` is active, and of those where `shows` is true."""
    both = torch.stack([torch.ones(len(shows)), shows.float()]) @ active
    return both[0], both[1]


def value_direction(tokens: torch.Tensor, shows: torch.Tensor, ridge: float = 1e-3) -> torch.Tensor:
    """The direction `(d,)` of length 1 that separates tokens that show a value from others: ridge regression, with
    both classes weighed equally."""
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

    A linear probe of the tokens gives the value's direction. The main latents are those whose activity predicts the
    value best; they are added one by one while that raises F1. A token that shows the value counts as absorbed if all
    main latents are silent and the one latent that adds most along the direction

    - adds at least 0.4 of the token's own component along it,
    - has a cosine of at least 0.1 with it, and
    - is special: 0.9 of the tokens on which it is active show the value, and it is active on less than half of those.

    Args:
        tokens (`torch.Tensor`): activations `(tokens, d)`.
        codes (`torch.Tensor`): strengths of the latents, `(tokens, m)`.
        directions (`torch.Tensor`): of the latents, `(m, d)`, at the tokens' step.
        shows (`torch.Tensor`): whether each token shows the value, `(tokens,)` bool.
        chosen (`torch.Tensor`): whether each token is used to fit the probe and to choose main latents, `(tokens,)`
            bool; the others are counted.

    Raises:
        `ValueError`: among either part of the tokens none shows the value, or all do.
    """
    for side in (chosen, ~chosen):
        if not 0 < int((side & shows).sum()) < int(side.sum()):
            raise ValueError("Expected tokens that show the value and others that do not, to choose and to count.")
    active = codes > 0
    fitting, true = active[chosen].float(), shows[chosen]
    direction = value_direction(tokens[chosen], true)
    main: list[int] = []
    covered, f1 = torch.zeros(len(true), dtype=torch.bool), 0.0
    while len(main) < _MOST:
        fired, right = _counts(fitting[~covered], true[~covered])  # tokens on which no main latent is active
        scores = 2 * (right + (covered & true).sum()) / (fired + covered.sum() + true.sum())
        best = int(scores.argmax())
        if float(scores[best]) < f1 + (_GAIN if main else 0.0) or best in main:
            break
        main, f1 = [*main, best], float(scores[best])
        covered |= fitting[:, best] > 0
    fired, right = _counts(fitting, true)
    special = (right >= _PRECISION * fired) & (right < _RECALL * true.sum()) & (fired > 0)
    along = directions @ direction
    special &= along >= _COSINE * directions.norm(dim=1)
    silent = shows & ~chosen & ~active[:, main].any(1)
    has = (tokens - tokens[chosen & ~shows].mean(0)) @ direction
    carried, latent = (codes[silent] * along).max(1)
    absorbed = special[latent] & (carried >= _SHARE * has[silent]) & (has[silent] > 0)
    predicted, true = active[~chosen][:, main].any(1), shows[~chosen]
    f1 = 2 * int((predicted & true).sum()) / int(predicted.sum() + true.sum())
    return Absorption(int(absorbed.sum()) / int(true.sum()), main, f1, sorted(set(latent[absorbed].tolist())))


@torch.no_grad()
def mean_absorption(sae: SparseDictionary, seen: Seen, world: World) -> dict[str, float]:
    """The rate of absorption and the F1 of main latents, averaged over values and anchors, on the tokens of the
    objects. Even pictures fit the probe and choose latents, odd ones are counted; values that either lacks are left
    out. For a kind with one code for a whole trajectory, that code is used at every anchor."""
    where = tokens_on(world.masks(seen.scenes, world.image_size), seen.size[0])
    tokens, picture, results = seen.trajectories[where].float(), where.nonzero()[:, 0], []
    paths, codes = sae.feature_trajectories().float(), None
    reading = sae.codes(tokens)
    for g in range(tokens.shape[1]):
        codes = next(reading, codes)
        for factor, value in world.targets:
            shows, chosen = torch.tensor([scene[factor] == value for scene in seen.scenes])[picture], picture % 2 == 0
            if shows[chosen].any() and shows[~chosen].any():
                results.append(absorption(tokens[:, g], codes, paths[:, g], shows, chosen))
    rates, f1 = [one.rate for one in results], [one.f1 for one in results]
    return {"absorption": round(statistics.mean(rates), 5), "f1": round(statistics.mean(f1), 4)}
