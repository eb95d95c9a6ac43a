"""LEDITS++: edits of a picture that is inverted first; one group of rows without a text, then one for each edit."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler

from . import Ask, Built, builds, parts, stable_diffusion_xl
from .stable_diffusion import BETAS, UNCHECKED, WIDTH


def inverted(pipe, steps: int) -> dict[str, Any]:
    """What `invert` leaves in the pipeline."""
    pipe.invert(parts.pil(32), num_inversion_steps=steps, generator=parts.generator())
    return {name: getattr(pipe, name) for name in ("inversion_steps", "init_latents", "zs")}


def edits(pipe) -> Built:
    """
    Every edit is of the same picture, so that several prompts do not give several pictures, and without one there is
    no text. The picture is inverted here, without what is loaded into the pipeline later.
    """
    with torch.no_grad():
        known = {steps: inverted(pipe, steps) for steps in (1, 3, 4, 2)}

    def call(ask: Ask) -> dict:
        if ask.steps not in known:
            known[ask.steps] = inverted(pipe, ask.steps)
        for name, value in known[ask.steps].items():
            setattr(pipe, name, value)
        pipe.scheduler.set_timesteps(int(1.15 * ask.steps))
        return {
            "editing_prompt": [parts.prompt(seed) for seed in ask.prompts], "edit_guidance_scale": 10.0,
            "negative_prompt": parts.prompt(ask.negative), "edit_threshold": 0.75, "output_type": "latent",
            "generator": parts.generator(),
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, many=False, images=False, guided=False)


def scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="sde-dpmsolver++", solver_order=2, steps_offset=1, timestep_spacing="leading"
    )


#: a fourth of the size, of which the masks are again a fourth, where there has to be attention
SMALLER = {
    "block_out_channels": [8, 8, 8], "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}  # fmt: skip


@builds("LEditsPPPipelineStableDiffusion")
def edited(kind: type) -> Built:
    unet = parts.sd_unet(
        block_out_channels=(16, 16, 32), down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
    )  # fmt: skip
    text = {"text_encoder": parts.clip_text(WIDTH), "tokenizer": parts.tokenizer()}
    return edits(kind(vae=parts.vae(**SMALLER), unet=unet, scheduler=scheduler(), **text, **UNCHECKED))


@builds("LEditsPPPipelineStableDiffusionXL")
def edited_xl(kind: type) -> Built:
    text = {
        "text_encoder": parts.clip_text(16), "text_encoder_2": parts.clip_text(32, projection=True),
        "tokenizer": parts.tokenizer(), "tokenizer_2": parts.tokenizer(),
    }  # fmt: skip
    unet = stable_diffusion_xl.unet()
    return edits(kind(vae=parts.vae(**SMALLER), unet=unet, scheduler=scheduler(), **text, add_watermarker=False))
