"""Generate pictures from prompts and keep the trajectories of chosen sites."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from tqdm import tqdm

from diffusers_rtsae.analysis.record import Recorder

from .checkpoint import step_generator
from .store import TrajectoryStore


def anchor_timesteps(pipe: DiffusionPipeline, steps: int, anchors: int) -> list[int]:
    """`anchors` of the DDIM sampler's `steps` timesteps, evenly spaced, first and last included."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(steps)
    timesteps = [int(t) for t in pipe.scheduler.timesteps]
    return [timesteps[round(i * (steps - 1) / (anchors - 1))] for i in range(anchors)]


@torch.no_grad()
def collect(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    sites: list[str],
    anchors: list[int],
    store: TrajectoryStore,
    settings: dict,
    seed: int,
    scorer=None,
) -> None:
    """
    Fill `store` with one shard per batch of prompts; shards that are there already are kept.

    Args:
        anchors (`list[int]`): timesteps of the sampler to keep.
        settings (`dict`): `steps`, `guidance_scale`, `batch_size` (prompts a shard), `tokens_per_image`.
        scorer (*optional*): its readings of the finished images are stored with the shard.
    """
    config, size = pipe.unet.config, settings["batch_size"]
    starts = range(0, len(prompts), size)
    missing = [start for start in starts if not store.check(start // size)]
    progress = tqdm(missing, desc="collect", unit="shard", initial=len(starts) - len(missing), total=len(starts))
    for start in progress:
        part = range(start, min(start + size, len(prompts)))
        latents = [
            torch.randn(
                (config.in_channels, config.sample_size, config.sample_size), generator=step_generator(seed, i)
            )
            for i in part
        ]
        with Recorder(pipe, sites, anchors, dtype=torch.float16) as recorder:
            images = pipe(
                [prompts[i] for i in part], latents=torch.stack(latents).to(pipe.device, pipe.unet.dtype),
                num_inference_steps=settings["steps"], guidance_scale=settings["guidance_scale"], output_type="pt",
            ).images  # fmt: skip
        tensors = {}
        for site in sites:
            trajectories = recorder.trajectories(site)
            if trajectories.shape[2] != len(anchors):
                raise ValueError(f"The sampler visited {recorder.timesteps}, not all anchors {anchors}.")
            count = trajectories.shape[1]
            kept = min(settings["tokens_per_image"], count)
            generator = step_generator(seed + 1, start)
            chosen = torch.stack([torch.randperm(count, generator=generator)[:kept].sort().values for _ in part])
            tensors[site] = torch.stack([t[c] for t, c in zip(trajectories, chosen, strict=True)]).flatten(0, 1)
            tensors[f"{site}/token"] = chosen.flatten().to(torch.int32)
            tensors[f"{site}/image"] = torch.tensor(list(part), dtype=torch.int32).repeat_interleave(kept)
        readings = scorer.read(images.float().clamp(0, 1)) if scorer is not None else None
        store.write(start // size, tensors, readings)


def read_prompts(source: str, count: int, seed: int) -> list[str]:
    """Prompts of a recipe: `"shapes"`, the captions of the bundled world, or the path of a text file, one a line."""
    if source == "shapes":
        from .shapes.captions import captions
        from .shapes.scenes import sample_scenes

        return captions(sample_scenes(count, seed=40_000_000 + seed, held_out=False), seed)
    with open(source) as file:
        prompts = [line.strip() for line in file if line.strip()]
    if not prompts:
        raise ValueError(f"{source} holds no prompts: expected one a line.")
    random.Random(seed).shuffle(prompts)
    return prompts[:count]
