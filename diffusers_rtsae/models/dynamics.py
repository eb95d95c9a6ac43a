"""The linear predictor of an RTSAE: each anchor's activation, predicted from the activation at the anchor before."""

from __future__ import annotations

import torch
from torch import nn


class LinearDynamics(nn.Module):
    """
    Standardisation and linear predictors of one site, fitted by ridge regression (2605.27813, section 3).

    With `h_g` the activation at anchor `g`, `x_g = (h_g - mean_g) / scale_g` and `x_{g+1} ≈ A_g x_g`. The residuals
    are `r_0 = x_0`, `r_{g+1} = x_{g+1} - A_g x_g`, each divided by its RMS `residual_scale_g` before the autoencoder.
    With `A = 0` the dictionary encodes raw activations.

    Args:
        num_anchors (`int`): G.
        in_channels (`int`): d, the width of the site.
    """

    def __init__(self, num_anchors: int, in_channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_anchors, in_channels))
        self.register_buffer("scale", torch.ones(num_anchors))
        self.register_buffer("transition", torch.zeros(num_anchors - 1, in_channels, in_channels))
        self.register_buffer("residual_scale", torch.ones(num_anchors))

    def residuals(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalised residuals of activations `(..., g, d)` at the first g ≤ G anchors, of the same shape."""
        g = hidden_states.shape[-2]
        x = (hidden_states - self.mean[:g]) / self.scale[:g, None]
        predicted = torch.einsum("gij,...gj->...gi", self.transition[: g - 1].float(), x[..., :-1, :])
        residuals = torch.cat([x[..., :1, :], x[..., 1:, :] - predicted], dim=-2)
        return residuals / self.residual_scale[:g, None]

    def rollout(self, residuals: torch.Tensor, bias: bool = True) -> torch.Tensor:
        """
        Activations `(..., G, d)` from normalised residuals `(..., G, d)`: the inverse of `residuals`.

        Args:
            bias (`bool`, defaults to `True`): add the means. Use `False` to map directions to directions.
        """
        x = [residuals[..., 0, :] * self.residual_scale[0]]
        for g in range(1, residuals.shape[-2]):
            x.append(x[-1] @ self.transition[g - 1].float().T + residuals[..., g, :] * self.residual_scale[g])
        hidden_states = torch.stack(x, dim=-2) * self.scale[:, None]
        return hidden_states + self.mean if bias else hidden_states

    def teacher_forced(self, residuals: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Activations `(..., g, d)` from normalised `residuals`, each predicted from the true activation at the anchor
        before; `residuals` and `hidden_states` are `(..., g, d)` at the first g ≤ G anchors."""
        g = hidden_states.shape[-2]
        error = (residuals - self.residuals(hidden_states)) * self.residual_scale[:g, None] * self.scale[:g, None]
        return hidden_states + error
