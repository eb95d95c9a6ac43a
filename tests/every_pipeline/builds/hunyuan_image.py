"""HunyuanImage 2.1 and its refiner."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanImageRefiner,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImageTransformer2DModel,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance

from . import Ask, Built, builds, parts

SIZES = {
    "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "num_single_layers": 2,
    "num_refiner_layers": 1, "text_embed_dim": 32,
}  # fmt: skip


def texts(seeds: tuple[int, ...], prefix: str = "", second: bool = False) -> dict:
    given = {
        f"{prefix}prompt_embeds": parts.stacked(seeds, 6, 32),
        f"{prefix}prompt_embeds_mask": torch.ones(len(seeds), 6, dtype=torch.int64),
    }
    if second:
        given[f"{prefix}prompt_embeds_2"] = parts.stacked(seeds, 5, 24)
        given[f"{prefix}prompt_embeds_mask_2"] = torch.ones(len(seeds), 5, dtype=torch.int64)
    return given


@builds("HunyuanImagePipeline")
def hunyuan_image(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, patch_size=(1, 1), rope_axes_dim=(4, 4), text_embed_2_dim=24, **SIZES
    ).eval()
    vae = AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        spatial_compression_ratio=2, sample_size=16, scaling_factor=0.75289,
    ).eval()  # fmt: skip
    pipe = kind(
        FlowMatchEulerDiscreteScheduler(shift=5.0), vae, None, None, None, None, transformer,
        guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        pipe.guider.enable() if ask.guided else pipe.guider.disable()
        negative = texts((ask.negative,) * len(ask.prompts), "negative_", second=True)
        return texts(ask.prompts, second=True) | negative | {
            "height": 16, "width": 16, "num_images_per_prompt": ask.images, "num_inference_steps": ask.steps,
            "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)


@builds("HunyuanImageRefinerPipeline")
def hunyuan_refiner(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = HunyuanImageTransformer2DModel(
        in_channels=8, out_channels=4, patch_size=(1, 1, 1), rope_axes_dim=(2, 2, 4), guidance_embeds=True, **SIZES
    ).eval()
    vae = AutoencoderKLHunyuanImageRefiner(
        in_channels=3, out_channels=3, latent_channels=2, block_out_channels=(16, 16), layers_per_block=1,
        spatial_compression_ratio=2, temporal_compression_ratio=2,
    ).eval()  # fmt: skip
    pipe = kind(
        FlowMatchEulerDiscreteScheduler(shift=4.0), vae, None, None, transformer,
        guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=1),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        pipe.guider.enable() if ask.guided else pipe.guider.disable()
        return texts(ask.prompts) | texts((ask.negative,) * len(ask.prompts), "negative_") | {
            "image": parts.pil(16), "height": 16, "width": 16, "num_images_per_prompt": ask.images,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
