"""Nested prefixes of the latents, each of which must reconstruct alone."""

from __future__ import annotations

import torch

from ..common.processes import Processes
from ..recipe import Train
from .batch_topk import BatchTopK, mean_squared_error
from .sparse import decode


class Matryoshka(BatchTopK):
    """BatchTopK whose first latents must reconstruct alone, at each of the nested sizes (2503.17547)."""

    def __init__(self, settings: Train, device: torch.device | str, processes: Processes):
        super().__init__(settings, device, processes)
        self.sizes = sorted({max(1, round(share * settings.num_latents)) for share in [*settings.nested, 1]})

    def loss(self, target, code, decoder, centre, unit):
        reconstruction, losses, start, first = centre, [], 0, self.processes.start(self.sizes[-1])
        for size in self.sizes:
            part = code.where((code.latents >= start - first) & (code.latents < size - first))
            reconstruction = decode(part, decoder, len(target), self.processes) + reconstruction
            losses.append(mean_squared_error(reconstruction, target, unit))
            start = size
        return torch.stack(losses).mean(), losses[-1], reconstruction
