"""See and steer what a text-to-image model does while it denoises; importing this gives diffusers pipelines
`load_rtsae`, those that are imported later too. Nothing heavy is imported before it is needed."""

from typing import TYPE_CHECKING

from .imports import on_demand, when_imported

if TYPE_CHECKING:
    from .denoiser import list_sites
    from .dictionary import Dictionary, list_pretrained, load_dictionary
    from .models import RTSAE, TIDE, MixtureSAE, SparseAutoencoder, SparseDictionary
    from .pipeline import RTSAELoaderMixin
    from .steering import Edit
    from .worlds import bundled, load_bundled

__version__ = "0.1.0"
__all__ = [
    "RTSAE",
    "TIDE",
    "Dictionary",
    "Edit",
    "MixtureSAE",
    "RTSAELoaderMixin",
    "SparseAutoencoder",
    "SparseDictionary",
    "bundled",
    "list_pretrained",
    "list_sites",
    "load_bundled",
    "load_dictionary",
]


__getattr__ = on_demand(__name__, ("worlds", "models", "dictionary", "denoiser", "steering", "pipeline"), __all__)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def _give_methods(name: str):
    def give(module) -> None:
        from .pipeline import attach

        attach(getattr(module, name))

    return give


when_imported("diffusers.pipelines.pipeline_utils", _give_methods("DiffusionPipeline"))
when_imported("diffusers.modular_pipelines.modular_pipeline", _give_methods("ModularPipeline"))
