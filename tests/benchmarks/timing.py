"""Taking turns: contenders run one after the other, round by round, and are told as ratios to the first."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes: processor time on a CPU, which other programs disturb least, else the clock's."""
    clock = time.perf_counter if CUDA else time.process_time
    if CUDA:
        torch.cuda.synchronize()
    started = clock()
    work()
    if CUDA:
        torch.cuda.synchronize()
    return clock() - started


def take_turns(
    contenders: dict[str, Callable[[], float]], budget: float, least: int = 2, warm_up: bool = True
) -> dict[str, list[float]]:
    """
    What each contender returned in each round, after one round that warms up.

    Args:
        contenders (`dict`): by name, each returns the seconds it took.
        budget (`float`): seconds to spend; at least `least` rounds are made.
        warm_up (`bool`): `False` where contenders warm up by themselves.
    """
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    started, rounds = time.perf_counter(), -1 if warm_up else 0
    while rounds < least or time.perf_counter() - started < budget:
        for name, contender in contenders.items():
            value = contender()
            if rounds >= 0:
                taken[name].append(value)
        rounds += 1
    return taken


def row(what: str, values: list[float], baseline: str, references: list[float]) -> dict:
    """One line of the results: the median of the rounds' ratios to the baseline's, and their quartiles."""
    ratios = [value / reference for value, reference in zip(values, references, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "what": what, "ratio": statistics.median(ratios), "quartiles": [low, high], "rounds": len(ratios),
        "seconds": statistics.median(values), "baseline": baseline, "baseline_seconds": statistics.median(references),
    }  # fmt: skip


def per_step(counts: list[Counter]) -> dict[str, float]:
    """Of what the simulated device counted in each step, how often the package made the host wait and copied between
    host and device: the mean of the steps after the first."""
    total, steps = sum(counts[1:], Counter()), len(counts) - 1
    return {"waits": total["wait"] / steps, "copies": (sum(total.values()) - total["wait"]) / steps}


def rows(taken: dict[str, list[float]], prefix: str = "") -> list[dict]:
    """All contenders but the first, as ratios to it."""
    (baseline, references), *others = taken.items()
    return [row(prefix + name, values, prefix + baseline, references) for name, values in others]
