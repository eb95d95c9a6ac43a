"""Dictionaries: one file a kind, each on `SparseDictionary`."""

from .base import Directions, FeatureTimes, Memory, Reader, SparseDictionary, Step, TokenGrid, interpolate, places
from .dynamics import LinearDynamics
from .linear_map import PLACES, LinearMap, waves
from .mixture import METADATA, MixtureSAE, share_of_guidance
from .rtsae import RTSAE, RTSAEOutput
from .sae import SparseAutoencoder
from .sparsity import batch_topk, jump_relu, topk
from .tide import TIDE

# that load, by the `_class_name` in their configuration
KINDS: dict[str, type[SparseDictionary]] = {
    kind.__name__: kind for kind in (RTSAE, SparseAutoencoder, TIDE, MixtureSAE)
}

__all__ = [
    "KINDS",
    "METADATA",
    "RTSAE",
    "TIDE",
    "Directions",
    "FeatureTimes",
    "LinearDynamics",
    "LinearMap",
    "PLACES",
    "Memory",
    "MixtureSAE",
    "RTSAEOutput",
    "Reader",
    "SparseAutoencoder",
    "SparseDictionary",
    "Step",
    "TokenGrid",
    "batch_topk",
    "interpolate",
    "jump_relu",
    "places",
    "share_of_guidance",
    "topk",
    "waves",
]
