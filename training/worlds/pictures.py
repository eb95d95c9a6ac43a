"""Generate the pictures of a world, and parse the arguments that all measurements of them share."""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from PIL import Image

from diffusers_rtsae.analysis.scorer import FactorScorer
from diffusers_rtsae.denoiser import get_denoiser, noise_schedule
from diffusers_rtsae.pipeline import own_size

from . import World, load_world, worlds


def new_parser(description: str, world: str | None = None) -> argparse.ArgumentParser:
    """A parser with arguments for the world (unless it is given) and for generating its pictures. The world's own
    values are the defaults of `pipeline`, `scorer`, `dictionary`, `steps` and `guidance` (see `parse`)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if world:
        parser.set_defaults(world=world)
    else:
        parser.add_argument("--world", choices=worlds(), default="shapes")
    parser.add_argument("--steps", type=int, help="of denoising")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the pipeline")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def add_models(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add arguments for the paths of some of a world's models."""
    for name in names:
        parser.add_argument(f"--{name}", type=Path)


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, World]:
    """The arguments, completed by the world's own values, and the world."""
    a = parser.parse_args()
    world = load_world(a.world)
    for name in ("pipeline", "scorer", "dictionary", "steps", "guidance"):
        if getattr(a, name, 0) is None:
            setattr(a, name, getattr(world, name))
    return a, world


def load_models(a: argparse.Namespace) -> tuple[DiffusionPipeline, FactorScorer]:
    """The pipeline and the scorer that the arguments name."""
    return load_pipeline(a.pipeline, a.device, a.dtype), FactorScorer.from_pretrained(a.scorer).to(a.device)


def load_pipeline(folder: Path | str, device: str, dtype: str = "float32") -> DiffusionPipeline:
    """A pipeline; models trained on a noise schedule sample with DDIM, others with the sampler they have."""
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    if noise_schedule(pipe.scheduler) is not None:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def fixed_noise(pipe: DiffusionPipeline, seeds: Sequence[int]) -> torch.Tensor:
    """Initial latents `(images, channels, height, width)`, one seed an image, the same on every device."""
    denoiser = get_denoiser(pipe)
    shape = (denoiser.config.in_channels, denoiser.config.sample_size, denoiser.config.sample_size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise).to(pipe.device, denoiser.dtype)


def short(pipe: DiffusionPipeline) -> dict[str, int]:
    """An argument that shortens prompts for PixArt, which pads them to 120 tokens and masks the rest. That takes half
    of the time of so small a model, and no prompt of a world has more than 24 tokens."""
    known = inspect.signature(pipe.__call__).parameters
    return {"max_sequence_length": 24} if "max_sequence_length" in known else {}


def calling(pipe: DiffusionPipeline, a: argparse.Namespace) -> dict[str, int | float]:
    """Keyword arguments for calling a pipeline as the arguments say."""
    return {"num_inference_steps": a.steps, "guidance_scale": a.guidance} | short(pipe)


def generate(
    pipe: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float
) -> torch.Tensor:
    """Images `(prompts, 3, height, width)` in [0, 1] on the CPU, one seed an image."""
    images = pipe(
        list(prompts),
        latents=fixed_noise(pipe, seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],  # of samplers that draw noise on the way
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="pt",
        **own_size(pipe),
        **short(pipe),
    ).images
    return images.float().cpu().clamp(0, 1)


def contact_sheet(images: torch.Tensor, columns: int, scale: int = 2) -> Image.Image:
    """Tile images `(n, 3, h, w)` into one picture."""
    n, c, h, w = images.shape
    rows = math.ceil(n / columns)
    sheet = torch.ones(rows * columns, c, h + 2, w + 2)
    sheet[:n, :, 1:-1, 1:-1] = images
    sheet = sheet.reshape(rows, columns, c, h + 2, w + 2).permute(2, 0, 3, 1, 4).reshape(c, rows * (h + 2), -1)
    picture = Image.fromarray((sheet.permute(1, 2, 0) * 255).round().byte().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
