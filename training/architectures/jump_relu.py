"""A learned threshold for each latent."""

from __future__ import annotations

import torch

from ..common.processes import Processes
from ..recipe import Train
from .batch_topk import BatchTopK
from .sparse import batch_topk, encode, most_above

CANDIDATES = 8  # times k: how many latents of a row are considered, on average


class _Step(torch.autograd.Function):
    """`value * (value > threshold)` and `value > threshold`, with the pseudo-derivatives of 2407.14435, section 3."""

    @staticmethod
    def forward(ctx, values, thresholds, bandwidth):
        active = (values > thresholds).float()
        ctx.save_for_backward(values, thresholds, active)
        ctx.bandwidth = bandwidth
        return values * active, active

    @staticmethod
    def backward(ctx, on_values, on_active):
        values, thresholds, active = ctx.saved_tensors
        near = ((values - thresholds).abs() < ctx.bandwidth / 2).float() / ctx.bandwidth
        return on_values * active, -near * (thresholds * on_values + on_active), None


class JumpReLU(BatchTopK):
    """
    A learned threshold for each latent; a penalty on L0 pulls the mean number of active latents to `k` (2407.14435).
    At most `8 k` latents a row, on average over a batch, are considered: those that exceed their threshold most.
    """

    shares_budget = False

    def __init__(self, settings: Train, device: torch.device | str, processes: Processes):
        super().__init__(settings, device, processes)
        self.bandwidth, self.penalty = torch.tensor(settings.bandwidth, device=device), settings.penalty
        self.log_threshold = torch.zeros(settings.num_latents, device=device).requires_grad_()

    @torch.no_grad()
    def start(self, centred, weight, bias):
        first = batch_topk(centred, weight, bias, self.k).values.min()
        self.log_threshold.fill_(first.log())
        self.bandwidth.mul_(first)

    def parameters(self):
        return {"log_threshold": self.log_threshold}

    def state(self):
        return {"bandwidth": self.bandwidth}

    def encode(self, centred, centre, encoder, bias, gates, training):
        threshold = self.log_threshold.exp()
        least, most = threshold.detach() - self.bandwidth / 2, CANDIDATES * self.k * len(centred)
        near = most_above(centred, encoder.weight, bias, least, most, self.dtype, gates)
        threshold = threshold[near.latents]
        if gates is not None:  # a latent behind a closed gate is never active
            is_open = gates.of(near) > 0
            near, threshold = near.where(is_open), threshold.masked_fill(~is_open, torch.inf)
        code = encode(centred, centre, encoder, bias, near, gates)
        values, active = _Step.apply(code.values, threshold, self.bandwidth)
        self.active = self.processes.sum(active.sum()) / len(centred)
        return code._replace(values=values)

    def loss(self, target, code, decoder, centre, unit):
        _, error, reconstruction = super().loss(target, code, decoder, centre, unit)
        return error + self.penalty * (self.active / self.k - 1).square(), error, reconstruction

    @torch.no_grad()
    def finish(self, sae):
        # measured in units of its own threshold, every latent has the threshold 1
        unit = self.log_threshold.exp().to(sae.encoder.device)
        sae.encoder.flatten(1).div_(unit[:, None])
        sae.encoder_bias.div_(unit)
        sae.decoder.flatten(1).mul_(unit[:, None])
