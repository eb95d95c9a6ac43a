"""Conversion of a sampler's timesteps to training units, and of these to positions among a dictionary's anchors."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..models import Step


def _of_noise_level(sigma: float) -> float:
    """The timestep at which a flow-matching model has the signal-to-noise ratio of x₀ + σ ε: 1000 σ / (1 + σ)."""
    return 1000 * sigma / (1 + sigma)


#: Conversion to training units for samplers with other timesteps than training steps, by the start of the class name.
UNITS = {
    "EDM": lambda t, scheduler: _of_noise_level(math.exp(4 * t)),  # its timesteps are ln(σ) / 4 (2206.00364)
    "CosineDPMSolverMultistep": lambda t, scheduler: _of_noise_level(math.tan(t * math.pi / 2)),
    "CMStochasticIterative": lambda t, scheduler: _of_noise_level(math.exp(4 * t / 1000)),
    "Cosmos": lambda t, scheduler: _of_noise_level(t / 1000),  # a flow-matching sampler with noise levels as timesteps
    "SCM": lambda t, scheduler: _of_noise_level(math.tan(t)) if t < math.pi / 2 else 1000.0,
    "Amused": lambda t, scheduler: 1000 * (t + 1) / len(scheduler.timesteps),  # share of the tokens that are masked
    "DDPMWuerstchen": lambda t, scheduler: 1000 * t,
    "ScoreSdeVe": lambda t, scheduler: 1000 * t,
    "MiniMaxH3": lambda t, scheduler: 1000 * (1 - t),
    "IPNDM": lambda t, scheduler: 1000 * t,
}


def config_of(scheduler) -> dict:
    """The configuration of a sampler, empty if it has none."""
    return getattr(scheduler, "config", {})


def _unit(scheduler):
    """The entry of `UNITS` for a sampler, or `None`."""
    if config_of(scheduler).get("timestep_type") == "continuous":
        return UNITS["EDM"]
    if config_of(scheduler).get("sigma_data") and type(scheduler).__name__.startswith("FlowMatch"):
        return UNITS["Cosmos"]
    return next((unit for name, unit in UNITS.items() if type(scheduler).__name__.startswith(name)), None)


def training_time(timestep: float, scheduler) -> float:
    """
    A timestep of a sampler in training units: 1000 is pure noise, 0 the image.

    Raises:
        `ValueError`: the unit of the sampler's timesteps is not known.
    """
    unit = _unit(scheduler)
    if unit is not None:
        return unit(timestep, scheduler)
    steps = config_of(scheduler).get("num_train_timesteps")
    if not steps:
        raise ValueError(
            f"{type(scheduler).__name__} does not say how many training steps there are: a sampler that counts time "
            "in another unit cannot be followed."
        )
    if not -0.001 * steps <= timestep <= 1.001 * steps:
        raise ValueError(
            f"{type(scheduler).__name__} calls with timestep {timestep:.4g}, expected 0 to {steps}: a sampler that "
            "counts time in another unit cannot be followed."
        )
    time = timestep * 1000 / steps
    return 1000 - time if config_of(scheduler).get("invert_sigmas") else time


def noise_schedule(scheduler) -> torch.Tensor | None:
    """The sampler's `alphas_cumprod`; `None` for samplers of flow matching or of noise levels, some of which have
    `alphas_cumprod` but do not use it."""
    if scheduler is None or config_of(scheduler).get("prediction_type") == "flow_prediction" or _unit(scheduler):
        return None
    return getattr(scheduler, "alphas_cumprod", None)


class TimeGrid:
    """
    Computes the position of timesteps among a dictionary's anchors, by log-SNR.

    Args:
        anchors (`list[int]`): training timesteps, descending.
        alphas_cumprod (`torch.Tensor`, *optional*): of the base model's noise schedule. Without it positions are
            linear in time.
    """

    def __init__(self, anchors: list[int], alphas_cumprod: torch.Tensor | None):
        self._axis = None
        if alphas_cumprod is not None:
            alphas = alphas_cumprod.double().cpu().clamp(1e-9, 1 - 1e-9)
            self._axis = (alphas / (1 - alphas)).log().numpy()
        self._anchors = [self._position(t) for t in anchors]

    def _position(self, timestep: float) -> float:
        """Ascending from noise to image."""
        if self._axis is None:
            return -timestep
        return np.interp(timestep * len(self._axis) / 1000, np.arange(len(self._axis)), self._axis)

    def coordinate(self, timestep: float) -> float:
        """The position of a timestep among the anchors, clamped to 0 (the first) and G − 1 (the last)."""
        return float(np.interp(self._position(timestep), self._anchors, np.arange(len(self._anchors))))

    def step(self, timestep: float, size: tuple[int, int] | None = None, guidance: float | None = None) -> Step:
        """The [`Step`] at a timestep, for a site with a token grid of this `size`."""
        return Step(timestep, self.coordinate(timestep), size, guidance)
