"""Dictionaries of every kind with random weights, for tests that hold for all of them."""

import torch

from diffusers_rtsae import RTSAE, TIDE, MixtureSAE, SparseAutoencoder
from diffusers_rtsae.models import MatchingPursuitSAE, QuantizedSAE, SparseDictionary, TemporalSAE

MADE = {
    "RTSAE": lambda *shape: RTSAE(*shape),
    "SparseAutoencoder": lambda *shape: SparseAutoencoder(*shape),
    "SparseAutoencoder, TopK": lambda *shape: SparseAutoencoder(*shape, sparsity="topk"),
    "SparseAutoencoder, groupmax": lambda *shape: SparseAutoencoder(*shape, sparsity="groupmax"),
    "TIDE": lambda *shape: TIDE(*shape, time_channels=16),
    "MixtureSAE": lambda *shape: MixtureSAE(*shape, num_experts=3, shared_latents=shape[3] % 3 + 3),
    "MatchingPursuitSAE": lambda *shape: MatchingPursuitSAE(*shape),
    "QuantizedSAE": lambda *shape: QuantizedSAE(*shape),
    "TemporalSAE": lambda *shape: TemporalSAE(*shape, heads=2, key_channels=4),
    "TIDE, TopK": lambda *shape: TIDE(*shape, sparsity="topk", time_channels=16),
}
READ_ONLY = ("SparseAutoencoder, groupmax", "MatchingPursuitSAE", "QuantizedSAE", "TemporalSAE")  # which none trains
OTHERS = [kind for kind in MADE if kind != "RTSAE" and kind not in READ_ONLY]
NOISY = {  # how far the parameters of each are from what they are to begin with
    "dynamics.mean": 1.0, "dynamics.transition": 0.2, "encoder_bias": 0.1, "decoder_bias": 0.3,
    "modulation.weight": 0.3, "modulation.bias": 0.2,
}  # fmt: skip
POSITIVE = {  # and in which range the others are
    "dynamics.scale": (0.5, 2), "dynamics.residual_scale": (0.3, 1), "scale": (0.5, 2), "threshold": (0, 0.5),
    "typical_activation": (0.5, 3), "mean_activation": (0, 0.3), "density": (0, 1),
}  # fmt: skip


def random_dictionary(
    kind: str, site: str, in_channels: int, anchors: list[int], num_latents: int, k: int, seed: int = 0
) -> SparseDictionary:
    """One whose every parameter matters."""
    torch.manual_seed(seed)
    sae = MADE[kind](site, in_channels, anchors, num_latents, k)
    tensors = sae.state_dict()
    for name in filter(tensors.__contains__, NOISY):  # in this order: a set's differs from run to run
        tensors[name].copy_(NOISY[name] * torch.randn(tensors[name].shape))
    for name in filter(tensors.__contains__, POSITIVE):
        tensors[name].uniform_(*POSITIVE[name])
    sae.max_activation.copy_(5 * sae.typical_activation)
    return sae.requires_grad_(False).eval()
