"""Dictionaries on disk and on the Hub: what they are in memory, their format and its checks, loading, saving, the
model card, downloads. What needs torch is imported when it is asked for."""

from typing import TYPE_CHECKING

from ..imports import on_demand
from .contents import Contents, locate, parse_feature, read_contents, search_labels, search_names
from .format import CONFIG_NAME, LABELS_NAME, MAPS_NAME, PRESETS_NAME, WEIGHTS_NAME, check_label
from .hub import check_available, fetch, is_cached, list_pretrained

if TYPE_CHECKING:
    from .card import model_card
    from .dictionary import Dictionary, signature
    from .load import convertible, load_dictionary
    from .weights import save_tensors

__all__ = [
    "CONFIG_NAME",
    "LABELS_NAME",
    "MAPS_NAME",
    "PRESETS_NAME",
    "WEIGHTS_NAME",
    "Contents",
    "Dictionary",
    "check_available",
    "check_label",
    "convertible",
    "fetch",
    "is_cached",
    "list_pretrained",
    "load_dictionary",
    "locate",
    "model_card",
    "parse_feature",
    "read_contents",
    "save_tensors",
    "search_labels",
    "search_names",
    "signature",
]

__getattr__ = on_demand(__name__, ("dictionary", "load", "card", "weights"), __all__)
