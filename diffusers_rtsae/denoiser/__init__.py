"""All that depends on a model: how pipelines call their denoiser and text encoders, what their blocks return, and the
hooks on them."""

from .arguments import Arguments
from .blocks import (
    DENOISERS,
    TEXT_ENCODERS,
    Block,
    describe,
    get_denoiser,
    get_denoisers,
    get_site,
    get_text_encoders,
    is_text,
    joined_sites,
    list_sites,
    split_site,
    unwrapped,
)
from .call import Call, CallReader, Part
from .callers import FAMILIES, PIPELINES, Caller, Family, Generation, find_caller
from .compile import is_compiled
from .grid import Grid, token_grid
from .noise import shares, unmix
from .tap import Tap
from .time import TimeGrid, noise_schedule, training_time

__all__ = [
    "DENOISERS",
    "FAMILIES",
    "PIPELINES",
    "TEXT_ENCODERS",
    "Arguments",
    "Block",
    "Call",
    "CallReader",
    "Caller",
    "Family",
    "Generation",
    "Grid",
    "Part",
    "Tap",
    "TimeGrid",
    "describe",
    "find_caller",
    "get_denoiser",
    "get_denoisers",
    "get_site",
    "get_text_encoders",
    "is_compiled",
    "is_text",
    "joined_sites",
    "list_sites",
    "noise_schedule",
    "shares",
    "split_site",
    "token_grid",
    "training_time",
    "unmix",
    "unwrapped",
]
