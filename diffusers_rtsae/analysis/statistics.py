"""Statistics of how active the latents of a dictionary are. Strengths, clipping and rankings are in their units."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F

from ..denoiser import get_denoiser
from ..dictionary import Dictionary, signature
from ..models import SparseDictionary
from ..pipeline import own_size
from .record import Recorder

_TOKENS = 1024  # encoded at once, unless the sparsity rule ranks all tokens of a picture together


@torch.no_grad()
def set_statistics(sae: SparseDictionary, codes: Iterable[torch.Tensor]) -> None:
    """Set `density`, `mean_activation`, `typical_activation` and `max_activation` of each latent from codes
    `(tokens, m)`."""
    columns, values, count = [], [], 0
    for latents in codes:
        at = latents.nonzero()
        columns.append(at[:, 1].cpu())
        values.append(latents[at[:, 0], at[:, 1]].cpu())
        count += len(latents)
    columns, values = torch.cat(columns), torch.cat(values)
    order = torch.argsort(values)
    order = order[torch.argsort(columns[order], stable=True)]  # by latent, then ascending
    sizes = torch.bincount(columns, minlength=sae.config.num_latents)
    values, ends = torch.cat([values[order].double(), torch.ones(1)]), sizes.cumsum(0)
    sums, starts, last = F.pad(values.cumsum(0), (1, 0)), ends - sizes, len(values) - 1  # `last` holds 1
    sae.density.copy_(sizes / count)
    sae.mean_activation.copy_((sums[ends] - sums[starts]) / count)
    place = 0.99 * (sizes - 1).double()  # linear between neighbours
    lower, upper = (values[torch.where(sizes > 0, starts + at.long(), last)] for at in (place.floor(), place.ceil()))
    sae.typical_activation.copy_(lower.lerp(upper, place % 1))
    sae.max_activation.copy_(values[torch.where(sizes > 0, ends - 1, last)])


@torch.no_grad()
def measure(
    pipeline, dictionary: Dictionary, prompts: Sequence[str], batch_size: int = 4, seed: int = 0, **call
) -> None:
    """
    Generate pictures and set the statistics of a dictionary of single steps, the scale of its activations and the
    signature of its denoiser.

    Args:
        pipeline (`DiffusionPipeline`): of the model that the dictionary was trained for.
        dictionary (`Dictionary`): changed in place.
        prompts (`Sequence[str]`): to generate. The conditional branch is read at all steps.
        batch_size (`int`): pictures drawn at once.
        seed (`int`): of the first picture's noise; the others count up.
        call: passed to the pipeline.

    Raises:
        `ValueError`: there are no prompts, or the dictionary reads trajectories or has another width than the model.
    """
    if not prompts or any(sae.reads_past for sae in dictionary.sites.values()):
        raise ValueError("Statistics need at least one prompt, and a dictionary that reads single steps.")
    recorded: dict[str, list[tuple[torch.Tensor, list[float]]]] = {site: [] for site in dictionary.sites}
    activations = {sae.config.activation for sae in dictionary.sites.values()}
    for first in range(0, len(prompts), batch_size):
        part = list(prompts[first : first + batch_size])
        for activation in activations:
            sites = [site for site, sae in dictionary.sites.items() if sae.config.activation == activation]
            generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
            with Recorder(pipeline, sites, activation=activation, dtype=torch.float16) as recorder:
                pipeline(part, generator=generators, **own_size(pipeline) | call)
            for site in sites:
                recorded[site].append((recorder.trajectories(site), list(recorder.timesteps)))
    for site, sae in dictionary.sites.items():
        width = recorded[site][0][0].shape[-1]
        if width != sae.config.in_channels:
            raise ValueError(
                f"The dictionary of {site} is for {sae.config.in_channels} channels, the model has {width} there."
            )
        set_statistics(sae, _codes(sae, recorded[site]))
        if sae.config.get("sparsity") == "threshold":
            sae.register_to_config(k=max(1, round(float(sae.density.sum()))))
        for g, anchor in enumerate(sae.config.anchors):
            at = [h[:, :, min(range(len(ts)), key=lambda i: abs(ts[i] - anchor))].float() for h, ts in recorded[site]]  # noqa: B023
            tokens = torch.cat([part.flatten(0, 1) for part in at])
            sae.scale[g] = (tokens - tokens.mean(0)).square().mean().sqrt()
    dictionary.config["signature"] = signature(get_denoiser(pipeline))


def _codes(sae: SparseDictionary, recorded: list[tuple[torch.Tensor, list[float]]]) -> Iterator[torch.Tensor]:
    for trajectories, timesteps in recorded:
        for i, timestep in enumerate(timesteps):
            for picture in trajectories[:, :, i].float():
                for piece in [picture] if sae.shares_picture else picture.split(_TOKENS):
                    yield sae.encode_step(piece.to(sae.encoder.device), timestep)
