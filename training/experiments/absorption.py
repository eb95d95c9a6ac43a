"""Feature absorption: does a special latent speak for a general one, which should be active as well and is not?

    python -m training.train training/recipes/kinds.yaml --out runs/kinds
    python -m training.experiments.absorption --dictionaries runs/kinds --out training/results/absorption.json

Pictures in which the scorer reads all that their prompts name; the tokens of the object, at every anchor. Each value
of a world is measured with every dictionary; those of even pictures fit its probe and choose its latents, those of odd
ones are counted. Rows are added to the JSON as they are measured; the same command continues where it was stopped.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from diffusers_rtsae import load_dictionary
from diffusers_rtsae.analysis.record import Recorder

from ..worlds import World
from ..worlds.pictures import add_models, generate, load_models, new_parser, parse
from .results import Results, spread, table
from .steering import tokens_on

FIGURES = {"absorption": "absorption", "f1": "F1 of the value's latents", "fvu_online": "FVU", "l0_threshold": "L0"}
FIGURES |= {"dead": "dead"}
_GAIN = 0.03  # of F1, for which a latent more stands for a value
_MOST = 4  # latents that stand for a value
_SHARE, _COSINE = 0.4, 0.1  # of the value's direction, that an absorbing latent carries, and its own with it
_PRECISION, _RECALL = 0.9, 0.5  # a special latent is nearly always of the value, and of few of its tokens


class Absorption(NamedTuple):
    """
    rate (`float`): the share of a value's tokens on which it is absorbed.
    main (`list[int]`): the latents that stand for the value.
    f1 (`float`): how well these tell it.
    absorbing (`list[int]`): the latents that spoke for them.
    """

    rate: float
    main: list[int]
    f1: float
    absorbing: list[int]


def _f1(said: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """F1 of what each of some latents says, `(tokens, latents)`, of what is true, `(tokens,)`."""
    right = (said & true[:, None]).sum(0)
    return 2 * right / (said.sum(0) + true.sum()).clamp(min=1)


def probe(tokens: torch.Tensor, shows: torch.Tensor, ridge: float = 1e-3) -> torch.Tensor:
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
    direction = probe(tokens[chosen], shows[chosen])
    main: list[int] = []
    said, f1 = torch.zeros(int(chosen.sum()), 1, dtype=torch.bool), 0.0
    while len(main) < _MOST:
        scores = _f1(said | active[chosen], shows[chosen])
        best = int(scores.argmax())
        if float(scores[best]) < f1 + (_GAIN if main else 0.0) or best in main:
            break
        main, f1 = [*main, best], float(scores[best])
        said |= active[chosen][:, best : best + 1]
    right, fired = (active & shows[:, None])[chosen].sum(0), active[chosen].sum(0)
    special = (right >= _PRECISION * fired) & (right < _RECALL * shows[chosen].sum()) & (fired > 0)
    along = directions @ direction
    special &= along >= _COSINE * directions.norm(dim=1)
    silent = shows & ~chosen & ~active[:, main].any(1)
    has = (tokens - tokens[chosen & ~shows].mean(0)) @ direction
    carried, latent = (codes[silent] * along).max(1)
    absorbed = special[latent] & (carried >= _SHARE * has[silent]) & (has[silent] > 0)
    count = int((shows & ~chosen).sum())
    return Absorption(int(absorbed.sum()) / count, main, f1, sorted(set(latent[absorbed].tolist())))


class Seen(NamedTuple):
    """
    Tokens of the objects in pictures that show what their prompts name.

    trajectories (`torch.Tensor`): `(tokens, G, d)`.
    picture (`torch.Tensor`): which one each is of, `(tokens,)`.
    scenes (`list[dict]`): of all pictures.
    """

    trajectories: torch.Tensor
    picture: torch.Tensor
    scenes: list[dict]


def look(world: World, pipe, scorer, site: str, anchors: list[int], activation: str, a) -> Seen:
    """The tokens that everything is measured on."""
    scenes, found, of = world.sample(a.pictures, seed=80_000_000, held_out=False), [], []
    for start in range(0, len(scenes), a.batch_size):
        part = scenes[start : start + a.batch_size]
        with Recorder(pipe, [site], anchors, activation) as recorder:
            seeds = range(80_000_000 + start, 80_000_000 + start + len(part))
            images = generate(pipe, world.describe(part, start), seeds, a.steps, a.guidance)
        seen = [world.seen(reading) for reading in scorer.read(images)]
        right = [
            s["valid"] and all(s[name] == scene[name] for name in scene) for s, scene in zip(seen, part, strict=True)
        ]
        whole = recorder.trajectories(site)
        where = tokens_on(world.masks(part, world.image_size), int(whole.shape[1] ** 0.5))
        where &= torch.tensor(right)[:, None]
        found.append(whole[where])
        of.append(where.nonzero()[:, 0] + start)
    return Seen(torch.cat(found), torch.cat(of), scenes)


def markdown(rows: list[dict]) -> str:
    """Mean ± standard deviation over the seeds of each kind."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        lines.append([kind, str(len(own)), *(spread([row[key] for row in own]) for key in FIGURES)])
    return table(["dictionary", "seeds", *FIGURES.values()], lines)


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "scorer")
    parser.add_argument("--dictionaries", type=Path, default=Path("runs/kinds"), help="folder of `<kind>-<seed>` ones")
    parser.add_argument("--out", type=Path, default=Path("runs/absorption.json"))
    parser.add_argument("--pictures", type=int, default=512)
    a, world = parse(parser)
    pipe, scorer = load_models(a)
    folders = sorted(path for path in a.dictionaries.iterdir() if path.is_dir())
    results, seen = Results(a, [a.pipeline, a.dictionaries]), {}
    for folder in tqdm(folders, unit="dictionary"):
        if results.has(dictionary=folder.name):
            continue
        dictionary = load_dictionary(folder, dtype=torch.float32)
        ((site, sae),) = dictionary.sites.items()
        key = site, tuple(sae.config.anchors), sae.config.activation
        if key not in seen:
            seen[key] = look(world, pipe, scorer, site, list(sae.config.anchors), sae.config.activation, a)
        tokens, picture, scenes = seen[key]
        paths, found = sae.feature_trajectories().float(), []
        for g, codes in enumerate(sae.codes(tokens)):
            for factor, value in world.targets:
                shows = torch.tensor([scenes[i][factor] == value for i in picture.tolist()])
                found.append(absorption(tokens[:, g], codes, paths[:, g], shows, picture % 2 == 0))
        row = {"dictionary": folder.name, "kind": folder.name.rpartition("-")[0]}
        row |= {"absorption": round(statistics.mean(one.rate for one in found), 5)}
        row |= {"f1": round(statistics.mean(one.f1 for one in found), 4), "tokens": len(tokens)}
        metrics = dictionary.config["metrics"][site]
        results.add(row | {name: metrics[name] for name in FIGURES if name in metrics})
    results.tell(markdown(results.rows))


if __name__ == "__main__":
    main()
