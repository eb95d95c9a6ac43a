"""Mochi 1."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiTransformer3DModel

from . import Ask, Built, builds, parts


@builds("MochiPipeline")
def mochi(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=32, time_embed_dim=16, max_sequence_length=16,
    ).eval()  # fmt: skip
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32), decoder_block_out_channels=(32, 32, 32, 32), latent_channels=4,
        layers_per_block=(1, 1, 1, 1, 1), latents_mean=None, latents_std=None,
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipe = kind(scheduler, vae, parts.t5_text(), parts.tokenizer(), parts.randomise(transformer))

    def call(ask: Ask) -> dict:
        # words, since embeddings are not repeated for several videos
        return parts.words(ask) | {
            "height": 32, "width": 32, "num_frames": 7, "max_sequence_length": 16,
            "num_videos_per_prompt": ask.images, "guidance_scale": 4.5 if ask.guided else 1.0,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
