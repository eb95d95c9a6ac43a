"""What every kind of dictionary says about its training."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from diffusers_rtsae import SparseDictionary
from diffusers_rtsae.models import LinearDynamics

from ..architectures.sparse import Code, Gates
from ..common.processes import Processes
from ..recipe import Recipe, Train


class Objective(ABC):
    """
    What a dictionary is trained on, and how it is brought into the form that is saved.

    Args:
        sae (`SparseDictionary`): the dictionary in training, on its device.
        dynamics (`LinearDynamics`): of the trajectories, which standardise them.
    """

    prefixes = False  # whether the first anchors alone have a code, so that the encoder may be shown only these
    draws = False  # whether it draws random numbers

    def __init__(self, sae: SparseDictionary, dynamics: LinearDynamics, settings: Train, processes: Processes):
        self.sae, self.settings, self.processes = sae, settings, processes

    @classmethod
    @abstractmethod
    def untrained(cls, site: str, anchors: list[int], recipe: Recipe, dynamics: LinearDynamics) -> SparseDictionary:
        """A dictionary with its first weights."""

    @abstractmethod
    def inputs(self, trajectories: torch.Tensor) -> torch.Tensor:
        """`(batch, G, d)`, standardised, from trajectories `(batch, G, d)`."""

    @abstractmethod
    def rows(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rows to encode and to reconstruct, `(rows, width)`, and the unit in which their error is measured, if it
        is not 1."""

    def gates(
        self, rows: torch.Tensor, metadata: torch.Tensor | None = None
    ) -> tuple[Gates | None, torch.Tensor | float]:
        """
        The gates that multiply the pre-activations of `rows`, and a loss of their own.

        Args:
            metadata (`torch.Tensor`, *optional*): row, column and guidance of each trajectory, from 0
                to 1, `(batch, 3)`.
        """
        return None, 0.0

    def hide(self, centred: torch.Tensor, unit: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hide a part of the centred rows from the encoder while it trains; returns what is left, and the unit of the
        error then."""
        return centred, unit

    def finish(self) -> None:  # noqa: B027, for kinds that standardise by themselves
        """Change the trained dictionary so that it reads activations as they are, not standardised."""

    @abstractmethod
    def calibrate(self, trajectories: torch.Tensor) -> None:
        """Set the threshold of the finished dictionary so that k latents are active on average on `trajectories
        (tokens, G, d)`."""


def lowest_kept(code: Code, count: int) -> torch.Tensor | float:
    """The threshold that keeps what BatchTopK kept of `count` pre-activations; 0 if fewer than that were positive."""
    lowest = code.values.min() if len(code.values) == count else torch.zeros(())
    return torch.nextafter(lowest, torch.zeros_like(lowest))
