"""Other people's formats of sparse autoencoders, one module each. To add one, see [`Format`]."""

from .base import Description, Format, Published, Settings, Tensors
from .read import UNKNOWN, read
from .registry import FORMATS
from .search import check_pickles, choose, find, unknown_weights, walk

__all__ = [
    "FORMATS",
    "UNKNOWN",
    "Description",
    "Format",
    "Published",
    "Settings",
    "Tensors",
    "check_pickles",
    "choose",
    "find",
    "read",
    "unknown_weights",
    "walk",
]
