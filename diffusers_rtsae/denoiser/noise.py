"""How noisy latents are mixed of a picture and noise, and which of both a prediction says they are made of."""

from __future__ import annotations

import torch


def shares(alphas_cumprod: torch.Tensor | None, timestep: float) -> tuple[float, float]:
    """
    The factors of picture and noise in the noisy latents at a timestep.

    Args:
        alphas_cumprod (`torch.Tensor`, *optional*): noise schedule of the sampler; without it, that of flow matching.
        timestep (`float`): in training units.
    """
    if alphas_cumprod is None:
        return 1 - timestep / 1000, timestep / 1000
    index = min(round(timestep * len(alphas_cumprod) / 1000), len(alphas_cumprod) - 1)
    alpha = float(alphas_cumprod[index])
    return alpha**0.5, (1 - alpha) ** 0.5


def unmix(
    noisy: torch.Tensor, prediction: torch.Tensor, alphas_cumprod: torch.Tensor | None, timestep: float, scheduler
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The picture and the noise in noisy latents, according to a prediction of the denoiser of the same shape; `None`
    if it is not known what it predicts."""
    keep, add = shares(alphas_cumprod, timestep)
    kind = scheduler.config.get("prediction_type", "epsilon")
    if alphas_cumprod is None:
        if not type(scheduler).__name__.startswith("FlowMatch") and kind != "flow_prediction":
            return None
        return noisy - add * prediction, noisy + keep * prediction
    if kind == "epsilon":
        return (noisy - add * prediction) / max(keep, 1e-4), prediction
    if kind == "v_prediction":
        return keep * noisy - add * prediction, add * noisy + keep * prediction
    if kind == "sample":
        return prediction, (noisy - keep * prediction) / max(add, 1e-4)
    return None
