"""Autoencoders of single steps, the same at every step."""

from __future__ import annotations

import torch

from diffusers_rtsae import SparseAutoencoder
from diffusers_rtsae.models import LinearDynamics

from ..architectures.sparse import Gates, batch_topk
from ..common.processes import Processes
from ..recipe import Train
from .base import Objective, lowest_kept


class Steps(Objective):
    """The activations of all anchors, each a row of its own, standardised by one mean and one scale."""

    model = SparseAutoencoder

    def __init__(self, sae: SparseAutoencoder, dynamics: LinearDynamics, settings: Train, processes: Processes):
        super().__init__(sae, dynamics, settings, processes)
        mean, device = dynamics.mean.mean(0), sae.encoder.device
        apart = (dynamics.mean - mean).square().mean(1)
        self.mean, self.scale = mean.to(device), (dynamics.scale.square() + apart).mean().sqrt().to(device)
        self.anchors = torch.tensor(sae.config.anchors, device=device)

    @classmethod
    def untrained(cls, site, anchors, recipe, dynamics):
        settings = recipe.train
        shape = site, dynamics.mean.shape[1], anchors, settings.num_latents, settings.k, recipe.activation
        sae = cls.model(*shape, **cls.options(settings))
        sae.scale.copy_(dynamics.scale)
        return sae

    @classmethod
    def options(cls, settings: Train) -> dict:
        """The arguments of `model` that not all kinds have."""
        return {"sparsity": "topk" if settings.architecture == "topk" else "threshold"}

    def inputs(self, trajectories):
        return (trajectories - self.mean) / self.scale

    def rows(self, inputs):
        return inputs.flatten(0, 1), None

    @torch.no_grad()
    def finish(self):
        # latents are measured in units of the activation, so rows of encoder and decoder stay as they are
        self.sae.encoder_bias.mul_(self.scale)
        self.sae.decoder_bias.mul_(self.scale).add_(self.mean)

    def gates_of(self, trajectories: torch.Tensor) -> Gates | None:
        """The gates of the finished dictionary for all steps of `trajectories`, one anchor after the other."""
        return None

    @torch.no_grad()
    def calibrate(self, trajectories):
        sae, k = self.sae, self.settings.k
        steps = zip(trajectories.unbind(1), sae.config.anchors, strict=True)
        centred = torch.cat([sae.normalize(h, timestep) for h, timestep in steps]) - sae.decoder_bias
        code = batch_topk(centred, sae.encoder.float(), sae.encoder_bias, k, gates=self.gates_of(trajectories))
        sae.threshold.fill_(lowest_kept(code, k * len(centred)))
