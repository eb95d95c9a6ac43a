"""ModelScope's text-to-video U-Net, and Stable Diffusion made to draw videos (zero-shot)."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet3DConditionModel

from . import Ask, Built, builds, parts

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def ddim() -> DDIMScheduler:
    return DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False)


def rest(ask: Ask) -> dict:
    return {
        "guidance_scale": 9.0 if ask.guided else 1.0, "num_inference_steps": ask.steps,
        "generator": parts.generator(), "output_type": "latent",
    }  # fmt: skip


@builds("TextToVideoSDPipeline", "VideoToVideoSDPipeline")
def text_to_video(kind: type) -> Built:
    changes = kind.__name__.startswith("Video")
    torch.manual_seed(0)
    unet = UNet3DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=32, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip
    pipe = kind(
        vae=parts.vae(), text_encoder=None, tokenizer=None, unet=parts.randomise(unet).eval(),
        scheduler=DPMSolverMultistepScheduler(**NOISE) if changes else ddim(),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        made = {"num_frames": 3, "height": 8, "width": 8}
        if changes:
            video = [parts.frames(3, 8)] * len(ask.prompts)
            made = {"video": video, "strength": 0.5, "num_inference_steps": 2 * ask.steps}
        return parts.text(ask, 5, 32) | rest(ask) | made

    # noise is added to the frames of several videos with a time for each video, which does not fit
    return Built(parts.quiet(pipe), call, many=not changes, images=False)


def zero(ask: Ask) -> dict:
    """Three frames, the others of which are drawn from the first before the last step."""
    made = {"video_length": 3, "height": 8, "width": 8, "t0": 0, "t1": 1, "num_inference_steps": max(2, ask.steps)}
    return rest(ask) | made


@builds("TextToVideoZeroPipeline")
def zero_shot(kind: type) -> Built:
    pipe = kind(
        vae=parts.vae(), text_encoder=parts.clip_text(), tokenizer=parts.tokenizer(), unet=parts.sd_unet(),
        scheduler=ddim(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        return parts.words(ask) | zero(ask) | {"guidance_scale": 9.0}

    return Built(parts.quiet(pipe), call, many=False, images=False, guided=False)  # guided always: it fails without


@builds("TextToVideoZeroSDXLPipeline")
def zero_shot_xl(kind: type) -> Built:
    unet = parts.sd_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    pipe = kind(
        vae=parts.vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=unet,
        scheduler=ddim(), add_watermarker=False,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        return parts.text(ask, 5, 32) | zero(ask) | {
            "prompt": None, "pooled_prompt_embeds": parts.stacked(ask.prompts, 32),
            "negative_pooled_prompt_embeds": parts.stacked((ask.negative,) * len(ask.prompts), 32),
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, many=False, images=False)
