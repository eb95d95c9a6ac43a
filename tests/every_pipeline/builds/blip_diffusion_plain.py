"""BLIP-Diffusion without a ControlNet."""

from __future__ import annotations

from . import Built, builds, parts
from .blip_diffusion import called, components


@builds("BlipDiffusionPipeline")
def blip_diffusion(kind: type) -> Built:
    return Built(parts.quiet(kind(**components())), called, images=False)
