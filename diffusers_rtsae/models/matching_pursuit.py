"""A sparse autoencoder that chooses latents one after the other, each for what those before it leave over."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config

from .base import Memory, Reader, SparseDictionary, Step
from .sae import INPUT_NORMS, SparseAutoencoder

_PIECE = 2**24  # correlations held at once


class MatchingPursuitSAE(SparseAutoencoder):
    r"""
    A tied autoencoder that encodes by matching pursuit (2506.03093): up to k times, the latent whose decoder row has
    the largest product with what is left of the token takes that product, and its share is subtracted.

    Args:
        site, in_channels, anchors, num_latents, activation, centred, input_norm: as of [`SparseAutoencoder`].
        k (`int`): how often at most.
        residual_threshold (`float`, defaults to 0.01): it ends once what is left is shorter; 0 for never.
        stop_on_duplicate (`bool`, defaults to `True`): it ends once a latent is chosen again, or nothing fits.

    Example:
        ```py
        >>> sae = MatchingPursuitSAE("mid_block", 1280, anchors=[961, 481, 1], num_latents=20480, k=32)
        ```
    """

    summary = (
        "A sparse autoencoder of single steps that chooses up to `k` latents of a token one after the other (matching "
        "pursuit); its features have one direction each."
    )

    @register_to_config
    def __init__(
        self, site: str, in_channels: int, anchors: list[int], num_latents: int, k: int, activation: str = "output",
        centred: bool = True, input_norm: str | None = None, residual_threshold: float = 0.01,
        stop_on_duplicate: bool = True,
    ):  # fmt: skip
        SparseDictionary.__init__(self, anchors, num_latents, activation)  # its configuration has no `sparsity`
        flags, number = (centred, stop_on_duplicate), type(residual_threshold) in (int, float)
        if not all(type(flag) is bool for flag in flags) or not number or not 0 <= residual_threshold < 1e9:
            raise ValueError(
                "Expected bools `centred` and `stop_on_duplicate`, and a number from 0 up as `residual_threshold`, "
                f"got {centred!r}, {stop_on_duplicate!r} and {residual_threshold!r}."
            )
        if input_norm not in INPUT_NORMS:
            raise ValueError(f"`input_norm` must be one of {list(INPUT_NORMS)}, got {input_norm!r}.")
        self._allocate(in_channels, anchors, num_latents)

    def reader(self, latents: list[int], device: torch.device) -> Reader:
        return PursuitReader(self, latents, device)

    def encode_step(self, tokens: torch.Tensor, timestep: float) -> torch.Tensor:
        return self.pursue(self.normalize(tokens.float(), timestep) - self.centre, self.encoder.float())

    def pursue(self, tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Latents `(..., m)` of normalised and centred tokens `(..., d)`, with all rows `(m, d)` where these are."""
        left = tokens.flatten(0, -2)
        latents = left.new_zeros(len(left), len(rows))
        going = torch.ones_like(left[:, :1], dtype=torch.bool)
        for _ in range(self.config.k):
            chosen = torch.cat([(piece @ rows.T).argmax(1) for piece in left.split(max(1, _PIECE // len(rows)))])
            directions = rows[chosen]
            products = (left * directions).sum(1, keepdim=True).relu() * going
            is_new = (products > 0) & (latents.gather(1, chosen[:, None]) == 0)
            latents.scatter_add_(1, chosen[:, None], products)
            left = left - products * directions
            if self.config.stop_on_duplicate:
                going = going & is_new
            if self.config.residual_threshold > 0:
                going = going & (left.norm(dim=1, keepdim=True) >= self.config.residual_threshold)
        return latents.unflatten(0, tokens.shape[:-1])


class PursuitReader(Reader):
    """Reads latents that are known once all are: O(tokens · d · m · k)."""

    def __init__(self, sae: MatchingPursuitSAE, rows: list[int], device: torch.device):
        self.sae, self.computes = sae, sae.config.num_latents * sae.config.k
        self.encoder = sae.encoder_rows(list(range(sae.config.num_latents))).to(device)
        self.centre = sae.centre.detach().to(device)
        self.rows = torch.tensor(rows, dtype=torch.long, device=device)

    def read(self, memory: Memory, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        normalized = self.sae.normalize(tokens.float(), step.timestep) - self.centre
        return self.sae.pursue(normalized, self.encoder)[..., self.rows]
