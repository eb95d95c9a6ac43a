"""Stable Diffusion XL and 3, modular."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from . import Ask, Built, builds, parts, stable_diffusion_xl
from .modular import WITHOUT, assemble, guide


@builds("StableDiffusionXLModularPipeline")
def xl(kind: type) -> Built:
    pipe = assemble(kind, unet=stable_diffusion_xl.unet(), scheduler=stable_diffusion_xl.euler(), vae=parts.vae())

    def call(ask: Ask) -> dict:
        guide(pipe, ask)
        return stable_diffusion_xl.text(ask) | {
            "num_images_per_prompt": ask.images, "num_inference_steps": ask.steps, "height": 8, "width": 8,
            "generator": parts.generator(), "output": "latents",
        }  # fmt: skip

    return Built(pipe, call)


@builds("StableDiffusion3ModularPipeline")
def sd3(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    pipe = assemble(
        kind, without=(*WITHOUT, "vae_encoder"), transformer=parts.randomise(transformer.eval()),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        guide(pipe, ask)
        return parts.text(ask, 7, 32) | {
            "pooled_prompt_embeds": parts.stacked(ask.prompts, 16),
            "negative_pooled_prompt_embeds": parts.stacked((ask.negative,) * len(ask.prompts), 16),
            "num_images_per_prompt": ask.images, "num_inference_steps": ask.steps, "height": 64, "width": 64,
            "generator": parts.generator(), "output": "latents",
        }  # fmt: skip

    return Built(pipe, call)
