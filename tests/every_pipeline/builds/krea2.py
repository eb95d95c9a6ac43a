"""Krea 2."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Transformer2DModel

from . import Ask, Built, builds, parts


@builds("Krea2Pipeline")
def krea2(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=32, num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=6400
    )
    transformer = parts.randomise(transformer.eval())
    pipe = kind(scheduler, vae, None, None, transformer, text_encoder_select_layers=(0, 1, 2))

    def call(ask: Ask) -> dict:
        mask = torch.ones(len(ask.prompts), 6, dtype=torch.bool)
        return parts.text(ask, 6, 3, 16) | {
            "prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask, "height": 16, "width": 16,
            "num_images_per_prompt": ask.images, "guidance_scale": 3.5 if ask.guided else 0.0,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
