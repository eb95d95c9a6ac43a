"""The kinds of dictionary and the architectures that a recipe may name.

Each entry says where its class is, as `module:class`, so that a recipe is checked before PyTorch is imported. To add
one, write its module and name it here.
"""

from __future__ import annotations

import pkgutil
from typing import NamedTuple


class Kind(NamedTuple):
    """
    A kind of dictionary (`train.kind`).

    objective (`str`): the `Objective` that it is trained with.
    of_trajectories (`bool`): whether one code stands for a whole trajectory; otherwise each step has its own.
    """

    objective: str
    of_trajectories: bool = False


KINDS = {
    "rtsae": Kind("training.kinds.rtsae:Residuals", of_trajectories=True),
    "static": Kind("training.kinds.static:Steps"),
    "tide": Kind("training.kinds.tide:ModulatedSteps"),
    "mixture": Kind("training.kinds.mixture:RoutedSteps"),
}

#: Which latents are active, and what is minimised (`train.architecture`).
ARCHITECTURES = {
    "batch_topk": "training.architectures.batch_topk:BatchTopK",
    "topk": "training.architectures.batch_topk:TopK",
    "matryoshka": "training.architectures.matryoshka:Matryoshka",
    "jump_relu": "training.architectures.jump_relu:JumpReLU",
    "atm": "training.architectures.atm:AdaptiveMasking",
}


def objective_of(kind: str) -> type:
    """The objective of a kind that is in `KINDS`."""
    return pkgutil.resolve_name(KINDS[kind].objective)


def architecture_of(name: str) -> type:
    """The class of an architecture that is in `ARCHITECTURES`."""
    return pkgutil.resolve_name(ARCHITECTURES[name])
