"""The table of the kinds of dictionary, and how a dictionary is made from the configuration and tensors of a file. To
add a kind, write its module and name its class in `KINDS`."""

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

#: The kinds that can be loaded, by the `_class_name` in their configuration.
KINDS: dict[str, type[SparseDictionary]] = {
    kind.__name__: kind
    for kind in (RTSAE, SparseAutoencoder, TIDE, MixtureSAE, MatchingPursuitSAE, QuantizedSAE, TemporalSAE)
}
_MAPPED = ("encoder", "decoder")  # too large to check as a whole: rows of them are checked when they are read


def without_weights(kind: str, config: dict) -> SparseDictionary:
    """
    A dictionary of this kind on the meta device: its tensors have shapes but take no memory.

    Args:
        kind (`str`): a key of `KINDS`.
        config (`dict`): the arguments of its class.

    Raises:
        `TypeError`, `ValueError`, `RuntimeError`: the configuration is not valid for this kind.
    """
    with torch.device("meta"):
        return KINDS[kind](**config)


def with_tensors(
    sae: SparseDictionary, tensors: dict[str, torch.Tensor], source: str, dtype: torch.dtype | None
) -> SparseDictionary:
    """
    Give a dictionary from [`without_weights`] its tensors, without copying them.

    Args:
        tensors (`dict[str, torch.Tensor]`): one tensor for each name in the `state_dict()` of the dictionary.
        source (`str`): file that the tensors come from, for error messages.
        dtype (`torch.dtype`, *optional*): dtype of the matrices; unchanged by default.

    Raises:
        `ValueError`: a tensor other than `encoder` and `decoder` holds NaN or inf.
    """
    for name, tensor in tensors.items():
        if name not in _MAPPED and not torch.isfinite(tensor).all():
            raise ValueError(f"{source} holds NaN or inf in {name!r}.")
        if name in sae.matrices and dtype is not None:
            tensors[name] = tensor.to(dtype)
    sae.load_state_dict(tensors, assign=True)
    return sae.requires_grad_(False).eval()
