"""What a run would take: shapes, bytes, steps, hours, from the model's configuration alone. Nothing is generated.

python -m training.train training/recipes/sd15.yaml --dry-run
"""

from __future__ import annotations

import statistics
from pathlib import Path

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusers_rtsae.denoiser import Tap
from diffusers_rtsae.dictionary import is_cached

from .data.sequences import read_folder
from .recipe import INDEX, Recipe, Train, bundled
from .registry import KINDS

GIB, PETA = 2**30, 1e15


def _denoiser(pipeline: str):
    """The denoiser of a pipeline on the meta device, built from its configuration; `(module, config)`."""
    pipeline = bundled(pipeline)
    local = Path(pipeline).is_dir() or not is_cached(pipeline, INDEX)
    cached = {} if local else {"local_files_only": True}
    index = diffusers.DiffusionPipeline.load_config(pipeline, **cached)
    part = next((name for name in ("unet", "transformer") if name in index), None)
    if part is None:
        raise ValueError(f"{pipeline} has no denoiser: expected a component `unet` or `transformer`.")
    kind = getattr(diffusers, index[part][1])
    config = kind.load_config(pipeline, subfolder=part, **cached)
    with torch.device("meta"):
        return kind.from_config(config), dict(config)


def _inputs(config: dict) -> dict[str, torch.Tensor]:
    """One row of a U-Net's arguments on the meta device."""
    if "cross_attention_dim" not in config or "block_out_channels" not in config:
        raise ValueError("A dry run knows U-Nets only; collect a few prompts to learn the shapes of other denoisers.")
    size, text = config["sample_size"], config["cross_attention_dim"]
    size, text = size if isinstance(size, list | tuple) else (size, size), text[0] if isinstance(text, list) else text
    inputs = {
        "sample": torch.empty(1, config["in_channels"], *size, device="meta"),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.empty(1, 77, text, device="meta"),
    }
    if config.get("addition_embed_type") == "text_time":
        times = 6
        pooled = config["projection_class_embeddings_input_dim"] - times * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.empty(1, pooled, device="meta"),
            "time_ids": torch.empty(1, times, device="meta"),
        }
    return inputs


class _Shapes:
    """Records the number of tokens and channels at sites."""

    def __init__(self):
        self.by_site, self.tap = {}, Tap(self)

    def begin(self, call, arguments) -> None:
        """The denoiser is called."""

    def site(self, name: str, call, block, block_input: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """A site was run."""
        self.by_site[name] = tuple(block.to_tokens(hidden_states).shape[1:])


def _site(train: Train, trajectories: int, anchors: int, channels: int) -> dict:
    """The size of a site's trajectories and of its dictionary, and the memory that training takes."""
    width, whole = anchors * channels, KINDS[train.kind].of_trajectories
    weights = 2 * train.num_latents * (width if whole else channels)
    return {
        "channels": channels, "trajectories": trajectories,
        "trajectories_gib": round(trajectories * width * 2 / GIB, 2),
        "dictionary_gib": round((weights + (anchors - 1) * channels**2 * whole) * 2 / GIB, 3),
        "training_memory_gib": round(weights * 16 / GIB, 2),
    }  # fmt: skip


def _operations(train: Train, width: int) -> float:
    """Operations of a training: the encoder's forward product; decoding and gradients touch k latents of m."""
    return train.steps * train.batch_size * 2 * train.num_latents * width * (1 + 6 * train.k / train.num_latents)


def _of_sequences(recipe: Recipe, teraflops: float) -> dict:
    """The plan of a run on trajectories that exist."""
    sites, training, train = {}, 0.0, recipe.train
    for name, parts in read_folder(recipe.trajectories, recipe.sites).parts.items():
        anchors, channels = parts[0].shape[-2:]
        count = sum(part[..., 0, 0].numel() for part in parts)
        sites[name] = _site(train, count, anchors, channels)
        sites[name]["trajectories_gib"] = round(sum(part.nbytes for part in parts) / GIB, 2)
        training += max(1, len(recipe.variants)) * _operations(train, anchors * channels)
    return {
        "sites": sites, "anchors": anchors, "stored": "on disk", "training_petaflop": round(training / PETA, 1),
        "training_hours": round(training / teraflops / 1e12 / 3600, 2), "steps": train.steps,
    }  # fmt: skip


def plan(recipe: Recipe, teraflops: float) -> dict:
    """
    Args:
        teraflops (`float`): speed of the device, in 1e12 operations a second.

    Returns:
        `dict`: for each site its tokens and channels, how many tokens of a picture are kept, the size of the
        trajectories on disk (or in memory, if streaming) and of the dictionary, and the memory that training takes;
        and hours of computation. Of trajectories that exist, nothing about tokens and pictures.

    Raises:
        `ValueError`: if the pipeline has no denoiser, or the denoiser has no such site; or if the trajectories are
            none.
    """
    if recipe.trajectories is not None:
        return _of_sequences(recipe, teraflops)
    collect, train = recipe.collect, recipe.train
    anchors = recipe.anchors if isinstance(recipe.anchors, int) else len(recipe.anchors)
    denoiser, config = _denoiser(recipe.pipeline)
    shapes = _Shapes()
    with (
        FlopCounterMode(display=False) as counter, torch.no_grad(), shapes.tap.watching({"": denoiser}, recipe.sites)
    ):  # fmt: skip
        denoiser(**_inputs(config))
    branches = statistics.mean(1 + (scale > 1) for scale in collect.scales)
    generating = counter.get_total_flops() * branches * collect.count * collect.steps
    sites, training = {}, 0.0
    for site, (tokens, channels) in shapes.by_site.items():
        kept = min(collect.tokens_per_image, tokens) * (2 if collect.streams == "both" else 1)
        count = kept * (collect.buffer and collect.buffer // kept or collect.count)
        sites[site] = {"tokens": tokens, "kept_tokens": kept} | _site(train, count, anchors, channels)
        training += _operations(train, anchors * channels)
    variants = max(1, len(recipe.variants))
    return {
        "sites": sites,
        "anchors": anchors,
        "stored": "in memory" if collect.buffer else "on disk",
        "generation_petaflop": round(generating / PETA, 1),
        "training_petaflop": round(training * variants / PETA, 1),
        "generation_hours": round(generating / teraflops / 1e12 / 3600, 2),
        "training_hours": round(training * variants / teraflops / 1e12 / 3600, 2),
        "pictures": collect.count,
        "steps": train.steps,
    }


def describe(run: dict, teraflops: float) -> str:
    """The plan in words."""
    lines = []
    for site, s in run["sites"].items():
        if "pictures" in run:
            made = (
                f"{s['tokens']} tokens x {s['channels']} channels; {s['kept_tokens']} tokens a picture at "
                f"{run['anchors']} anchors make {s['trajectories']:,} trajectories"
            )
        else:
            made = f"{s['trajectories']:,} trajectories of {run['anchors']} steps x {s['channels']} channels"
        lines.append(
            f"{site}: {made}, {s['trajectories_gib']} GiB {run['stored']}; dictionary {s['dictionary_gib']} GiB "
            f"(float16), {s['training_memory_gib']} GiB while it trains"
        )
    if "pictures" in run:
        lines.append(
            f"{run['pictures']:,} pictures: {run['generation_petaflop']} petaflop, {run['generation_hours']} h at "
            f"{teraflops:g} teraflop/s"
        )
    lines.append(
        f"{run['steps']:,} training steps: {run['training_petaflop']} petaflop, {run['training_hours']} h at "
        f"{teraflops:g} teraflop/s"
    )
    return "\n".join(lines)
