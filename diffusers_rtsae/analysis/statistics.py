"""How active the latents of a dictionary are: the statistics that strengths, clipping and rankings are in units of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F

from ..denoiser import get_denoiser
from ..dictionary import Dictionary, signature
from ..models import SparseDictionary
from ..pipeline import own_size
from .record import Recorder

_TOKENS = 1024  # encoded at once, where tokens do not share their latents


@torch.no_grad()
def set_statistics(sae: SparseDictionary, codes: Iterable[torch.Tensor]) -> None:
    """Set the statistics of each latent's activation from codes `(tokens, m)`."""
    columns, values, count = [], [], 0
    for latents in codes:
        at = latents.nonzero()
        columns.append(at[:, 1].cpu())
        values.append(latents[at[:, 0], at[:, 1]].cpu())
        count += len(latents)
    columns, values = torch.cat(columns), torch.cat(values)
    order = torch.argsort(values)
    order = order[torch.argsort(columns[order], stable=True)]  # by latent, each ascending
    sizes = torch.bincount(columns, minlength=sae.config.num_latents)
    values, ends = torch.cat([values[order].double(), torch.ones(1)]), sizes.cumsum(0)
    sums, starts, last = F.pad(values.cumsum(0), (1, 0)), ends - sizes, len(values) - 1  # where a 1 stands
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
    Set the statistics of a dictionary of single steps, and the scale of the activation, from what a pipeline does with
    some prompts; and note which denoiser it is for.

    Args:
        pipeline (`DiffusionPipeline`): of the model that the dictionary is for.
        prompts (`Sequence[str]`): what to generate. Their conditional activations are read, at all steps.
        call: passed to the pipeline.

    Raises:
        `ValueError`: there are no prompts, or the dictionary is of trajectories, or of another width.
    """
    if not prompts or any(sae.reads_past for sae in dictionary.sites.values()):
        raise ValueError("Statistics are measured on one prompt or more, for dictionaries of single steps.")
    seen: dict[str, list[tuple[torch.Tensor, list[float]]]] = {site: [] for site in dictionary.sites}
    kinds = {sae.config.activation for sae in dictionary.sites.values()}
    for first in range(0, len(prompts), batch_size):
        part = list(prompts[first : first + batch_size])
        for kind in kinds:
            sites = [site for site, sae in dictionary.sites.items() if sae.config.activation == kind]
            generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
            with Recorder(pipeline, sites, activation=kind, dtype=torch.float16) as recorder:
                pipeline(part, generator=generators, **own_size(pipeline) | call)
            for site in sites:
                seen[site].append((recorder.trajectories(site), list(recorder.timesteps)))
    for site, sae in dictionary.sites.items():
        width = seen[site][0][0].shape[-1]
        if width != sae.config.in_channels:
            raise ValueError(f"The dictionary of {site} is for {sae.config.in_channels} channels, not for {width}.")
        set_statistics(sae, _codes(sae, seen[site]))
        if sae.config.get("sparsity") == "threshold":
            sae.register_to_config(k=max(1, round(float(sae.density.sum()))))
        for g, anchor in enumerate(sae.config.anchors):
            at = [h[:, :, min(range(len(ts)), key=lambda i: abs(ts[i] - anchor))].float() for h, ts in seen[site]]  # noqa: B023
            tokens = torch.cat([part.flatten(0, 1) for part in at])
            sae.scale[g] = (tokens - tokens.mean(0)).square().mean().sqrt()
    dictionary.config["signature"] = signature(get_denoiser(pipeline))


def _codes(sae: SparseDictionary, seen: list[tuple[torch.Tensor, list[float]]]) -> Iterator[torch.Tensor]:
    for trajectories, timesteps in seen:
        for i, timestep in enumerate(timesteps):
            for picture in trajectories[:, :, i].float():
                for piece in [picture] if sae.shares_picture else picture.split(_TOKENS):
                    yield sae.encode_step(piece.to(sae.encoder.device), timestep)
