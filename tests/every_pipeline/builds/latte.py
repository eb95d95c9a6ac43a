"""Latte."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, LatteTransformer3DModel

from . import Ask, Built, builds, parts


@builds("LattePipeline")
def latte(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, patch_size=2,
        cross_attention_dim=24, attention_bias=True, sample_size=8, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        caption_channels=32, video_length=2,
    ).eval()  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    pipe = kind(None, None, parts.vae(), parts.randomise(transformer), scheduler)

    def call(ask: Ask) -> dict:
        return parts.text(ask, 6, 32) | {
            "negative_prompt": None, "height": 8, "width": 8, "video_length": 2, "num_images_per_prompt": ask.images,
            "guidance_scale": 7.5 if ask.guided else 1.0, "num_inference_steps": ask.steps,
            "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
