"""Ovis-Image."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, OvisImageTransformer2DModel

from . import Ask, Built, builds, parts


@builds("OvisImagePipeline")
def ovis(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = kind(scheduler, parts.vae(), None, None, parts.randomise(transformer.eval()))

    def call(ask: Ask) -> dict:
        return parts.text(ask, 6, 32) | {
            "negative_prompt": None, "height": 16, "width": 16, "num_images_per_prompt": ask.images,
            "guidance_scale": 5.0 if ask.guided else 1.0, "num_inference_steps": ask.steps,
            "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
