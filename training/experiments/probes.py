"""Linear probes: how well the factors of pictures are read from their frozen codes, with few labelled ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from diffusers_rtsae.analysis.record import Recorder
from diffusers_rtsae.denoiser import TimeGrid, noise_schedule
from diffusers_rtsae.models import SparseDictionary

from ..worlds import Scene, World
from ..worlds.pictures import generate

LABELLED = (10, 30, 100, 300, 1000)
DRAWS = 5  # of labelled pictures
_PENALTIES = torch.logspace(-4, 2, 13, dtype=torch.float64)


class Seen(NamedTuple):
    """
    Pictures in which the scorer reads all that their prompts name.

    trajectories (`torch.Tensor`): activations of the site at each step, `(pictures, tokens, steps, d)` float16.
    timesteps (`list[float]`): of the steps.
    grid (`TimeGrid`): where these are among anchors.
    size (`tuple[int, int]`): of the token grid.
    guidance (`float`): scale of guidance.
    scenes (`list[Scene]`): what they show.
    """

    trajectories: torch.Tensor
    timesteps: list[float]
    grid: TimeGrid
    size: tuple[int, int]
    guidance: float
    scenes: list[Scene]


def look(
    world: World, pipe, scorer, sae: SparseDictionary, count: int, held_out: bool, steps: int, a, anchors: bool = True
) -> Seen:
    """`count` pictures with the pipeline's sampler, at the dictionary's anchors or at all steps; the other arguments
    are the experiment's."""
    site, wanted = sae.config.site, list(sae.config.anchors) if anchors else None
    rows, right, start = [], [], 70_000_000 + 1_000_000 * held_out
    while len(right) < count:
        scenes = world.sample(a.batch_size, seed=start, held_out=held_out)
        with Recorder(pipe, [site], wanted, sae.config.activation, torch.float16) as recorder:
            seeds = range(start, start + len(scenes))
            images = generate(pipe, world.describe(scenes, start), seeds, steps, a.guidance)
        read = [world.seen(reading) for reading in scorer.read(images)]
        kept = [i for i, s in enumerate(read) if s["valid"] and all(s[f] == v for f, v in scenes[i].items())]
        rows.append(recorder.trajectories(site)[kept])
        right += [scenes[i] for i in kept]
        start += len(scenes)
    grid = TimeGrid(sae.config.anchors, noise_schedule(pipe.scheduler))
    return Seen(
        torch.cat(rows)[:count], recorder.timesteps, grid, recorder.size(site), a.guidance, right[:count]
    )  # fmt: skip


Read = Callable[[torch.Tensor, Seen], Iterator[torch.Tensor]]


def codes(sae: SparseDictionary, told: bool = True) -> Read:
    """What reads all latents of some pictures step by step, as steering does; `told` the place and the guidance."""
    rows = list(range(sae.config.num_latents))
    reader = sae.reader(rows, torch.device("cpu"))

    def read(trajectories: torch.Tensor, seen: Seen) -> Iterator[torch.Tensor]:
        memory = reader.begin()
        where = (seen.size, seen.guidance) if told else ()
        for i, timestep in enumerate(seen.timesteps):
            tokens = trajectories[:, :, i].float()
            yield reader.read(memory, tokens, seen.grid.step(timestep, *where))
            memory.continue_with(tokens)

    return read


def activations(trajectories: torch.Tensor, seen: Seen) -> Iterator[torch.Tensor]:
    """The raw activation step by step."""
    return (tokens.float() for tokens in trajectories.unbind(2))


@torch.no_grad()
def pooled(seen: Seen, read: Read, width: int) -> torch.Tensor:
    """Of each picture the mean over its tokens and steps of what `read` finds, `(pictures, width)`."""
    found, tokens = [], seen.trajectories.shape[1]
    for part in seen.trajectories.split(max(1, 2**25 // (tokens * width))):
        sums = sum(step.mean(1) for step in read(part, seen))
        found.append(sums / len(seen.timesteps))
    return torch.cat(found)


class LinearProbe:
    """
    Linear probes of codes `(n, m)` of labelled pictures: ridge regressions on one column a value, whose penalty is the
    best of a grid when each picture is left out in turn.
    """

    def __init__(self, codes: torch.Tensor):
        codes = codes.double()
        self.centre = codes.mean(0)
        self.centred = codes - self.centre
        sizes, self.basis = torch.linalg.eigh(self.centred @ self.centred.T)
        self.sizes = sizes.clamp(min=0)

    def ridge(self, wanted: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight of each picture in the regression on columns `wanted (n, values)`, and what a regression on the
        others says of it: its own part in the fit, and in the mean, is taken out. Both `(n, values)`."""
        shrunk = 1 / (self.sizes + penalty)
        weight = self.basis @ (shrunk[:, None] * (self.basis.T @ (wanted - wanted.mean(0))))
        own = self.basis.square() @ shrunk - 1 / (len(wanted) * penalty)
        return weight, wanted - weight / own[:, None]

    def fit(self, labels: torch.Tensor, values: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """What tells the labels of other codes, `(pictures, m)`, once it has seen `labels (n,)` of these."""
        wanted = torch.nn.functional.one_hot(labels, values).double()
        mean = wanted.mean(0)
        best = -1.0, wanted
        for penalty in _PENALTIES * self.sizes.mean():
            weight, left_out = self.ridge(wanted, penalty)
            right = (left_out.argmax(1) == labels).double().mean().item()
            if right >= best[0]:
                best = right, weight
        directions = self.centred.T @ best[1]
        return lambda others: ((others.double() - self.centre) @ directions + mean).argmax(1)


def accuracies(
    codes: torch.Tensor, scenes: list[Scene], tests: dict[str, tuple[torch.Tensor, list[Scene]]], factors: dict
) -> dict[str, dict[int, float]]:
    """
    The accuracy of probes with each number of labelled pictures, a mean over factors and draws of these pictures.

    Args:
        codes, scenes: to label.
        tests: codes and scenes to judge on, by name.
        factors (`dict`): the values of each factor.

    Returns:
        for each test, by number of labelled pictures.
    """
    scale = codes.std(0).clamp(min=1e-6 * codes.std(0).max())  # of latents, from pictures without labels

    def labels(of: list[Scene], factor: str) -> torch.Tensor:
        return torch.tensor([factors[factor].index(scene[factor]) for scene in of])

    known = {factor: labels(scenes, factor) for factor in factors}
    judged = {name: (given / scale, truth) for name, (given, truth) in tests.items()}
    found = {name: {n: [] for n in LABELLED if n <= len(scenes)} for name in tests}
    for n in [n for n in LABELLED if n <= len(scenes)]:
        for draw in range(DRAWS):
            chosen = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(draw))[:n]
            probe = LinearProbe(codes[chosen] / scale)
            for factor, values in factors.items():
                tell = probe.fit(known[factor][chosen], len(values))
                for name, (others, truth) in judged.items():
                    found[name][n].append((tell(others) == labels(truth, factor)).double().mean().item())
    return {name: {n: round(sum(of) / len(of), 4) for n, of in by.items()} for name, by in found.items()}
