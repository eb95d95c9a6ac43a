"""Nucleus-Image, a mixture of experts."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    NucleusMoEImageTransformer2DModel,
)

from . import Ask, Built, builds, parts


@builds("NucleusMoEImagePipeline")
def nucleus(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = NucleusMoEImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=5, attention_head_dim=16, num_attention_heads=4,
        num_key_value_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6), num_experts=4,
        moe_intermediate_dim=32, capacity_factors=2.0,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ".experts." in name:  # made empty
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = kind(parts.randomise(transformer.eval()), scheduler, vae, None, None)

    def call(ask: Ask) -> dict:
        mask = torch.ones(len(ask.prompts), 6, dtype=torch.int64)
        return parts.text(ask, 6, 32) | {
            "prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask, "height": 16, "width": 16,
            "num_images_per_prompt": ask.images, "guidance_scale": 4.0 if ask.guided else 1.0,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
