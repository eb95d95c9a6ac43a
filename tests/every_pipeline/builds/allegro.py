"""Allegro."""

from __future__ import annotations

import torch
from diffusers import AllegroTransformer3DModel, AutoencoderKLAllegro, EulerAncestralDiscreteScheduler

from . import Ask, Built, builds, parts


@builds("AllegroPipeline")
def allegro(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=48, sample_height=8, sample_width=8, sample_frames=3, caption_channels=32,
    ).eval()  # fmt: skip
    vae = AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 2, up_block_types=("AllegroUpBlock3D",) * 2,
        block_out_channels=(8, 8), temporal_downsample_blocks=(True, False), temporal_upsample_blocks=(False, True),
        latent_channels=4, layers_per_block=1, norm_num_groups=4, temporal_compression_ratio=2, sample_size=16,
    ).eval()  # fmt: skip
    pipe = kind(None, None, vae, parts.randomise(transformer), EulerAncestralDiscreteScheduler())

    def call(ask: Ask) -> dict:
        mask = torch.ones(len(ask.prompts), 6, dtype=torch.int64)
        return parts.text(ask, 6, 32) | {
            "negative_prompt": None, "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask,
            "height": 16, "width": 16, "num_frames": 5, "guidance_scale": 7.5 if ask.guided else 1.0,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, images=False)  # it sets the number of videos a prompt to 1
