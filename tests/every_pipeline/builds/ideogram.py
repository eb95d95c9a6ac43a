"""Ideogram 4."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Ideogram4Transformer2DModel

from . import Ask, Built, builds, parts


def denoiser(seed: int) -> Ideogram4Transformer2DModel:
    torch.manual_seed(seed)
    transformer = Ideogram4Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, intermediate_size=64,
        adaln_dim=16, llm_features_dim=13 * 16, mrope_section=(4, 2, 2),
    )  # fmt: skip
    return parts.randomise(transformer.eval())


@builds("Ideogram4Pipeline")
def ideogram4(kind: type) -> Built:
    # it reads layers up to the 36th
    text_encoder = parts.qwen3_vl_text(16, layers=36, heads=2).model
    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=16,
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = kind(scheduler, vae, text_encoder, parts.vision_tokenizer(), denoiser(0), denoiser(1))

    def call(ask: Ask) -> dict:
        return {
            "prompt": [parts.prompt(seed) for seed in ask.prompts], "height": 32, "width": 32,
            "max_sequence_length": 24, "num_images_per_prompt": ask.images,
            "guidance_schedule": (7.0 if ask.guided else 1.0,) * ask.steps, "num_inference_steps": ask.steps,
            "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, negative=False)
