"""Generate pictures from prompts and keep the trajectories of chosen sites (others say hook points or layers)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from tqdm import tqdm

from diffusers_rtsae import list_sites
from diffusers_rtsae.analysis.record import Recorder
from diffusers_rtsae.denoiser import get_denoiser, noise_schedule
from diffusers_rtsae.models import places, share_of_guidance
from diffusers_rtsae.pipeline import own_size

from ..common.memory import enough_memory
from ..common.seeds import step_generator
from ..recipe import Collect, Recipe
from .prompts import Sample
from .store import NOWHERE, TrajectoryStore, metadata_name

_REMEDY = (
    "Free the device and run the same command again, which keeps the finished shards; or lower "
    "`collect.batch_size`, after which all shards are collected again."
)


def anchor_timesteps(pipe: DiffusionPipeline, settings: Collect, anchors: int | list[int]) -> list[int]:
    """
    The timesteps to keep: a number of the sampler's, evenly spaced from the first to the last, or those listed.

    A pipeline with a noise schedule is switched to DDIM; others keep the sampler they have.
    """
    if noise_schedule(pipe.scheduler) is not None:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.scheduler.set_timesteps(settings.steps)
        timesteps = [int(t) for t in pipe.scheduler.timesteps]
    else:  # the timesteps may depend on the size of the picture: generate one
        with Recorder(pipe, list_sites(get_denoiser(pipe))[:1]) as recorder:
            call = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance(0)}
            pipe("", output_type="latent", **call, **own_size(pipe))
        timesteps = [round(t) for t in recorder.timesteps]
    if isinstance(anchors, int):
        return [timesteps[round(i * (len(timesteps) - 1) / (anchors - 1))] for i in range(anchors)]
    if unknown := [t for t in anchors if t not in timesteps]:
        raise ValueError(f"The anchors {unknown} are not among the timesteps of the sampler, {timesteps}.")
    return sorted(set(anchors), reverse=True)


@torch.no_grad()
def trajectories(
    pipe: DiffusionPipeline,
    samples: Sequence[Sample],
    first: int,
    recipe: Recipe,
    anchors: list[int],
    pictures: bool = False,
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """
    Generate a batch of pictures and keep a random choice of tokens.

    Args:
        first (`int`): index of the first sample in the whole collection.
        pictures (`bool`): also decode the pictures.

    Returns:
        the tensors of a shard (see `TrajectoryStore`), and the pictures `(batch, 3, height, width)` in [0, 1], or
        `None`.
    """
    settings, branches = recipe.collect, ("cond",) if recipe.collect.streams == "cond" else ("cond", "uncond")
    guidance = settings.guidance(first)
    generators = [torch.Generator().manual_seed(sample.seed) for sample in samples]
    recorder = Recorder(pipe, recipe.sites, anchors, recipe.activation, torch.float16, branches, device=None)
    with enough_memory(f"drawing {len(samples)} pictures", lambda: _REMEDY), recorder:
        images = pipe(
            [sample.prompt for sample in samples], generator=generators, num_inference_steps=settings.steps,
            guidance_scale=guidance, output_type="pt" if pictures else "latent", **own_size(pipe),
        ).images  # fmt: skip
    tensors, activations = {}, {}
    for site in recipe.sites:
        whole = recorder.trajectories(site)
        if whole.shape[2] != len(anchors):
            raise ValueError(
                f"Expected a sampler that visits all anchors {anchors}, got one that visits {recorder.timesteps}."
            )
        count, generator = min(settings.tokens_per_image, whole.shape[1]), step_generator(recipe.seed + 1, first)
        chosen = torch.stack(
            [torch.randperm(whole.shape[1], generator=generator)[:count].sort().values for _ in whole]
        )
        image = torch.arange(first, first + len(samples), dtype=torch.int32).repeat(len(branches))
        rows = (chosen + whole.shape[1] * torch.arange(len(whole))[:, None]).flatten()
        activations[site] = whole.flatten(0, 1)[rows.to(whole.device)]
        tensors[f"{site}/token"] = chosen.flatten().to(torch.int32)
        tensors[f"{site}/image"] = image.repeat_interleave(count)
        try:
            where = places(recorder.size(site))[chosen.flatten()]
        except ValueError:  # the tokens lie on no grid
            where = torch.full((chosen.numel(), 2), NOWHERE)
        scale = share_of_guidance(guidance).expand(chosen.numel(), 1)
        tensors[metadata_name(site)] = torch.cat([where, scale], 1)
    tensors |= on_host(activations)
    return tensors, images.float().clamp(0, 1) if pictures else None


def on_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of one dtype, copied from a device in one copy."""
    whole = torch.cat([tensor.flatten() for tensor in tensors.values()]).cpu()
    parts = whole.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensors[name].shape).clone() for name, part in zip(tensors, parts, strict=True)}


def batches(samples: Sequence[Sample], size: int) -> Iterator[tuple[int, Sequence[Sample]]]:
    """The samples of each shard, each with the index of its first sample."""
    for start in range(0, len(samples), size):
        yield start, samples[start : start + size]


def collect(
    pipe: DiffusionPipeline,
    samples: Sequence[Sample],
    recipe: Recipe,
    anchors: list[int],
    store: TrajectoryStore,
    scorer=None,
    process: tuple[int, int] = (0, 1),
) -> None:
    """
    Fill `store` with one shard for each batch of prompts. Shards that exist already are kept.

    Args:
        anchors (`list[int]`): timesteps of the sampler to keep.
        scorer (*optional*): reads the finished pictures; its readings are stored with the shard.
        process (`tuple[int, int]`): rank and number of processes; each makes its own shards.
    """
    size = recipe.collect.batch_size
    mine = [(start, part) for start, part in batches(samples, size) if start // size % process[1] == process[0]]
    missing = [(start, part) for start, part in mine if not store.check(start // size)]
    for start, part in tqdm(missing, desc="collect", unit="shard", initial=len(mine) - len(missing), total=len(mine)):
        tensors, images = trajectories(pipe, part, start, recipe, anchors, pictures=scorer is not None)
        store.write(start // size, tensors, scorer.read(images) if scorer is not None else None)
