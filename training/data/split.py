"""Trajectories split into those to train on, to set thresholds on, and to measure on."""

from __future__ import annotations

from pathlib import Path

import torch

from ..common.processes import ALONE, Processes
from ..recipe import Recipe
from .store import Rows, TrajectoryStore, metadata_name

MEASURED_TOKENS = 16_384  # trajectories that set thresholds, and as many that figures are measured on


class Data:
    """
    Trajectories of each site: to train on (`train`, with their metadata), and from other pictures to set thresholds on
    (`calibration`) and to measure on (`validation`).
    """

    def __init__(
        self,
        train: dict[str, Rows | torch.Tensor],
        calibration: dict[str, torch.Tensor],
        validation: dict[str, torch.Tensor],
    ):
        self.train, self.calibration, self.validation = train, calibration, validation

    def sample(
        self, site: str, count: int, generator: torch.Generator, processes: Processes = ALONE
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A process' share of `count` random trajectories, with row, column and guidance `(rows, 3)` of each."""
        chosen = processes.share(torch.randint(len(self.train[site]), (count,), generator=generator))
        return self.train[site][chosen], self.train[metadata_name(site)][chosen]


def stored_data(recipe: Recipe, store: TrajectoryStore) -> tuple[Data, list[Path], list[Path]]:
    """The data of a filled store, and its shards: those to train on, and those held out."""
    shards = store.shards()
    held = max(1, round(recipe.train.validation * len(shards)))
    if held >= len(shards):
        raise ValueError(
            f"{store.folder} holds {len(shards)} shards: two are needed, one to train on and one held out."
        )
    train = {name: store.rows(shards[:-held], name) for site in recipe.sites for name in (site, metadata_name(site))}
    generator, halves = torch.Generator().manual_seed(recipe.seed), ({}, {})
    for site in recipe.sites:
        rows = store.rows(shards[-held:], site)
        picture = torch.cat([store.load_origin(shard, site)[0] for shard in shards[-held:]])
        for side, half in enumerate(halves):
            mine = (picture % 2 == side).nonzero()[:, 0]
            half[site] = rows[mine[torch.randperm(len(mine), generator=generator)[:MEASURED_TOKENS]]]
    if not all(len(half[site]) for half in halves for site in recipe.sites):
        raise ValueError(
            f"{store.folder} holds out one picture only, two are needed: collect more, or raise `validation`."
        )
    return Data(train, *halves), shards[:-held], shards[-held:]
