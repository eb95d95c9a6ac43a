"""A sparse autoencoder whose latents take values near a few levels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config

from .base import Reader, SparseDictionary
from .sae import SparseAutoencoder, StepReader


class QuantizedSAE(SparseAutoencoder):
    r"""
    The quantised autoencoder of overcomplete (Q-SAE): each pre-activation p becomes one of a few learned levels q, the
    nearest, or their mean under softmax(−(p − q)²), as far as that is positive.

    Args:
        site, in_channels, anchors, num_latents, k, activation, centred: as of [`SparseAutoencoder`].
        num_levels (`int`): how many levels.
        hard (`bool`): whether the nearest is taken.

    Example:
        ```py
        >>> sae = QuantizedSAE("mid_block", 1280, anchors=[961, 481, 1], num_latents=20480, k=32, num_levels=4)
        ```
    """

    summary = (
        "A sparse autoencoder of single steps whose latents take values near a few levels; its features have one "
        "direction each."
    )

    @register_to_config
    def __init__(
        self, site: str, in_channels: int, anchors: list[int], num_latents: int, k: int, activation: str = "output",
        centred: bool = True, num_levels: int = 4, hard: bool = True,
    ):  # fmt: skip
        SparseDictionary.__init__(self, anchors, num_latents, activation)  # its configuration has no `sparsity`
        flags = type(hard) is type(centred) is bool
        if type(num_levels) is not int or not 2 <= num_levels <= 1024 or not flags:
            raise ValueError(
                f"Expected `num_levels` from 2 to 1024, and bools `hard` and `centred`, got {num_levels!r}, {hard!r} "
                f"and {centred!r}."
            )
        self._allocate(in_channels, anchors, num_latents)
        self.register_buffer("levels", torch.linspace(0, 1, num_levels))

    def reader(self, latents: list[int], device: torch.device) -> Reader:
        return QuantizedReader(self, latents, device)

    def encode_step(self, tokens: torch.Tensor, timestep: float) -> torch.Tensor:
        pre_activations = F.linear(tokens.float() - self.centre, self.encoder.float(), self.encoder_bias)
        return quantize(pre_activations, self.levels, self.config.hard)


def quantize(pre_activations: torch.Tensor, levels: torch.Tensor, hard: bool) -> torch.Tensor:
    """Each value as its nearest level, or as the levels' mean by distance, zero where that is negative."""
    distances = (pre_activations[..., None] - levels).square()
    values = levels[distances.argmin(-1)] if hard else (-distances).softmax(-1) @ levels
    return values.relu()


class QuantizedReader(StepReader):
    """Reads latents of levels, each decidable alone."""

    def __init__(self, sae: QuantizedSAE, rows: list[int], device: torch.device):
        super().__init__(sae, rows, device)
        self.levels, self.hard = sae.levels.to(device), sae.config.hard

    def activate(self, pre_activations: torch.Tensor) -> torch.Tensor:
        return quantize(pre_activations, self.levels, self.hard)
