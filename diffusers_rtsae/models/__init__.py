"""Dictionaries: one file a kind, each on `SparseDictionary`."""

from .base import Directions, FeatureTimes, Memory, Reader, SparseDictionary, Step, interpolate
from .dynamics import LinearDynamics
from .rtsae import RTSAE, RTSAEOutput
from .sparsity import batch_topk, jump_relu

KINDS: dict[str, type[SparseDictionary]] = {kind.__name__: kind for kind in (RTSAE,)}  # that load, by `_class_name`

__all__ = [
    "KINDS",
    "RTSAE",
    "Directions",
    "FeatureTimes",
    "LinearDynamics",
    "Memory",
    "RTSAEOutput",
    "Reader",
    "SparseDictionary",
    "Step",
    "batch_topk",
    "interpolate",
    "jump_relu",
]
