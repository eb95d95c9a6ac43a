"""The residualized temporal sparse autoencoder (rtSAE, 2605.27813)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .dynamics import LinearDynamics
from .sparsity import batch_topk, jump_relu


class RTSAEOutput(NamedTuple):
    """
    latents (`torch.Tensor`): `(batch, num_latents)`.
    residuals (`torch.Tensor`): normalised residuals the input had, `(batch, G, d)`.
    reconstruction (`torch.Tensor`): their reconstruction, `(batch, G, d)`.
    """

    latents: torch.Tensor
    residuals: torch.Tensor
    reconstruction: torch.Tensor


class FeatureTimes(NamedTuple):
    """
    length (`torch.Tensor`): of each feature at each anchor, relative to the activation's scale, `(features, G)`.
    peak (`torch.Tensor`): the anchor at which it is longest, `(features,)`, counted from 0.
    onset (`torch.Tensor`): the first anchor at which it has half of that length.
    lifetime (`torch.Tensor`): at how many anchors it has half of it or more.
    """

    length: torch.Tensor
    peak: torch.Tensor
    onset: torch.Tensor
    lifetime: torch.Tensor

    @classmethod
    def of(cls, length: torch.Tensor) -> FeatureTimes:
        """The times of trajectories of these lengths, `(features, G)`."""
        strong = length >= length.amax(1, keepdim=True) / 2
        return cls(length, length.argmax(1), strong.int().argmax(1), strong.sum(1))


class RTSAE(ModelMixin, ConfigMixin):
    r"""
    A sparse dictionary of denoising trajectories at one site of a denoiser.

    The input is a token's activation at G anchor timesteps. A linear predictor explains each anchor from the one
    before;
    the autoencoder explains the G residuals with one sparse code per trajectory. While denoising only the residuals up
    to now are known, so codes are also defined for prefixes.

    Args:
        site (`str`): path of the module in the denoiser whose activation this is, e.g. `"up_blocks.1.attentions.1"`.
        in_channels (`int`): d, the width of the site.
        anchors (`list[int]`): G training timesteps, descending.
        num_latents (`int`): m, the size of the dictionary.
        k (`int`): latents active per trajectory while training, on average.
        activation (`str`, defaults to `"output"`): what is read at the site, its `"output"` or its `"update"`
            (output − input).

    Example:
        ```py
        >>> rtsae = RTSAE.from_pretrained("examples/shapes-rtsae", subfolder="up_blocks.1.attentions.1")
        >>> latents = rtsae.encode(trajectories)  # (tokens, G, d) -> (tokens, m)
        >>> directions = rtsae.feature_trajectories([3, 14])  # (2, G, d), activation space
        ```
    """

    @register_to_config
    def __init__(
        self, site: str, in_channels: int, anchors: list[int], num_latents: int, k: int, activation: str = "output"
    ):
        super().__init__()
        if not anchors or list(anchors) != sorted(set(anchors), reverse=True):
            raise ValueError(f"`anchors` must be strictly descending timesteps, got {anchors}.")
        if activation not in ("output", "update"):
            raise ValueError(f"`activation` must be 'output' or 'update', got {activation!r}.")
        shape = (num_latents, len(anchors), in_channels)
        self.dynamics = LinearDynamics(len(anchors), in_channels)
        decoder = F.normalize(torch.randn(num_latents, len(anchors) * in_channels), dim=1).view(shape)
        self.encoder = nn.Parameter(decoder.clone())
        self.encoder_bias = nn.Parameter(torch.zeros(num_latents))
        self.decoder = nn.Parameter(decoder)
        self.decoder_bias = nn.Parameter(torch.zeros(len(anchors), in_channels))
        # threshold of a prefix that ends at each anchor; activation statistics of each latent over the training data:
        # 99th percentile and maximum where active, mean and share of active over everything
        self.register_buffer("threshold", torch.zeros(len(anchors)))
        self.register_buffer("typical_activation", torch.ones(num_latents))
        self.register_buffer("max_activation", torch.ones(num_latents))
        self.register_buffer("mean_activation", torch.zeros(num_latents))
        self.register_buffer("density", torch.zeros(num_latents))

    def pre_activations(self, residuals: torch.Tensor) -> torch.Tensor:
        """Pre-activations `(batch, m)` of normalised residuals `(batch, g, d)`, where g ≤ G anchors are known so
        far."""
        g = residuals.shape[-2]
        centred = (residuals - self.decoder_bias[:g]).flatten(-2)
        return F.linear(centred, self.encoder[:, :g].flatten(1).float(), self.encoder_bias)

    def encode(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Sparse code of (the beginning of) trajectories.

        Args:
            hidden_states (`torch.Tensor`): activations `(batch, g, d)` at the first g ≤ G anchors.

        Returns:
            `torch.Tensor`: latents `(batch, m)`, non-negative.
        """
        channels, anchors, shape = self.config.in_channels, len(self.config.anchors), tuple(hidden_states.shape)
        if len(shape) < 2 or shape[-1] != channels or not 1 <= shape[-2] <= anchors:
            raise ValueError(
                f"Expected trajectories (batch, 1 to {anchors} anchors, {channels} channels), got shape {shape}."
            )
        pre_activations = self.pre_activations(self.dynamics.residuals(hidden_states.float()))
        return jump_relu(pre_activations, self.threshold[shape[-2] - 1])

    def decode_residuals(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised residuals `(batch, G, d)` of latents `(batch, m)`."""
        return (latents @ self.decoder.flatten(1).float()).unflatten(-1, self.decoder_bias.shape) + self.decoder_bias

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Activations `(batch, G, d)` that latents `(batch, m)` stand for, rolled out over the anchors."""
        return self.dynamics.rollout(self.decode_residuals(latents))

    def forward(
        self, hidden_states: torch.Tensor, train_k: int | None = None, prefix: int | None = None
    ) -> RTSAEOutput:
        """
        Args:
            hidden_states (`torch.Tensor`): whole trajectories `(batch, G, d)`.
            train_k (`int`, *optional*): use BatchTopK with this k instead of the learned threshold.
            prefix (`int`, *optional*): show the encoder only the first `prefix` anchors.
        """
        residuals = self.dynamics.residuals(hidden_states)
        shown = residuals[..., :prefix, :]
        pre_activations = self.pre_activations(shown)
        if train_k is not None:
            latents = batch_topk(pre_activations, train_k)
        else:
            latents = jump_relu(pre_activations, self.threshold[shown.shape[-2] - 1])
        return RTSAEOutput(latents, residuals, self.decode_residuals(latents))

    def feature_trajectories(self, latents: list[int] | torch.Tensor | None = None) -> torch.Tensor:
        """
        The path of each feature through activation space, per unit of its activation (2605.27813, section 3.3).

        Args:
            latents (`list[int]`, *optional*): which features; all by default.

        Returns:
            `torch.Tensor`: `(features, G, d)`. Means and biases are no part of a direction.
        """
        decoder = self.decoder if latents is None else self.decoder[latents]
        return self.dynamics.rollout(decoder.float(), bias=False)

    def residual_directions(self, latents: list[int] | torch.Tensor | None = None) -> torch.Tensor:
        """Each anchor's own innovation of a feature in activation space, `(features, G, d)`, not propagated."""
        decoder = self.decoder if latents is None else self.decoder[latents]
        return decoder.float() * (self.dynamics.residual_scale * self.dynamics.scale)[:, None]

    def feature_times(self, latents: list[int] | torch.Tensor | None = None) -> FeatureTimes:
        """
        When features act, from the length of their trajectories (2605.27813, section 4).

        Args:
            latents (`list[int]`, *optional*): which features; all by default.
        """
        return FeatureTimes.of(
            (self.feature_trajectories(latents) / self.dynamics.scale[:, None]).norm(dim=2).detach()
        )
