"""The formats that are read. To add one, write its module and name it here."""

from __future__ import annotations

from .base import Format
from .concept_steerers import ConceptSteerers
from .dictionary_learning import DictionaryLearning
from .diffract import DifFRACT
from .overcomplete import Overcomplete
from .saelens import SAELens
from .sdlens import SDLens
from .sparsify import Sparsify

#: The formats by name. Of two with files of the same names the first that is of a site is taken.
FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Sparsify(), SAELens(), ConceptSteerers(), SDLens(), DictionaryLearning(), DifFRACT(), Overcomplete(),
    )
}  # fmt: skip
