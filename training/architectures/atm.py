"""Adaptive temporal masking: latents that matter little are left out at random."""

from __future__ import annotations

import torch

from ..common.processes import Processes
from ..recipe import Train
from .batch_topk import BatchTopK
from .matrix import products_at
from .sparse import Code, batch_topk, encode

MEMORY = 100  # batches that the running means cover; nothing is masked before that many


class AdaptiveMasking(BatchTopK):
    """
    BatchTopK in which latents of little importance are masked at random (adaptive temporal masking, 2510.08855; the
    time is that of training). A latent's importance is made from running means of its magnitude, its frequency and its
    contribution to the reconstruction. Below θ = mean + `mask_above` · std over all latents, a latent is left out of a
    step with the chance 1 − exp(−`mask_rate` (θ − importance) / θ).

    The formula of the importance is ours: each of the three is divided by its mean over the latents; `importance` is
    their `mean`, or the cube root of their `product`.
    """

    draws = True

    def __init__(self, settings: Train, device: torch.device | str, processes: Processes):
        super().__init__(settings, device, processes)
        self.settings, self.recording = settings, False
        # magnitude where active, frequency, and how much the latent reduces the squared error
        self.running = processes.share(torch.zeros(settings.num_latents, 3, device=device)).clone()
        self.seen = torch.zeros(1)  # batches so far, on the host

    def state(self):
        return {"running": self.running, "seen": self.seen}

    def chance(self) -> torch.Tensor:
        """The chance of each of this process' latents to be masked."""
        count, least = self.settings.num_latents, torch.finfo(torch.float32).tiny
        mean = self.processes.sum(self.running.sum(0)) / count
        parts = self.running / mean.clamp(min=least)
        importance = parts.mean(1) if self.settings.importance == "mean" else parts.prod(1).pow(1 / 3)
        moments = torch.stack([importance.sum(), importance.square().sum()])
        first, second = self.processes.sum(moments) / count
        threshold = first + self.settings.mask_above * (second - first.square()).clamp(min=0).sqrt()
        below = (threshold - importance).clamp(min=0) / threshold.clamp(min=least)
        return 1 - torch.exp(-self.settings.mask_rate * below)

    def encode(self, centred, centre, encoder, bias, gates, training):
        self.recording, masked_bias = training, bias
        if training and self.seen >= MEMORY:
            drawn = torch.rand(self.settings.num_latents, device=bias.device)
            masked = self.processes.share(drawn) < self.chance()
            masked_bias = bias.detach().masked_fill(masked, torch.finfo(self.dtype).min / 2)
        code = batch_topk(centred, encoder.weight, masked_bias, self.k, self.dtype, self.processes, gates)
        return encode(centred, centre, encoder, bias, code, gates)

    def loss(self, target, code, decoder, centre, unit):
        loss, error, reconstruction = super().loss(target, code, decoder, centre, unit)
        if self.recording:
            self._record(code, decoder.weight, target - reconstruction)
        return loss, error, reconstruction

    @torch.no_grad()
    def _record(self, code: Code, weight: torch.Tensor, error: torch.Tensor) -> None:
        """Update the running means from a code and the error `(rows, d)` of its reconstruction."""
        active = code.where(code.values > 0)
        along = products_at(active.rows, active.latents, error, weight)
        reduced = active.values * (2 * along + active.values)  # decoder rows have length 1
        sums = torch.zeros_like(self.running)
        sums.index_add_(0, active.latents, torch.stack([active.values, (active.values > 0).float(), reduced], 1))
        fired, share = sums[:, 1:2], 1 / min(self.seen.item() + 1, MEMORY)
        means = torch.cat([sums[:, :1] / fired.clamp(min=1), sums[:, 1:] / len(error)], 1)
        means[:, :1] = torch.where(fired > 0, means[:, :1], self.running[:, :1])
        self.running.lerp_(means.clamp(min=0), share)
        self.seen += 1
