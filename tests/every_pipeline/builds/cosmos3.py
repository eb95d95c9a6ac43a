"""Cosmos 3."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, Cosmos3OmniTransformer, UniPCMultistepScheduler

from . import Ask, Built, builds, parts


@builds("Cosmos3OmniPipeline")
def cosmos3(kind: type) -> Built:
    tokenizer = parts.vision_tokenizer()
    torch.manual_seed(0)
    transformer = Cosmos3OmniTransformer(
        dtype="float32", head_dim=16, hidden_size=32, intermediate_size=64, latent_channel=4, latent_patch_size=2,
        num_attention_heads=2, num_hidden_layers=2, num_key_value_heads=1, patch_latent_dim=16,
        vocab_size=len(tokenizer), rope_axes_dim=[4, 2, 2],
    ).eval()  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scale_factor_temporal=4, scale_factor_spatial=4,
    ).eval()  # fmt: skip
    scheduler = UniPCMultistepScheduler(
        use_karras_sigmas=True, use_flow_sigmas=True, prediction_type="flow_prediction", sigma_max=200.0,
        sigma_min=0.147,
    )  # fmt: skip
    pipe = kind(parts.randomise(transformer), tokenizer, vae, scheduler, enable_safety_checker=False)

    def call(ask: Ask) -> dict:
        return {
            "prompt": parts.prompt(ask.prompts[0]), "negative_prompt": parts.prompt(ask.negative), "num_frames": 5,
            "height": 32, "width": 32, "guidance_scale": 6.0 if ask.guided else 1.0,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, many=False, images=False)
