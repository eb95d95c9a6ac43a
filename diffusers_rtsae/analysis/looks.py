"""
What can be told of a picture without a word: brightness, contrast, colours, place; and how a prediction must
change for the picture to have more of it.

The picture is the one that a prediction says the noisy latents are made of, decoded by the pipeline's VAE. That is
differentiated, so that to first order one scalar product says what any change of the prediction does to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..denoiser import noise_schedule, unmix
from .replay import ReplayableCall

#: what is measured: the name of what raises it, and of what lowers it
LOOKS = {
    "brightness": ("brighter", "darker"),
    "contrast": ("more contrast", "less contrast"),
    "saturation": ("more colourful", "greyer"),
    "warmth": ("warmer colours", "cooler colours"),
    "background": ("lighter background", "darker background"),
    "height": ("higher", "lower"),
    "side": ("further right", "further left"),
}
_FRAME = 8  # the border is one in so many rows and columns on each side
_DIFFERENT = 0.15  # distance from the border's colour at which a pixel counts half
_LEAST = 0.01  # the least unit, of a range of 1


def measure_looks(pictures: torch.Tensor) -> torch.Tensor:
    """
    Brightness, contrast, saturation, warmth, background, height and side of pictures, differentiably.

    The background is the mean colour of the border. What differs from it is the object, whose place is the centre of
    mass.

    Args:
        pictures (`torch.Tensor`): `(pictures, 1 or 3, height, width)`, from 0 to 1.

    Returns:
        `torch.Tensor`: `(pictures, 7)`, from 0 to 1 or −1 to 1, in the order of [`LOOKS`].
    """
    pictures = pictures.expand(-1, 3, -1, -1)
    height, width = pictures.shape[-2:]
    luminance = torch.einsum("nchw,c->nhw", pictures, pictures.new_tensor([0.299, 0.587, 0.114]))
    border = torch.ones(height, width, dtype=torch.bool, device=pictures.device)
    high, wide = max(1, height // _FRAME), max(1, width // _FRAME)
    border[high:-high, wide:-wide] = False
    colour = pictures[..., border].mean(-1)
    distance = (pictures - colour[..., None, None]).square().mean(1).clamp(min=1e-12).sqrt()
    mass = distance / (distance + _DIFFERENT)
    total = mass.sum((1, 2)).clamp(min=1e-6)
    up = torch.linspace(1, 0, height, device=pictures.device)
    right = torch.linspace(0, 1, width, device=pictures.device)
    return torch.stack(
        [
            luminance.mean((1, 2)),
            luminance.flatten(1).std(1),
            (pictures.amax(1) - pictures.amin(1)).mean((1, 2)),
            (pictures[:, 0] - pictures[:, 2]).mean((1, 2)),
            luminance[:, border].mean(1),
            (mass.sum(2) * up).sum(1) / total,
            (mass.sum(1) * right).sum(1) / total,
        ],
        1,
    )


def place_of(change: torch.Tensor) -> torch.Tensor | None:
    """Where changes of predictions `(rows, channels, height, width)` are: row and column of their centre of mass, from
    0 to 1, and the root mean square distance from it, `(rows, 3)`. `None` if predictions are no pictures."""
    if change.ndim != 4:
        return None
    energy = change.square().sum(1)
    energy = energy / energy.sum((1, 2), keepdim=True).clamp(min=1e-20)
    down, right = (torch.linspace(0, 1, count, device=change.device) for count in energy.shape[1:])
    rows, columns = energy.sum(2), energy.sum(1)
    row, column = rows @ down, columns @ right
    spread = rows @ down.square() - row**2 + columns @ right.square() - column**2
    return torch.stack([row, column, spread.clamp(min=0).sqrt()], 1)


class Looks:
    """
    How predictions must change for the looks of their pictures to change, to first order. Units are one standard
    deviation among the pictures.

    Args:
        pipeline (`DiffusionPipeline`): its VAE decodes pictures.
        calls (`Sequence[ReplayableCall]`): for each batch of pictures its last call of the denoiser.

    Raises:
        `_Unknown`: these predictions cannot be decoded; see `of`.
    """

    @classmethod
    def of(cls, pipeline, calls: Sequence[ReplayableCall]) -> Looks | None:
        """`None` if the predictions of these calls cannot be decoded."""
        try:
            return cls(pipeline, calls)
        except _Unknown:
            return None

    @torch.no_grad()
    def __init__(self, pipeline, calls: Sequence[ReplayableCall]):
        self._pipeline, self._schedule = pipeline, noise_schedule(pipeline.scheduler)
        seen = [self._measure(one, one.replay(range(one.rows), range(one.rows)).float()) for one in calls]
        self._units = torch.cat(seen).std(0, correction=0).clamp(min=_LEAST)

    def _measure(self, call: ReplayableCall, prediction: torch.Tensor) -> torch.Tensor:
        """The looks `(rows, 7)` of the pictures that predictions are about."""
        sample = call.arguments.sample
        if sample.ndim != 4 or sample.shape[2:] != prediction.shape[2:] or sample.shape[1] > prediction.shape[1]:
            raise _Unknown(f"latents of shape {tuple(sample.shape)} are no pictures")
        channels = sample.shape[1]  # a prediction may have more, of its variance
        scheduler = self._pipeline.scheduler
        unmixed = unmix(sample.float(), prediction[:, :channels], self._schedule, call.timestep, scheduler)
        if unmixed is None:
            raise _Unknown(f"what is predicted with {type(scheduler).__name__} is not known")
        looks = measure_looks(self._decode(unmixed[0]))
        if not bool(looks.isfinite().all()):
            raise _Unknown("the VAE decodes to NaN or inf")
        return looks

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures from 0 to 1 of latents."""
        vae = getattr(self._pipeline, "vae", None)
        if vae is not None:
            config = vae.config
            if config.get("latent_channels") != latents.shape[1]:
                raise _Unknown(f"its VAE takes {config.get('latent_channels')} channels, not {latents.shape[1]}")
            latents = latents / (config.get("scaling_factor") or 1.0)
            for name, apply in (("latents_std", torch.mul), ("latents_mean", torch.add)):
                if config.get(name) is not None:
                    latents = apply(latents, latents.new_tensor(config[name]).view(1, -1, 1, 1))
            latents = vae.decode((latents + (config.get("shift_factor") or 0.0)).to(vae.dtype), return_dict=False)[0]
        elif latents.shape[1] not in (1, 3):
            raise _Unknown(f"its latents have {latents.shape[1]} channels, and it has no VAE")
        return latents.float() / 2 + 0.5

    @torch.enable_grad()
    def gradients(self, call: ReplayableCall, prediction: torch.Tensor) -> torch.Tensor:
        """The derivatives of all looks with respect to a call's `prediction (rows, ...)`: `(7, rows, ...)`."""
        leaf = prediction.detach().requires_grad_()
        looks = (self._measure(call, leaf) / self._units).sum(0)
        return torch.stack([torch.autograd.grad(look, leaf, retain_graph=True)[0] for look in looks])


class _Unknown(Exception):
    """Why the pictures of predictions cannot be looked at."""
