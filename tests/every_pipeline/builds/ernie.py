"""ERNIE-Image."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLFlux2, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler

from . import Ask, Built, builds, parts


@builds("ErnieImagePipeline")
def ernie(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=64, in_channels=16, out_channels=16,
        text_in_dim=24, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=16,
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=4.0)
    pipe = kind(parts.randomise(transformer.eval()), vae, None, None, scheduler)

    def call(ask: Ask) -> dict:
        return {
            "prompt_embeds": [parts.embeddings(seed, 6, 24) for seed in ask.prompts],
            "negative_prompt_embeds": [parts.embeddings(ask.negative, 4, 24)] * len(ask.prompts),
            "height": 32, "width": 32, "num_images_per_prompt": ask.images,
            "guidance_scale": 4.0 if ask.guided else 1.0, "num_inference_steps": ask.steps,
            "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
