"""Fit the linear dynamics of a site from streamed second moments."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from diffusers_rtsae.models import LinearDynamics


class Moments:
    """Sums over trajectories in float64: count, means, and second moments within and between neighbouring anchors."""

    def __init__(self, num_anchors: int, in_channels: int):
        self.count = 0
        self.sum = torch.zeros(num_anchors, in_channels, dtype=torch.float64)
        self.within = torch.zeros(num_anchors, in_channels, in_channels, dtype=torch.float64)
        self.between = torch.zeros(num_anchors - 1, in_channels, in_channels, dtype=torch.float64)

    def add(self, trajectories: torch.Tensor) -> None:
        """Add `(tokens, G, d)`."""
        h = trajectories.double()
        self.count += len(h)
        self.sum += h.sum(0)
        self.within += torch.einsum("ngi,ngj->gij", h, h)
        self.between += torch.einsum("ngi,ngj->gij", h[:, 1:], h[:, :-1])

    def standardised(self, mean: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Second moments of `(h - mean) / scale`: within `(G, d, d)` and between `(G - 1, d, d)`."""
        average = self.sum / self.count

        def centred(moment, left, right):
            cross = torch.einsum("gi,gj->gij", average[left], mean[right]) + torch.einsum(
                "gi,gj->gij", mean[left], average[right]
            )
            return (moment / self.count - cross + torch.einsum("gi,gj->gij", mean[left], mean[right])) / (
                scale[left] * scale[right]
            )[:, None, None]

        everything, later, earlier = slice(None), slice(1, None), slice(None, -1)
        return centred(self.within, everything, everything), centred(self.between, later, earlier)


def fit_dynamics(
    shards: Iterable[torch.Tensor], validation: Iterable[torch.Tensor], ridge: float, residualize: bool = True
) -> tuple[LinearDynamics, dict]:
    """
    Ridge regression of each anchor's standardised activation on the one before (2605.27813, section 3.1).

    Args:
        shards: trajectories `(tokens, G, d)` to fit to.
        validation: trajectories on which R² is measured.
        ridge (`float`): λ relative to the mean eigenvalue of the Gram matrix.
        residualize (`bool`): if false, A = 0, for a dictionary of raw activations.

    Returns:
        the dynamics, and `{"r2": [...]}`, the share of variance predicted at each anchor after the first.

    Raises:
        `ValueError`: there are no trajectories, or all are the same at one of their steps.
    """
    moments = held_out = None
    for trajectories in shards:
        moments = moments or Moments(*trajectories.shape[1:])
        moments.add(trajectories)
    for trajectories in validation:
        held_out = held_out or Moments(*trajectories.shape[1:])
        held_out.add(trajectories)
    if moments is None or held_out is None:
        raise ValueError("There are no trajectories to fit: collect at least two shards first.")
    num_anchors, in_channels = moments.sum.shape
    mean = moments.sum / moments.count
    square = torch.diagonal(moments.within, dim1=1, dim2=2).sum(1) / moments.count
    variance = square - mean.square().sum(1)
    same = (variance <= 1e-12 * square).nonzero().flatten().tolist()
    if same:
        raise ValueError(f"Expected trajectories that differ at every step, got the same in all at step {same[0]}.")
    scale = (variance / in_channels).sqrt()
    within, between = moments.standardised(mean, scale)
    dynamics = LinearDynamics(num_anchors, in_channels)
    transition = torch.zeros_like(between)
    if residualize:
        for g in range(num_anchors - 1):
            eigenvalue = within[g].trace() / in_channels
            gram = within[g] + ridge * eigenvalue * torch.eye(in_channels, dtype=torch.float64)
            transition[g] = torch.linalg.solve(gram, between[g].T).T
    # rounded as it will be stored, so that residuals are those of the saved dictionary
    transition = transition.half().double()
    error = _errors(within, between, transition)
    total, left = held_out.standardised(mean, scale)
    r2 = 1 - _errors(total, left, transition)[1:] / torch.diagonal(total, dim1=1, dim2=2).sum(1)[1:]
    for name, value in (
        ("mean", mean),
        ("scale", scale),
        ("transition", transition),
        ("residual_scale", (error / in_channels).sqrt()),
    ):
        getattr(dynamics, name).copy_(value)
    return dynamics, {"r2": [round(v, 4) for v in r2.tolist()]}


def _errors(within: torch.Tensor, between: torch.Tensor, transition: torch.Tensor) -> torch.Tensor:
    """Mean squared norm of the residuals at each anchor, from the moments."""
    squares = torch.diagonal(within, dim1=1, dim2=2).sum(1)
    for g, a in enumerate(transition):
        squares[g + 1] += ((a @ within[g]) * a).sum() - 2 * (a * between[g]).sum()
    return squares
