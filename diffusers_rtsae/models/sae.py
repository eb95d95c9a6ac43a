"""The static sparse autoencoder: one code for each step, with the same latents and directions at all of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from .base import Directions, Memory, Reader, SparseDictionary, Step
from .sparsity import jump_relu, topk

_PIECE = 2**24  # pre-activations held at once where all latents must be known


class SparseAutoencoder(SparseDictionary):
    r"""
    A sparse autoencoder of the activation at one site, whatever the step of denoising.

    z = S(W_enc (x − b_dec) + b_enc) and x̂ = W_decᵀ z + b_dec, with S the rectifier above a threshold of each latent
    (JumpReLU, 2407.14435; a ReLU at threshold 0; BatchTopK, 2412.06410, once it is trained), or the k largest of each
    token (TopK, 2406.04093).

    Args:
        site (`str`): path of the module in the denoiser whose activation this is, e.g. `"up_blocks.1.attentions.1"`.
        in_channels (`int`): d, the width of the site.
        anchors (`list[int]`): training timesteps, descending, that it was trained at.
        num_latents (`int`): m, the size of the dictionary.
        k (`int`): latents active on a token at a step: on average, or exactly.
        activation (`str`, defaults to `"output"`): what is read at the site, its `"output"` or its `"update"`
            (output − input).
        sparsity (`str`, defaults to `"threshold"`): a latent is active above its own `"threshold"`, so that it is
            decidable alone; or if it is among the k largest of its token, `"topk"`: an edit that must read one latent
            then computes all m of them, m · d multiplications a token and step.

    Example:
        ```py
        >>> sae = SparseAutoencoder("mid_block", 1280, anchors=[961, 481, 1], num_latents=20480, k=32)
        >>> latents = sae.encode(trajectories[:, :2])  # (tokens, 2, d) -> (tokens, m), at the second anchor
        ```
    """

    summary = (
        "A sparse autoencoder of the activation at any one step, the same for all steps; its features have one "
        "direction each. `k` latents are active on a token at a step."
    )

    @register_to_config
    def __init__(
        self, site: str, in_channels: int, anchors: list[int], num_latents: int, k: int, activation: str = "output",
        sparsity: str = "threshold",
    ):  # fmt: skip
        super().__init__(anchors, num_latents, activation)
        if sparsity not in ("threshold", "topk") or sparsity == "topk" and k > num_latents:
            raise ValueError(
                f"`sparsity` must be 'threshold', or 'topk' with k up to {num_latents}, got {sparsity!r} with {k}."
            )
        self._allocate(in_channels, anchors, num_latents)

    def _allocate(self, in_channels: int, anchors: list[int], num_latents: int) -> None:
        decoder = F.normalize(torch.randn(num_latents, in_channels), dim=1)
        self.encoder = nn.Parameter(decoder.clone())
        self.encoder_bias = nn.Parameter(torch.zeros(num_latents))
        self.decoder = nn.Parameter(decoder)
        self.decoder_bias = nn.Parameter(torch.zeros(in_channels))
        self.register_buffer("threshold", torch.zeros(num_latents))
        self.register_buffer("scale", torch.ones(len(anchors)))  # of the activation at each anchor

    @property
    def spread(self) -> torch.Tensor:
        return self.scale

    def shown(self, tokens: torch.Tensor, timestep: float) -> torch.Tensor:
        """What the encoder is shown of activations `(..., d)` at a step: these themselves."""
        return tokens

    def hidden(self, shown: torch.Tensor, timestep: float) -> torch.Tensor:
        """The inverse of `shown`."""
        return shown

    def reader(self, latents: list[int], device: torch.device) -> Reader:
        return (TopKReader if self.config.sparsity == "topk" else StepReader)(self, latents, device)

    def directions(self, latents: list[int] | torch.Tensor, injection: str = "trajectory") -> Directions:
        return Directions(self.decoder[latents].detach().float()[:, None])

    def encode_step(self, tokens: torch.Tensor, timestep: float) -> torch.Tensor:
        """Latents `(..., m)` of activations `(..., d)` at a timestep."""
        centred = self.shown(tokens.float(), timestep) - self.decoder_bias
        pre_activations = F.linear(centred, self.encoder.float(), self.encoder_bias)
        if self.config.sparsity == "topk":
            return topk(pre_activations, self.config.k)
        return jump_relu(pre_activations, self.threshold)

    def decode_step(self, latents: torch.Tensor, timestep: float) -> torch.Tensor:
        """Activations `(..., d)` at a timestep that latents `(..., m)` stand for."""
        return self.hidden(latents @ self.decoder.float() + self.decoder_bias, timestep)

    def encode(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.check_trajectories(hidden_states)
        return self.encode_step(hidden_states[..., -1, :], self.config.anchors[hidden_states.shape[-2] - 1])

    def reconstruct(self, hidden_states: torch.Tensor, teacher_forced: bool = False) -> torch.Tensor:
        self.check_trajectories(hidden_states)
        steps = zip(hidden_states.unbind(-2), self.config.anchors, strict=False)
        return torch.stack([self.decode_step(self.encode_step(h, t), t) for h, t in steps], -2)


def _rows(sae: SparseAutoencoder, rows: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder rows and what is added to their products with an activation."""
    encoder = sae.encoder_rows(rows)
    bias = sae.encoder_bias[rows].detach() - encoder @ sae.decoder_bias.detach()
    return encoder.to(device), bias.to(device)


class StepReader(Reader):
    """Reads latents that are each decidable alone: O(tokens · d · rows), and no other row."""

    def __init__(self, sae: SparseAutoencoder, rows: list[int], device: torch.device):
        self.sae = sae
        self.encoder, self.bias = _rows(sae, rows, device)
        self.threshold = sae.threshold[rows].to(device)

    def read(self, memory: Memory, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        shown = self.sae.shown(tokens.float(), step.timestep)
        return jump_relu(shown @ self.encoder.T + self.bias, self.threshold)


class TopKReader(Reader):
    """Reads latents of which the k largest of a token are active, so that all must be known: O(tokens · d · m)."""

    def __init__(self, sae: SparseAutoencoder, rows: list[int], device: torch.device):
        self.sae, self.rows = sae, len(rows)
        self.encoder, self.bias = _rows(sae, list(range(sae.config.num_latents)), device)
        self.computes = len(self.encoder)
        self.column = torch.full((len(self.encoder),), self.rows, device=device)  # the last takes all others
        self.column[rows] = torch.arange(self.rows, device=device)

    def read(self, memory: Memory, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        shown = self.sae.shown(tokens.float(), step.timestep).flatten(0, -2)
        latents = []
        for piece in shown.split(max(1, _PIECE // len(self.encoder))):
            values, active = torch.addmm(self.bias, piece, self.encoder.T).topk(self.sae.config.k, dim=1)
            wide = values.new_zeros(len(piece), self.rows + 1)
            latents.append(wide.scatter(1, self.column[active], values.relu())[:, : self.rows])
        return torch.cat(latents).unflatten(0, tokens.shape[:-1])
