"""Random numbers that depend on the seed and the step alone, so that a resumed run draws the same."""

from __future__ import annotations

import torch


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The source of all randomness of one training step."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)
