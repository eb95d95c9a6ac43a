"""Linear probes: how well can factors be read from frozen codes, with few labelled pictures?"""

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
DRAWS = 5  # random choices of the labelled pictures
_PENALTIES = torch.logspace(-4, 2, 13, dtype=torch.float64)


class Seen(NamedTuple):
    """
    Pictures in which the scorer reads everything that their prompts name.

    trajectories (`torch.Tensor`): activations of the site at each step, `(pictures, tokens, steps, d)` float16.
    timesteps (`list[float]`): of the steps.
    grid (`TimeGrid`): places timesteps among the anchors.
    size (`tuple[int, int]`): of the token grid.
    guidance (`float`): guidance scale.
    scenes (`list[Scene]`): what the pictures show.
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
    """`count` pictures that show what their prompts name, with activations at the dictionary's anchors, or at all
    steps; `a` are the arguments of the experiment."""
    site, timesteps = sae.config.site, list(sae.config.anchors) if anchors else None
    rows, right, start = [], [], 70_000_000 + 1_000_000 * held_out
    while len(right) < count:
        scenes = world.sample(a.batch_size, seed=start, held_out=held_out)
        with Recorder(pipe, [site], timesteps, sae.config.activation, torch.float16) as recorder:
            seeds = range(start, start + len(scenes))
            images = generate(pipe, world.describe(scenes, start), seeds, steps, a.guidance)
        read = [world.seen(reading) for reading in scorer.read(images)]
        matches = [i for i, s in enumerate(read) if s["valid"] and all(s[f] == v for f, v in scenes[i].items())]
        rows.append(recorder.trajectories(site)[matches])
        right += [scenes[i] for i in matches]
        start += len(scenes)
    grid = TimeGrid(sae.config.anchors, noise_schedule(pipe.scheduler))
    return Seen(
        torch.cat(rows)[:count], recorder.timesteps, grid, recorder.size(site), a.guidance, right[:count]
    )  # fmt: skip


Read = Callable[[torch.Tensor, Seen], Iterator[torch.Tensor]]


def codes(sae: SparseDictionary, told: bool = True) -> Read:
    """A function that reads all latents step by step, as steering does; if `told`, with place and guidance known."""
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
    """The raw activation, step by step."""
    return (tokens.float() for tokens in trajectories.unbind(2))


@torch.no_grad()
def pooled(seen: Seen, read: Read, width: int) -> torch.Tensor:
    """The mean over tokens and steps of what `read` gives for each picture, `(pictures, width)`."""
    means, tokens = [], seen.trajectories.shape[1]
    for part in seen.trajectories.split(max(1, 2**25 // (tokens * width))):
        sums = sum(step.mean(1) for step in read(part, seen))
        means.append(sums / len(seen.timesteps))
    return torch.cat(means)


class LinearProbe:
    """
    A linear probe on codes `(n, m)` of labelled pictures: ridge regression with one target column for each value. The
    penalty is the best of a grid by leave-one-out accuracy.
    """

    def __init__(self, codes: torch.Tensor):
        codes = codes.double()
        self.centre = codes.mean(0)
        self.centred = codes - self.centre
        sizes, self.basis = torch.linalg.eigh(self.centred @ self.centred.T)
        self.sizes = sizes.clamp(min=0)

    def ridge(self, targets: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight of each picture in the regression on columns `targets (n, values)`, and the leave-one-out
        prediction for each picture. Both `(n, values)`."""
        shrunk = 1 / (self.sizes + penalty)
        weight = self.basis @ (shrunk[:, None] * (self.basis.T @ (targets - targets.mean(0))))
        leverage = self.basis.square() @ shrunk - 1 / (len(targets) * penalty)
        return weight, targets - weight / leverage[:, None]

    def fit(self, labels: torch.Tensor, values: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Fit to `labels (n,)`; returns a function that predicts the labels of other codes `(pictures, m)`."""
        targets = torch.nn.functional.one_hot(labels, values).double()
        mean = targets.mean(0)
        best = -1.0, targets
        for penalty in _PENALTIES * self.sizes.mean():
            weight, left_out = self.ridge(targets, penalty)
            right = (left_out.argmax(1) == labels).double().mean().item()
            if right >= best[0]:
                best = right, weight
        directions = self.centred.T @ best[1]
        return lambda others: ((others.double() - self.centre) @ directions + mean).argmax(1)


def accuracies(
    codes: torch.Tensor, scenes: list[Scene], tests: dict[str, tuple[torch.Tensor, list[Scene]]], factors: dict
) -> dict[str, dict[int, float]]:
    """
    The accuracy of probes for each number of labelled pictures, averaged over factors and choices of these pictures.

    Args:
        codes, scenes: of the pictures that labelled ones are drawn from.
        tests: codes and scenes to measure accuracy on, by name.
        factors (`dict`): the values of each factor.

    Returns:
        for each test, the accuracy by number of labelled pictures.
    """
    scale = codes.std(0).clamp(min=1e-6 * codes.std(0).max())  # of latents, from pictures without labels

    def labels(of: list[Scene], factor: str) -> torch.Tensor:
        return torch.tensor([factors[factor].index(scene[factor]) for scene in of])

    known = {factor: labels(scenes, factor) for factor in factors}
    tested = {name: (given / scale, truth) for name, (given, truth) in tests.items()}
    found = {name: {n: [] for n in LABELLED if n <= len(scenes)} for name in tests}
    for n in [n for n in LABELLED if n <= len(scenes)]:
        for draw in range(DRAWS):
            chosen = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(draw))[:n]
            probe = LinearProbe(codes[chosen] / scale)
            for factor, values in factors.items():
                predict = probe.fit(known[factor][chosen], len(values))
                for name, (others, truth) in tested.items():
                    found[name][n].append((predict(others) == labels(truth, factor)).double().mean().item())
    return {name: {n: round(sum(of) / len(of), 4) for n, of in by.items()} for name, by in found.items()}
