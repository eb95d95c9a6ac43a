"""A sparse autoencoder with experts: groups of latents, of which a router chooses two for each token."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from .base import Memory, Reader, SparseDictionary, Step, places
from .sae import SparseAutoencoder, StepReader
from .sparsity import jump_relu

METADATA = ("time", "row", "column", "guidance")
_ROUTED = 2  # number of experts that the router chooses for a token
_GUIDANCE = 20.0  # guidance scales above this one count as this one


class MixtureSAE(SparseAutoencoder):
    r"""
    A sparse autoencoder of single steps with shared latents and experts, after the metadata-aware mixture of experts
    of 2509.10919. The input of the router is the token and its metadata, each metadata value x as (sin π x, cos π x).
    The router gives shares to its two best experts. The pre-activations of their latents are multiplied by these
    shares; the latents of all other experts are zero.

    Args:
        site, in_channels, anchors, num_latents, k, activation: see [`SparseAutoencoder`].
        shared_latents (`int`, *optional*): number of latents that belong to no expert, the first ones of the
            dictionary; a quarter of `num_latents` by default. The experts have equal numbers of the others, in order.
        num_experts (`int`, defaults to 8): number of experts.
        metadata (`list[str]`): the inputs of the router, some of `"time"`, `"row"`, `"column"` and `"guidance"`. An
            unknown value is passed as zeros.

    Example:
        ```py
        >>> sae = MixtureSAE("mid_block", 1280, anchors=[961, 481, 1], num_latents=20480, k=32)
        >>> latents = sae.encode_step(tokens, 481)  # (tokens, d) -> (tokens, m)
        ```
    """

    activations = SparseDictionary.activations
    knows_time = True
    summary = (
        "A sparse autoencoder of single steps with shared latents and experts; a router that sees the token and its "
        "metadata (after [arXiv 2509.10919](https://arxiv.org/abs/2509.10919)) chooses two experts for each. `k` "
        "latents are active on a token at a step on average."
    )

    @register_to_config
    def __init__(
        self, site: str, in_channels: int, anchors: list[int], num_latents: int, k: int, activation: str = "output",
        shared_latents: int | None = None, num_experts: int = 8, metadata: list[str] = METADATA,
    ):  # fmt: skip
        SparseDictionary.__init__(
            self, anchors, num_latents, activation
        )  # skips that of `SparseAutoencoder`, which has a `sparsity`
        self._allocate(in_channels, anchors, num_latents)
        shared = num_latents // 4 if shared_latents is None else shared_latents
        whole = isinstance(num_experts, int) and isinstance(shared, int)
        if not whole or num_experts < _ROUTED or not 0 <= shared < num_latents or (num_latents - shared) % num_experts:
            raise ValueError(
                f"Expected two experts or more, of as many latents each, of the {num_latents} without those shared; "
                f"got {num_experts!r} experts and {shared_latents!r} shared."
            )
        if not isinstance(metadata, list | tuple) or any(name not in METADATA for name in metadata):
            raise ValueError(f"`metadata` must be some of {list(METADATA)}, got {metadata!r}.")
        self.shared = shared
        width = in_channels + 2 * len(metadata)
        self.router, self.noise = nn.Linear(width, num_experts), nn.Linear(width, num_experts)
        nn.init.zeros_(self.noise.weight)

    def experts(self, latents: torch.Tensor) -> torch.Tensor:
        """The expert that each of these latents belongs to, counted from 1; 0 for shared latents."""
        each = (self.config.num_latents - self.shared) // self.config.num_experts
        return torch.where(latents < self.shared, 0, 1 + (latents - self.shared).div(each, rounding_mode="floor"))

    def metadata(self, step: Step, tokens: int, at: torch.Tensor | None = None) -> torch.Tensor:
        """
        The metadata inputs of the router at a step, `(N or 1, 2 · metadata)`.

        Args:
            tokens (`int`): N, the number of tokens.
            at (`torch.Tensor`, *optional*): the `places` of the step's grid, if they are computed already. The result
                is on their device.
        """
        if at is None and step.size is not None:
            at = places(step.size)
        device = None if at is None else at.device
        known = {"time": torch.full((1,), step.timestep / self.duration, device=device)}
        if step.guidance is not None:
            known["guidance"] = torch.full((1,), float(share_of_guidance(step.guidance)), device=device)
        if at is not None and len(at) == tokens:
            known["row"], known["column"] = at.T
        return self.encode_metadata(known)

    def encode_metadata(self, known: dict[str, torch.Tensor]) -> torch.Tensor:
        """The metadata inputs of the router `(N or 1, 2 · metadata)` from values between 0 and 1 by name, `(N,)` or
        `(1,)`. Missing values become zeros."""
        encoded = {name: cyclic(values) for name, values in known.items()}
        like = next(iter(encoded.values()))
        pairs = [encoded.get(name, like.new_zeros(1, 2)) for name in self.config.metadata]
        length = max([len(pair) for pair in pairs], default=1)
        return torch.cat([like.new_zeros(length, 0), *(pair.expand(length, 2) for pair in pairs)], 1)

    def gates(
        self, tokens: torch.Tensor, metadata: torch.Tensor, router: nn.Linear | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The share of each expert for each token.

        Args:
            tokens (`torch.Tensor`): `(..., N, d)`.
            metadata (`torch.Tensor`): `(N or 1, 2 · metadata)`, or with the leading dimensions of the tokens.
            router (`nn.Linear`, *optional*): a copy of the router on the device of the tokens.

        Returns:
            the shares `(..., 1 + experts)`, of which the first is that of the shared latents and always 1; and, while
            training, a loss for the imbalance of the experts: the coefficient of variation (CV) of their importance
            plus the CV of their load, each times 0.01 (2509.10919, after 1701.06538). The second is `None` otherwise.
            The router adds noise to its logits while training only.
        """
        metadata = metadata.to(tokens).expand(*tokens.shape[:-1], metadata.shape[-1])
        inputs = torch.cat([tokens, metadata], -1)
        router = router or self.router
        logits = clean = F.linear(inputs, router.weight.to(inputs), router.bias.to(inputs))
        imbalance = None
        if self.training:
            spread = F.softplus(self.noise(inputs)) + 1e-2
            logits = clean + spread * torch.randn_like(clean)
        best = logits.topk(_ROUTED, dim=-1)
        shares = torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(-1))
        if self.training:
            # the probability that an expert is chosen when its noise is drawn again: its logit must then exceed
            # the second largest noisy logit of the other experts
            ahead = logits.topk(_ROUTED + 1, dim=-1).values if logits.shape[-1] > _ROUTED else best.values
            chosen = logits >= best.values[..., -1:]
            least = torch.where(chosen, ahead[..., -1:], best.values[..., -1:])
            load = torch.distributions.Normal(0.0, 1.0, validate_args=False).cdf((clean - least) / spread)
            imbalance = 0.01 * (_variation(shares) + _variation(load))
        return torch.cat([torch.ones_like(shares[..., :1]), shares], -1), imbalance

    def reader(self, latents: list[int], device: torch.device) -> Reader:
        return RoutedReader(self, latents, device)

    def encode_step(self, tokens: torch.Tensor, timestep: float) -> torch.Tensor:
        tokens = tokens.float()
        pre_activations = F.linear(tokens - self.decoder_bias, self.encoder.float(), self.encoder_bias)
        shares, _ = self.gates(tokens, self.metadata(Step(timestep, 0.0), 1))
        owner = self.experts(torch.arange(self.config.num_latents, device=tokens.device))
        return jump_relu(pre_activations * shares[..., owner], self.threshold)


