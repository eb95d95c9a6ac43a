"""See and steer what a text-to-image model does while it denoises; importing this gives diffusers pipelines
`load_rtsae`."""

from diffusers import DiffusionPipeline, ModularPipeline

from .hub import Dictionary, list_pretrained, load_dictionary
from .models import RTSAE, TIDE, MixtureSAE, SparseAutoencoder, SparseDictionary
from .pipeline import RTSAELoaderMixin, attach
from .steering import Edit, list_sites

__version__ = "0.1.0.dev0"
__all__ = [
    "RTSAE",
    "TIDE",
    "Dictionary",
    "Edit",
    "MixtureSAE",
    "RTSAELoaderMixin",
    "SparseAutoencoder",
    "SparseDictionary",
    "list_pretrained",
    "list_sites",
    "load_dictionary",
]

attach(DiffusionPipeline)
attach(ModularPipeline)
