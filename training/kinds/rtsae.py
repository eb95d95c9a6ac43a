"""Residualized temporal autoencoders: one code for a whole trajectory."""

from __future__ import annotations

import torch

from diffusers_rtsae import RTSAE

from ..architectures.sparse import Code, batch_topk
from .base import Objective, lowest_kept


class Residuals(Objective):
    """The normalised residuals of a trajectory, concatenated."""

    prefixes = True

    @classmethod
    def untrained(cls, site, anchors, recipe, dynamics):
        settings = recipe.train
        sae = RTSAE(site, dynamics.mean.shape[1], anchors, settings.num_latents, settings.k, recipe.activation)
        sae.dynamics.load_state_dict(dynamics.state_dict())
        return sae

    def inputs(self, trajectories):
        return self.sae.dynamics.residuals(trajectories)

    def rows(self, inputs):
        return inputs.flatten(1), None

    @torch.no_grad()
    def calibrate(self, trajectories):
        """Each prefix has a threshold of its own."""
        sae, k = self.sae, self.settings.k
        residuals = sae.dynamics.residuals(trajectories)
        for g in range(residuals.shape[1]):
            sae.threshold[g] = lowest_kept(prefix_code(sae, residuals[:, : g + 1], k), k * len(residuals))
        if self.settings.layout == "per_step":  # only an anchor's own latents can be active there
            sae.threshold.fill_(sae.threshold[-1])


@torch.no_grad()
def prefix_code(sae: RTSAE, residuals: torch.Tensor, k: int) -> Code:
    """BatchTopK code of the normalised residuals of the first g anchors, `(rows, g, d)`."""
    centred = (residuals - sae.decoder_bias[: residuals.shape[1]]).flatten(1)
    return batch_topk(centred, sae.encoder.flatten(1)[:, : centred.shape[1]].float(), sae.encoder_bias.float(), k)
