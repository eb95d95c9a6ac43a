"""Sana's video pipelines."""

from __future__ import annotations

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaVideoTransformer3DModel,
    SanaWMTransformer3DModel,
)

from . import Ask, Built, builds, ltx2, parts, wan


def sana_text(ask: Ask, *shape: int) -> dict:
    count = len(ask.prompts)
    return {
        "prompt_embeds": parts.stacked(ask.prompts, *shape), "prompt_attention_mask": torch.ones(count, shape[-2]),
        "negative_prompt_embeds": parts.stacked((ask.negative,) * count, *shape),
        "negative_prompt_attention_mask": torch.ones(count, shape[-2]),
    }  # fmt: skip


@builds("SanaVideoPipeline", "SanaImageToVideoPipeline")
def sana_video(kind: type) -> Built:
    from_image = "ImageToVideo" in kind.__name__
    torch.manual_seed(0)
    transformer = SanaVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=32, sample_size=8, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    if from_image:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=8.0)
    else:
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        )
    pipe = kind(tokenizer=None, text_encoder=None, vae=wan.wan_vae(), transformer=transformer, scheduler=scheduler)

    def call(ask: Ask) -> dict:
        return sana_text(ask, 8, 32) | ({"image": parts.pil()} if from_image else {}) | {
            "negative_prompt": None, "height": 32, "width": 32, "frames": 5, "use_resolution_binning": False,
            "num_inference_steps": ask.steps, "guidance_scale": 4.0 if ask.guided else 1.0,
            "num_videos_per_prompt": ask.images, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, images=not from_image)  # with a picture its timesteps are one a prompt


@builds("SanaWMPipeline")
def sana_world_model(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = SanaWMTransformer3DModel(
        in_channels=8, num_layers=2, hidden_size=48, num_attention_heads=2, linear_head_dim=24, softmax_every_n=2,
        chunk_plucker_channels=6 * 2, caption_channels=32,
    ).eval()  # fmt: skip
    pipe = kind(
        tokenizer=None, text_encoder=None, vae=ltx2.ltx2_vae(), transformer=parts.randomise(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=8.0),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        return sana_text(ask._replace(prompts=ask.prompts[:1]), 1, 8, 32) | {
            "image": parts.pil(), "prompt": "", "action": "w-4", "intrinsics": [32.0, 32.0, 16.0, 16.0], "height": 32,
            "width": 32, "num_frames": 5, "num_inference_steps": ask.steps,
            "guidance_scale": 4.0 if ask.guided else 1.0, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, many=False, images=False)  # it takes one prompt and makes one video
