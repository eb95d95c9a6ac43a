"""Autoencoders of single steps whose input is modulated by the timestep (TIDE, 2503.07050)."""

from __future__ import annotations

import torch

from diffusers_rtsae import TIDE

from .static import Steps


class ModulatedSteps(Steps):
    """Standardised activations, modulated by the timestep; the modulation is learned with the dictionary."""

    model = TIDE

    def rows(self, inputs):
        factor, shift = self.sae.modulate(self.anchors)
        return (inputs * factor + shift).flatten(0, 1), factor.expand_as(inputs).flatten(0, 1)

    @torch.no_grad()
    def finish(self):
        sae, mean, scale = self.sae, self.mean, self.scale
        sae.encoder_bias.mul_(scale)
        sae.decoder_bias.mul_(scale)
        for tensor, one in ((sae.modulation.weight, 0), (sae.modulation.bias, 1)):
            factor, shift = tensor.chunk(2)
            shift.mul_(scale).sub_(mean.view(-1, *[1] * (tensor.ndim - 1)) * (one + factor))
