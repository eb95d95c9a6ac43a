"""The kinds of dictionary, one file each; every kind is a subclass of `SparseDictionary`."""

from .base import (
    ACTIVATIONS,
    Directions,
    FeatureTimes,
    Memory,
    Reader,
    SparseDictionary,
    Step,
    TokenGrid,
    interpolate,
    is_of_steps,
    places,
)
from .dynamics import LinearDynamics
from .kinds import KINDS, with_tensors, without_weights
from .linear_map import PLACES, LinearMap, waves
from .matching_pursuit import MatchingPursuitSAE
from .mixture import METADATA, MixtureSAE, share_of_guidance
from .quantized import QuantizedSAE
from .rtsae import RTSAE, RTSAEOutput
from .sae import SparseAutoencoder
from .sparsity import batch_topk, jump_relu, topk
from .temporal import TemporalSAE
from .tide import TIDE

__all__ = [
    "ACTIVATIONS",
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
    "MatchingPursuitSAE",
    "MixtureSAE",
    "QuantizedSAE",
    "RTSAEOutput",
    "Reader",
    "SparseAutoencoder",
    "SparseDictionary",
    "Step",
    "TemporalSAE",
    "TokenGrid",
    "batch_topk",
    "interpolate",
    "is_of_steps",
    "jump_relu",
    "places",
    "share_of_guidance",
    "topk",
    "waves",
    "with_tensors",
    "without_weights",
]
