"""A budget of latents for the batch (BatchTopK), or the same number for every row (TopK)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffusers_rtsae import SparseDictionary

from ..common.processes import Processes
from ..recipe import Train
from .matrix import Matrix
from .sparse import Code, Gates, batch_topk, decode, encode, topk


def mean_squared_error(reconstruction: torch.Tensor, target: torch.Tensor, unit: torch.Tensor | None) -> torch.Tensor:
    """The mean squared error in `unit`."""
    if unit is None:
        return F.mse_loss(reconstruction, target)
    return ((reconstruction - target) / unit).square().mean()


class BatchTopK:
    """The rows of a batch share a budget of `k` latents each (2412.06410)."""

    shares_budget = True  # rows of a batch share it, so that on unseen data a threshold must take its place
    draws = False  # whether it draws random numbers

    def __init__(self, settings: Train, device: torch.device | str, processes: Processes):
        self.k, self.processes = settings.k, processes
        self.dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]

    def start(self, centred: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Prepare for a centred sample, given the first weight and bias of the encoder."""

    def parameters(self) -> dict[str, torch.Tensor]:
        """Parameters that are learned beside those of the dictionary, one row for each latent."""
        return {}

    def state(self) -> dict[str, torch.Tensor]:
        """Other tensors that a checkpoint must hold."""
        return {}

    def encode(self, centred, centre, encoder: Matrix, bias, gates: Gates | None, training: bool) -> Code:
        """The code of centred rows, with gradients to the encoder (see `sparse.encode`)."""
        code = batch_topk(centred, encoder.weight, bias, self.k, self.dtype, self.processes, gates)
        return encode(centred, centre, encoder, bias, code, gates)

    def loss(self, target: torch.Tensor, code: Code, decoder: Matrix, centre: torch.Tensor, unit: torch.Tensor | None):
        """The loss, the mean squared error in `unit`, and the reconstruction `(rows, d)`."""
        reconstruction = decode(code, decoder, len(target), self.processes) + centre
        error = mean_squared_error(reconstruction, target, unit)
        return error, error, reconstruction

    def finish(self, sae: SparseDictionary) -> None:
        """Rescale a trained dictionary, if it needs that, so that one threshold for all latents is enough."""


class TopK(BatchTopK):
    """Every row has the same number of latents (2406.04093)."""

    shares_budget = False

    def encode(self, centred, centre, encoder, bias, gates, training) -> Code:
        code = topk(centred, encoder.weight, bias, self.k, self.dtype, self.processes, gates)
        return encode(centred, centre, encoder, bias, code, gates)
