"""Adaptive temporal masking: latents that matter little are left out at random."""

from __future__ import annotations

import torch

from ..common.processes import Processes
from ..recipe import Train
from .batch_topk import BatchTopK
from .sparse import Code, batch_topk, encode

MEMORY = 100  # batches that running means go back; before that nothing is masked


class AdaptiveMasking(BatchTopK):
    """
    BatchTopK among latents that take part by how important they are (adaptive temporal masking, 2510.08855; the time
    is that of training). Running means of a latent's magnitude, frequency and contribution to the reconstruction make
    its importance; below θ = mean + `mask_above` · std of all it is left out of a step with the chance
    1 − exp(−`mask_rate` (θ − importance) / θ).

    How the three make the importance is ours: `importance: mean` of them, each in units of its mean over the latents,
    or their `product`, its cube root.
    """

    draws = True

    def __init__(self, settings: Train, device: torch.device | str, processes: Processes):
        super().__init__(settings, device, processes)
        self.settings, self.noting = settings, False
        # magnitude where active, frequency, and by how much it lessens the squared error
        self.running = processes.share(torch.zeros(settings.num_latents, 3, device=device)).clone()
        self.seen = torch.zeros(1)  # batches; on the host, which must know

    def state(self):
        return {"running": self.running, "seen": self.seen}

    def chance(self) -> torch.Tensor:
        """Of each of this process' latents, to be left out."""
        count, least = self.settings.num_latents, torch.finfo(torch.float32).tiny
        mean = self.processes.sum(self.running.sum(0)) / count
        parts = self.running / mean.clamp(min=least)
        importance = parts.mean(1) if self.settings.importance == "mean" else parts.prod(1).pow(1 / 3)
        moments = torch.stack([importance.sum(), importance.square().sum()])
        first, second = self.processes.sum(moments) / count
        threshold = first + self.settings.mask_above * (second - first.square()).clamp(min=0).sqrt()
        below = (threshold - importance).clamp(min=0) / threshold.clamp(min=least)
        return 1 - torch.exp(-self.settings.mask_rate * below)

    def encode(self, centred, centre, weight, bias, gates, training):
        self.noting, taking_part = training, bias
        if training and self.seen >= MEMORY:
            drawn = torch.rand(self.settings.num_latents, device=bias.device)
            masked = self.processes.share(drawn) < self.chance()
            taking_part = bias.detach().masked_fill(masked, torch.finfo(self.dtype).min / 2)
        code = batch_topk(centred, weight, taking_part, self.k, self.dtype, self.processes, gates)
        return encode(centred, centre, weight, bias, code, gates)

    def loss(self, target, code, weight, centre, unit):
        loss, error, reconstruction = super().loss(target, code, weight, centre, unit)
        if self.noting:
            self._note(code, weight, target - reconstruction)
        return loss, error, reconstruction

    @torch.no_grad()
    def _note(self, code: Code, weight: torch.Tensor, left: torch.Tensor) -> None:
        """Take note of a batch and of the error `(rows, d)` that is left."""
        active = code.where(code.values > 0)
        size = max(1, 2**24 // left.shape[1])
        pieces = zip(active.rows.split(size), active.latents.split(size), strict=True)
        along = torch.cat([(left[rows] * weight[latents]).sum(1) for rows, latents in pieces])
        lessened = active.values * (2 * along + active.values)  # decoder rows have length 1
        sums = torch.zeros_like(self.running)
        found = torch.stack([active.values, (active.values > 0).float(), lessened], 1)
        sums.index_add_(0, active.latents, found)
        fired, share = sums[:, 1:2], 1 / min(self.seen.item() + 1, MEMORY)
        there = torch.cat([sums[:, :1] / fired.clamp(min=1), sums[:, 1:] / len(left)], 1)
        there[:, :1] = torch.where(fired > 0, there[:, :1], self.running[:, :1])
        self.running.lerp_(there.clamp(min=0), share)
        self.seen += 1
