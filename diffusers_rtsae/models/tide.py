"""TIDE: a sparse autoencoder whose input is modulated by the timestep (2503.07050)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from .base import Directions, Step
from .sae import SparseAutoencoder


class TIDE(SparseAutoencoder):
    r"""
    A sparse autoencoder that is the same for all steps but for a modulation of its input by the timestep (2503.07050).
    It encodes x (1 + scale(t)) + shift(t), and inverts the modulation on what it decodes. Scale and shift come from a
    small MLP on the sinusoidal embedding of the timestep; its last layer starts at zero.

    Args:
        site, in_channels, anchors, num_latents, k, activation, sparsity, centred, input_norm, undone, skip: see
            [`SparseAutoencoder`]; `undone` holds for the modulation too.
        time_channels (`int`, defaults to 256): width of the embedding and of the MLP.
        time_scale (`float`, defaults to 1.0): factor of the timestep before it is embedded; at 1.0 the embedded
            timestep goes from 1000 at pure noise to 0 at the image.
        flip_sin_to_cos, downscale_freq_shift: arguments of diffusers' `get_timestep_embedding`.

    Example:
        ```py
        >>> tide = TIDE("transformer_blocks.14", 1152, anchors=[961, 481, 1], num_latents=18432, k=32, sparsity="topk")
        >>> latents = tide.encode_step(tokens, timestep=481)  # (tokens, d) -> (tokens, m)
        ```
    """

    knows_time = True
    summary = (
        "A sparse autoencoder modulated by the timestep (TIDE, [arXiv 2503.07050](https://arxiv.org/abs/2503.07050)), "
        "the same for all steps but for a scale and a shift of its input that each timestep has. `k` latents are "
        "active on a token at a step."
    )

    @register_to_config
    def __init__(
        self, site: str, in_channels: int, anchors: list[int], num_latents: int, k: int, activation: str = "output",
        sparsity: str = "threshold", time_channels: int = 256, centred: bool = True, input_norm: str | None = None,
        undone: bool = True, time_scale: float = 1.0, flip_sin_to_cos: bool = True, downscale_freq_shift: float = 0.0,
        skip: bool = False,
    ):  # fmt: skip
        super().__init__(
            site, in_channels, anchors, num_latents, k, activation, sparsity, centred, input_norm, undone, skip
        )
        width = time_channels
        if not isinstance(time_channels, int) or time_channels < 2 or time_channels % 2:
            raise ValueError(f"`time_channels` must be an even number, got {time_channels!r}.")
        numbers = (time_scale, downscale_freq_shift)
        finite = all(type(number) in (int, float) and abs(number) < 1e6 for number in numbers)
        if not finite or not isinstance(flip_sin_to_cos, bool) or downscale_freq_shift == width // 2:
            raise ValueError(
                "Expected a bool `flip_sin_to_cos`, and numbers `time_scale` and `downscale_freq_shift`, "
                f"got {flip_sin_to_cos!r}, {time_scale!r} and {downscale_freq_shift!r}."
            )
        self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.modulation = nn.Linear(width, 2 * in_channels)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def modulate(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """1 + scale and shift at these timesteps, each `(timesteps, d)`."""
        c = self.config
        embedding = get_timestep_embedding(
            timesteps * c.time_scale, c.time_channels, c.flip_sin_to_cos, c.downscale_freq_shift
        )
        scale, shift = self.modulation(self.time_mlp(embedding)).chunk(2, dim=-1)
        return 1 + scale, shift

    def _modulate(self, timestep: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        factor, shift = self.modulate(torch.full((1,), float(timestep), device=self.modulation.weight.device))
        return factor[0].to(device), shift[0].to(device)

    def on(self, device: torch.device) -> TIDE:
        """This dictionary with the weights of its modulation on a device; all other tensors are shared."""
        if self.modulation.weight.device == device:
            return self
        moved = copy.copy(self)
        moved._modules = {
            name: copy.deepcopy(part).to(device) if name in ("time_mlp", "modulation") else part
            for name, part in self._modules.items()
        }
        return moved

    def normalize(self, tokens: torch.Tensor, timestep: float) -> torch.Tensor:
        factor, shift = self._modulate(timestep, tokens.device)
        return super().normalize(tokens, timestep) * factor + shift

    @torch.no_grad()
    def normalizer(self, device: torch.device) -> Callable[[torch.Tensor, float], torch.Tensor]:
        return self.on(device).normalize

    def denormalize(self, decoded: torch.Tensor, timestep: float, tokens: torch.Tensor | None = None) -> torch.Tensor:
        if self.config.undone:
            factor, shift = self._modulate(timestep, decoded.device)
            decoded = (decoded - shift) / factor
        return super().denormalize(decoded, timestep, tokens)

    def directions(self, latents: list[int] | torch.Tensor, injection: str = "trajectory") -> Directions:
        directions = super().directions(latents)
        return _ModulatedDirections(directions.paths, self) if self.config.undone else directions


class _ModulatedDirections(Directions):
    """Directions in the modulated space of the encoder, `(latents, 1, d)`; the modulation is inverted at each step."""

    def __init__(self, paths: torch.Tensor, tide: TIDE):
        super().__init__(paths)
        self.tide = tide

    def to(self, device: torch.device) -> Directions:
        return _ModulatedDirections(self.paths.to(device, torch.float32), self.tide.on(torch.device(device)))

    @torch.no_grad()
    def at(self, step: Step) -> torch.Tensor:
        factor, _ = self.tide._modulate(step.timestep, self.paths.device)
        return self.paths[:, 0] / factor
