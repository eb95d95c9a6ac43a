"""Training without a disk: pictures are generated while training and feed a buffer of trajectories in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_rtsae.files import whole

from ..recipe import Recipe
from .collect import batches, trajectories
from .prompts import Sample
from .store import check_finite, metadata_name


class Stream:
    """
    A ring buffer of trajectories for each site: newly generated ones replace the oldest.

    Pictures are generated in the order of the samples, and again from the first with other seeds, so the buffer's
    content depends only on how often it was renewed. A checkpoint holds the buffer.

    Args:
        held_out (`int`): number of batches at the beginning that are never trained on.
    """

    def __init__(
        self, pipe: DiffusionPipeline, samples: Sequence[Sample], recipe: Recipe, anchors: list[int], held_out: int
    ):
        self.pipe, self.recipe, self.anchors, self.held_out = pipe, recipe, anchors, held_out
        self.batches = list(batches(samples, recipe.collect.batch_size))
        if len(self.batches) <= held_out:
            raise ValueError(
                f"{len(samples)} prompts make {len(self.batches)} batches, expected more than {held_out}."
            )
        self.renewed = 0
        self.buffer: dict[str, torch.Tensor] = {}
        self.written: dict[str, int] = {}  # rows of each site so far

    def generate(self, index: int) -> dict[str, torch.Tensor]:
        """Trajectories of each site from batch `index`."""
        turn = 0
        if index >= self.held_out:  # held-out batches are never trained on
            turn, index = divmod(index - self.held_out, len(self.batches) - self.held_out)
            index += self.held_out
        start, part = self.batches[index]
        part = [sample._replace(seed=sample.seed + turn * 7_000_003) for sample in part]
        start += turn * len(self.batches) * self.recipe.collect.batch_size
        tensors, _ = trajectories(self.pipe, part, start, self.recipe, self.anchors)
        chosen = {name: tensors[name] for site in self.recipe.sites for name in (site, metadata_name(site))}
        check_finite(chosen)
        return chosen

    def renew(self) -> None:
        """Generate one more batch and put it into the buffer."""
        size = self.recipe.collect.buffer
        for site, rows in self.generate(self.held_out + self.renewed).items():
            if site not in self.buffer:
                self.buffer[site], self.written[site] = rows.new_empty(size, *rows.shape[1:]), 0
            places = torch.arange(len(rows))[:size] + self.written[site]
            self.buffer[site][places % size] = rows[:size]
            self.written[site] += len(rows)
        self.renewed += 1

    @property
    def is_full(self) -> bool:
        return self.renewed > 0 and min(self.written.values()) >= self.recipe.collect.buffer

    def held_out_halves(self, path: Path, made_with: str) -> list[dict[str, torch.Tensor]]:
        """Trajectories of the held-out batches, in two halves. They are stored in `path`, and generated again if the
        fingerprint there is not `made_with`."""
        if path.exists():
            with safe_open(path, "pt") as file:
                if file.metadata()["made_with"] == made_with:
                    return [{s: file.get_tensor(f"{side}/{s}") for s in self.recipe.sites} for side in range(2)]
        batches = [self.generate(i) for i in range(self.held_out)]
        halves = [
            {s: torch.cat([rows[s] for rows in batches[side::2]]) for s in self.recipe.sites} for side in range(2)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{side}/{site}": rows for side, half in enumerate(halves) for site, rows in half.items()}
        with whole(path) as partial:
            save_file(tensors, partial, metadata={"made_with": made_with})
        return halves

    def save(self, path: Path) -> None:
        metadata = {"renewed": str(self.renewed), "written": json.dumps(self.written)}
        with whole(path) as partial:
            save_file(self.buffer, partial, metadata=metadata)

    def load(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            for site in file.keys():
                rows = file.get_tensor(site)
                self.buffer.setdefault(site, torch.empty_like(rows)).copy_(rows)
            self.renewed, self.written = int(file.metadata()["renewed"]), json.loads(file.metadata()["written"])
