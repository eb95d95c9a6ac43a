"""EasyAnimate."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLMagvit, EasyAnimateTransformer3DModel, FlowMatchEulerDiscreteScheduler

from . import Ask, Built, builds, parts, unbuilt

unbuilt(
    "broken in diffusers 0.42.1: it calls its own encode_prompt with an argument that it does not take",
    "EasyAnimateControlPipeline",
)


@builds("EasyAnimatePipeline", "EasyAnimateInpaintPipeline")
def easyanimate(kind: type) -> Built:
    inpaint = "Inpaint" in kind.__name__
    torch.manual_seed(0)
    transformer = EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=12 if inpaint else 4, out_channels=4,
        patch_size=2, sample_width=8, sample_height=8, num_layers=2, mmdit_layers=2, time_embed_dim=16,
        text_embed_dim=32, add_norm_text_encoder=True,
        resize_inpaint_mask_directly=False,  # it would ask the autoencoder for a setting that it hasn't
    ).eval()  # fmt: skip
    vae = AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=[8, 8], norm_num_groups=4, layers_per_block=1,
        down_block_types=["SpatialDownBlock3D", "SpatialTemporalDownBlock3D"],
        up_block_types=["SpatialUpBlock3D", "SpatialTemporalUpBlock3D"],
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipe = kind(vae, None, None, parts.randomise(transformer), scheduler)

    def call(ask: Ask) -> dict:
        count = len(ask.prompts)
        given = {}
        if inpaint:
            video = torch.rand(1, 3, 5, 16, 16, generator=parts.generator(7))
            mask = torch.zeros(count, 1, 5, 16, 16)
            mask[..., :8, :] = 1.0
            given = {"video": video.repeat(count, 1, 1, 1, 1), "mask_video": mask}
        mask = torch.ones(count, 6, dtype=torch.int64)
        return given | parts.text(ask, 6, 32) | {
            "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "height": 16, "width": 16,
            "num_frames": 5, "num_images_per_prompt": ask.images, "guidance_scale": 5.0 if ask.guided else 1.0,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, images=not inpaint)  # the masked video is not repeated for several
