"""Time: from a sampler's timesteps to training units, and from these to a dictionary's anchors."""

from __future__ import annotations

import math

import torch

from ..models import Step


def _of_noise_level(sigma: float) -> float:
    """The time at which a flow-matching model meets the signal-to-noise ratio of x₀ + σ ε: 1000 σ / (1 + σ)."""
    return 1000 * sigma / (1 + sigma)


#: Samplers that do not count in training steps: beginning of the class name → training units of one of its timesteps.
UNITS = {
    "EDM": lambda t, scheduler: _of_noise_level(math.exp(4 * t)),  # told ln(σ) / 4 (2206.00364)
    "CosineDPMSolverMultistep": lambda t, scheduler: _of_noise_level(math.tan(t * math.pi / 2)),
    "CMStochasticIterative": lambda t, scheduler: _of_noise_level(math.exp(4 * t / 1000)),
    "Cosmos": lambda t, scheduler: _of_noise_level(t / 1000),  # a flow sampler that is given noise levels
    "SCM": lambda t, scheduler: _of_noise_level(math.tan(t)) if t < math.pi / 2 else 1000.0,
    "Amused": lambda t, scheduler: 1000 * (t + 1) / len(scheduler.timesteps),  # the share of tokens still masked
    "DDPMWuerstchen": lambda t, scheduler: 1000 * t,
    "ScoreSdeVe": lambda t, scheduler: 1000 * t,
    "MiniMaxH3": lambda t, scheduler: 1000 * (1 - t),
    "IPNDM": lambda t, scheduler: 1000 * t,
}


def config_of(scheduler) -> dict:
    """What a sampler says of itself."""
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
    One of a sampler's timesteps in training units: 1000 is pure noise, 0 the image.

    Raises:
        `ValueError`: a sampler that counts in a unit that is not known.
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
    """`alphas_cumprod` of the schedule that a model was trained on; `None` for flow matching and noise levels, of
    which some schedulers keep a schedule that they do not use."""
    if scheduler is None or config_of(scheduler).get("prediction_type") == "flow_prediction" or _unit(scheduler):
        return None
    return getattr(scheduler, "alphas_cumprod", None)


class TimeGrid:
    """
    Places any sampler's timesteps among a dictionary's anchors, on the log-SNR axis.

    Args:
        anchors (`list[int]`): training timesteps, descending.
        alphas_cumprod (`torch.Tensor`, *optional*): of the base model's training schedule; linear in time without it.
    """

    def __init__(self, anchors: list[int], alphas_cumprod: torch.Tensor | None):
        self._axis = None
        if alphas_cumprod is not None:
            alphas = alphas_cumprod.double().cpu().clamp(1e-9, 1 - 1e-9)
            self._axis = (alphas / (1 - alphas)).log().tolist()
        self._anchors = [self._position(t) for t in anchors]

    def _position(self, timestep: float) -> float:
        if self._axis is None:
            return -timestep
        index = min(max(timestep * len(self._axis) / 1000, 0.0), len(self._axis) - 1.0)
        low = int(index)
        high = min(low + 1, len(self._axis) - 1)
        return self._axis[low] + (index - low) * (self._axis[high] - self._axis[low])

    def coordinate(self, timestep: float) -> float:
        """Where `timestep` is in units of anchors: 0 at the first, G − 1 at the last, clamped to these."""
        position, anchors = self._position(timestep), self._anchors
        for g in range(len(anchors) - 1):
            if position < anchors[g + 1]:
                return g + max(0.0, (position - anchors[g]) / (anchors[g + 1] - anchors[g]))
        return len(anchors) - 1.0

    def step(self, timestep: float, size: tuple[int, int] | None = None, guidance: float | None = None) -> Step:
        """A step as dictionaries read it, at a site with a token grid of this `size`."""
        return Step(timestep, self.coordinate(timestep), size, guidance)
