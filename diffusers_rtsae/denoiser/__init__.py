"""All that depends on a model: how pipelines call their denoiser, what its blocks return, and the hooks on them."""

from .arguments import Arguments
from .blocks import DENOISERS, Block, describe, get_denoiser, get_denoisers, get_site, is_text, list_sites, unwrapped
from .call import Call, CallReader, Part
from .callers import FAMILIES, PIPELINES, Caller, Family, Generation, find_caller
from .compile import is_compiled
from .grid import Grid, token_grid
from .tap import Tap
from .time import TimeGrid, noise_schedule, training_time

__all__ = [
    "DENOISERS",
    "FAMILIES",
    "PIPELINES",
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
    "is_compiled",
    "is_text",
    "list_sites",
    "noise_schedule",
    "token_grid",
    "training_time",
    "unwrapped",
]
