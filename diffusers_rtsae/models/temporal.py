"""A sparse autoencoder of what a token adds to the tokens before it in its picture."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from .base import Memory, Reader, SparseDictionary, Step
from .sae import INPUT_NORMS, SparseAutoencoder
from .sparsity import topk


class TemporalSAE(SparseAutoencoder):
    r"""
    A temporal feature analyser (2511.01836). Its time is the order of a picture's tokens, not that of denoising:
    attention over the codes of the tokens before predicts a part of each token, which is subtracted along the
    prediction's direction, and the latents are those of the rest. x̂ is the prediction and what the latents decode to.

    Args:
        site, in_channels, anchors, num_latents, k, activation, centred, input_norm: as of [`SparseAutoencoder`].
        sparsity (`str`): `"topk"`, the k largest of a token, or `"threshold"`, all that are positive.
        heads, layers (`int`): of the attention.
        key_channels (`int`): of queries and keys, of all heads.

    Example:
        ```py
        >>> sae = TemporalSAE("mid_block", 1280, [961, 481, 1], num_latents=5120, k=32, heads=4, key_channels=80)
        >>> latents = sae.encode_step(picture, timestep=481)  # (tokens, d) -> (tokens, m)
        ```
    """

    shares_picture = True
    summary = (
        "A sparse autoencoder of single steps, of what attention over the tokens before does not predict of a token "
        "(temporal feature analysis, [arXiv 2511.01836](https://arxiv.org/abs/2511.01836)); its features have one "
        "direction each."
    )

    @register_to_config
    def __init__(
        self, site: str, in_channels: int, anchors: list[int], num_latents: int, k: int, activation: str = "output",
        sparsity: str = "topk", centred: bool = True, input_norm: str | None = None, heads: int = 8, layers: int = 1,
        key_channels: int = 64,
    ):  # fmt: skip
        SparseDictionary.__init__(self, anchors, num_latents, activation)
        counts = (heads, layers, key_channels)
        whole = all(type(count) is int and 0 < count <= num_latents for count in counts)
        if not whole or num_latents % heads or key_channels % heads:
            raise ValueError(
                f"Expected `heads` that divide {num_latents} latents and the `key_channels`, and `layers`, got "
                f"{heads!r}, {key_channels!r} and {layers!r}."
            )
        if sparsity not in ("topk", "threshold") or k > num_latents or input_norm not in INPUT_NORMS:
            raise ValueError(
                f"Expected `sparsity` 'topk' or 'threshold', k up to {num_latents}, and `input_norm` one of "
                f"{list(INPUT_NORMS)}, got {sparsity!r}, {k!r} and {input_norm!r}."
            )
        self._allocate(in_channels, anchors, num_latents)
        self.attention = nn.ModuleList(CodeAttention(num_latents, key_channels, heads) for _ in range(layers))

    def split(self, tokens: torch.Tensor, timestep: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `(..., N, m)` of pictures `(..., N, d)`, and what the tokens before predict of the normalised and
        centred ones, `(..., N, d)`."""
        rest = self.normalize(tokens.float(), timestep) - self.centre
        encoder, decoder, predicted = self.encoder.float(), self.decoder.float(), torch.zeros_like(rest)
        for attention in self.attention:
            direction = attention(F.linear(rest, encoder, self.encoder_bias).relu()) @ decoder
            length = direction.norm(dim=-1, keepdim=True) + 1e-6
            part = (direction * rest).sum(-1, keepdim=True) / length.square() * direction
            predicted, rest = predicted + part, rest - part
        latents = F.linear(rest, encoder, self.encoder_bias)
        return topk(latents, self.config.k) if self.config.sparsity == "topk" else latents.relu(), predicted

    def encode_step(self, tokens: torch.Tensor, timestep: float) -> torch.Tensor:
        return self.split(tokens, timestep)[0]

    def decode_step(self, latents: torch.Tensor, timestep: float, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """What latents `(..., N, m)` decode to, with what is predicted of these tokens, if they are given."""
        decoded = latents @ self.decoder.float() + self.decoder_bias
        decoded = decoded if tokens is None else decoded + self.split(tokens, timestep)[1]
        return self.denormalize(decoded, timestep, tokens)

    def reader(self, latents: list[int], device: torch.device) -> Reader:
        return TemporalReader(self, latents, device)


class CodeAttention(nn.Module):
    """Causal attention from the code of each token to those of the tokens before it, none of itself."""

    def __init__(self, num_latents: int, key_channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(num_latents, key_channels), nn.Linear(num_latents, key_channels)
        self.value, self.out = nn.Linear(num_latents, num_latents), nn.Linear(num_latents, num_latents)

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Predicted codes `(..., N, m)` from codes `(..., N, m)`."""
        before = F.pad(codes, (0, 0, 1, -1))  # of the first token, zeros
        query, key, value = (
            layer(given).unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for layer, given in ((self.query, codes), (self.key, before), (self.value, before))
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(attended.transpose(-2, -3).flatten(-2)).relu()


class TemporalReader(Reader):
    """Reads latents that depend on all codes of the tokens before."""

    def __init__(self, sae: TemporalSAE, rows: list[int], device: torch.device):
        sae.encoder_rows(list(range(sae.config.num_latents)))  # raises if one holds NaN or inf
        self.sae = sae if sae.encoder.device == device else copy.deepcopy(sae).to(device)
        self.rows, self.computes = torch.tensor(rows, dtype=torch.long, device=device), sae.config.num_latents

    def read(self, memory: Memory, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        return self.sae.encode_step(tokens, step.timestep)[..., self.rows]
