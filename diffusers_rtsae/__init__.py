"""See and steer what a text-to-image model does while it denoises.

Importing this package adds `load_rtsae` and its companions to all diffusers pipelines, also to those that are imported
later. torch and diffusers are imported when they are first needed."""

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


def _attach_to(name: str):
    def attach_to(module) -> None:
        from .pipeline import attach

        attach(getattr(module, name))

    return attach_to


when_imported("diffusers.pipelines.pipeline_utils", _attach_to("DiffusionPipeline"))
when_imported("diffusers.modular_pipelines.modular_pipeline", _attach_to("ModularPipeline"))
