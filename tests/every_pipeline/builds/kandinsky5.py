"""Kandinsky 5."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel

from . import Ask, Built, builds, parts


@builds("Kandinsky5T2VPipeline", "Kandinsky5I2VPipeline", "Kandinsky5T2IPipeline", "Kandinsky5I2IPipeline")
def kandinsky5(kind: type) -> Built:
    start, end = kind.__name__.removeprefix("Kandinsky5").removesuffix("Pipeline").split("2")
    video = end == "V"
    torch.manual_seed(0)
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=32, in_text_dim2=16, time_dim=16, model_dim=32, ff_dim=64,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), visual_cond=video or start == "I",
    )  # fmt: skip
    levels = 4
    torch.manual_seed(0)
    if video:
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * levels,
            up_block_types=("HunyuanVideoUpBlock3D",) * levels, block_out_channels=(8,) * levels, layers_per_block=1,
            norm_num_groups=4, scaling_factor=0.5,
        ).eval()  # fmt: skip
    else:
        vae = parts.vae(
            block_out_channels=[8] * levels, down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels, layers_per_block=1,
        )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipe = kind(parts.randomise(transformer.eval(), std=0.1), vae, None, None, None, None, scheduler)
    if not video:
        pipe.resolutions = [(64, 64)]  # all others are large

    def texts(seeds: tuple[int, ...], prefix: str = "") -> dict:
        return {
            f"{prefix}prompt_embeds_qwen": parts.stacked(seeds, 6, 32),
            f"{prefix}prompt_embeds_clip": parts.stacked(seeds, 16),
            f"{prefix}prompt_cu_seqlens": torch.arange(len(seeds) + 1, dtype=torch.int32) * 6,
        }

    def call(ask: Ask) -> dict:
        count = len(ask.prompts)
        given = {"num_images_per_prompt": ask.images}
        if video:  # from an image, the first four frames of latents are changed at the end to be like the others
            given = {"num_frames": 21 if start == "I" else 9, "num_videos_per_prompt": ask.images}
        if start == "I":
            given["image"] = [parts.pil(64)] * (count * ask.images)
        return given | texts(ask.prompts) | texts((ask.negative,) * count, "negative_") | {
            "height": 64, "width": 64, "guidance_scale": 5.0 if ask.guided else 1.0,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