def share_of_guidance(scale: float) -> torch.Tensor:
    """A guidance scale as a number from 0 to 1."""
    return torch.tensor(min(scale, _GUIDANCE) / _GUIDANCE)


def cyclic(values: torch.Tensor) -> torch.Tensor:
    """Values x from 0 to 1 as (sin π x, cos π x), `(n, 2)`."""
    return torch.stack([(math.pi * values).sin(), (math.pi * values).cos()], -1)


def _variation(shares: torch.Tensor) -> torch.Tensor:
    """The coefficient of variation, over experts, of their sums over tokens."""
    sums = shares.flatten(0, -2).sum(0)
    return sums.std(correction=0) / sums.mean().clamp(min=1e-9)


class RoutedReader(StepReader):
    """Reads some latents of a mixture from their own rows and the router."""

    def __init__(self, sae: MixtureSAE, rows: list[int], device: torch.device):
        super().__init__(sae, rows, device)
        self.owner = sae.experts(torch.tensor(rows, dtype=torch.long)).to(device)
        self.router, self._places = copy.deepcopy(sae.router).to(device), {}

    def read(self, memory: Memory, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        if step.size not in self._places:
            at = torch.zeros(0, 2) if step.size is None else places(step.size)
            self._places[step.size] = at.to(tokens.device)
        tokens = tokens.float()
        metadata = self.sae.metadata(step, tokens.shape[-2], self._places[step.size])
        shares, _ = self.sae.gates(tokens, metadata, self.router)
        return jump_relu((tokens @ self.encoder.T + self.bias) * shares[..., self.owner], self.threshold)
