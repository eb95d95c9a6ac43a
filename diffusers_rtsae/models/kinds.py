"""The kinds of dictionary there are, and one made from what a file says. To add a kind, write its module and name it
in `KINDS`."""

from __future__ import annotations

import torch

from .base import SparseDictionary
from .matching_pursuit import MatchingPursuitSAE
from .mixture import MixtureSAE
from .quantized import QuantizedSAE
from .rtsae import RTSAE
from .sae import SparseAutoencoder
from .temporal import TemporalSAE
from .tide import TIDE

#: The kinds that load, by the `_class_name` in their configuration.
KINDS: dict[str, type[SparseDictionary]] = {
    kind.__name__: kind
    for kind in (RTSAE, SparseAutoencoder, TIDE, MixtureSAE, MatchingPursuitSAE, QuantizedSAE, TemporalSAE)
}
_MAPPED = ("encoder", "decoder")  # too large to look through: whoever takes rows of these checks them


def without_weights(kind: str, config: dict) -> SparseDictionary:
    """
    A dictionary of the class that `KINDS` has under this name, whose tensors take no memory yet.

    Raises:
        `TypeError`, `ValueError`, `RuntimeError`: the configuration describes no dictionary of that kind.
    """
    with torch.device("meta"):
        return KINDS[kind](**config)


def with_tensors(
    sae: SparseDictionary, tensors: dict[str, torch.Tensor], source: str, dtype: torch.dtype | None
) -> SparseDictionary:
    """
    Give a dictionary of [`without_weights`] its tensors, as they are, without copying them.

    Args:
        tensors (`dict[str, torch.Tensor]`): one for each name in its `state_dict()`.
        source (`str`): where they are from, for messages.
        dtype (`torch.dtype`, *optional*): of the matrices; as they are by default.

    Raises:
        `ValueError`: one of those that are not matrices holds NaN or inf.
    """
    for name, tensor in tensors.items():
        if name not in _MAPPED and not torch.isfinite(tensor).all():
            raise ValueError(f"{source} holds NaN or inf in {name!r}.")
        if name in sae.matrices and dtype is not None:
            tensors[name] = tensor.to(dtype)
    sae.load_state_dict(tensors, assign=True)
    return sae.requires_grad_(False).eval()
