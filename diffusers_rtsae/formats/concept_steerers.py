"""Concept Steerers (2501.19066): exact TopK of the output of a text encoder's layer."""

from __future__ import annotations

import re

from .base import Description, Settings, Tensors
from .sdlens import SDLens

_BOTH = re.compile(r"(text_encoder\.text_model\.encoder\.layers)\.(\d+)\.(\d+)")


class ConceptSteerers(SDLens):
    """The files of SDLens, of a site in a text encoder. A dictionary of both of SDXL's reads them side by side."""

    name, more = "Concept Steerers", ()

    def is_of(self, site: str | None) -> bool:
        return not super().is_of(site)

    def folder(self, name: str) -> str:
        return _BOTH.sub(r"\1.\2+text_encoder_2.text_model.encoder.layers.\3", name)

    def describe(self, settings: Settings, tensors: Tensors) -> Description:
        described = super().describe(settings, tensors)
        return described._replace(options=described.options | {"activation": "output"})
