"""Wan video pipelines, with the two denoisers of version 2.2 where the pipeline has them."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from transformers import CLIPVisionConfig, CLIPVisionModel

from . import Ask, Built, builds, parts


def wan_vae() -> AutoencoderKLWan:
    """An autoencoder of 5 frames of 32x32 to 2 of 8x8."""
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], scale_factor_spatial=4
    ).eval()


def wan_transformer(kind: type = WanTransformer3DModel, seed: int = 0, **changes):
    """A transformer of two blocks, 24 wide; a change to `None` leaves an argument out."""
    torch.manual_seed(seed)
    config = {
        "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 16, "ffn_dim": 32,
        "num_layers": 2, "rope_max_seq_len": 32,
    }  # fmt: skip
    return kind(**{name: value for name, value in (config | changes).items() if value is not None}).eval()


def flow_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def vision() -> CLIPVisionModel:
    """An image encoder, for pictures of 16x16."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    return CLIPVisionModel(config).eval()


def vision_processor():
    from transformers import CLIPImageProcessor  # it warns where torchvision is not installed

    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def text_parts(kind: type) -> dict:
    parts.without_ftfy(kind)
    return {"tokenizer": parts.tokenizer(), "text_encoder": parts.t5_text(multilingual=True)}


def wan_call(ask: Ask) -> dict:
    return parts.words(ask) | {
        "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": ask.steps,
        "guidance_scale": 4.0 if ask.guided else 1.0, "num_videos_per_prompt": ask.images, "max_sequence_length": 8,
        "generator": parts.generator(), "output_type": "latent",
    }  # fmt: skip


@builds("WanPipeline")
def wan(kind: type) -> Built:
    pipe = kind(
        **text_parts(kind), vae=wan_vae(), scheduler=flow_scheduler(), transformer=wan_transformer(),
        transformer_2=wan_transformer(seed=1), boundary_ratio=0.875,
    )  # fmt: skip
    return Built(parts.quiet(pipe), wan_call)


@builds("WanImageToVideoPipeline")
def wan_image_to_video(kind: type) -> Built:
    pipe = kind(
        **text_parts(kind), vae=wan_vae(), scheduler=flow_scheduler(), transformer=wan_transformer(in_channels=36),
        transformer_2=wan_transformer(seed=1, in_channels=36), boundary_ratio=0.9,
    )  # fmt: skip
    return Built(parts.quiet(pipe), lambda ask: wan_call(ask) | {"image": parts.pil()})


@builds("WanVideoToVideoPipeline")
def wan_video_to_video(kind: type) -> Built:
    pipe = kind(**text_parts(kind), vae=wan_vae(), scheduler=flow_scheduler(), transformer=wan_transformer())

    def call(ask: Ask) -> dict:
        asked = wan_call(ask) | {"video": parts.frames(), "strength": 0.5, "num_inference_steps": 2 * ask.steps}
        del asked["num_frames"]
        return asked

    return Built(parts.quiet(pipe), call, images=False)  # the pipeline sets `num_videos_per_prompt` to 1


@builds("WanVACEPipeline")
def wan_vace(kind: type) -> Built:
    shape = {"vace_layers": [0, 1], "vace_in_channels": 2 * 16 + 4 * 4}
    pipe = kind(
        **text_parts(kind), vae=wan_vae(), scheduler=flow_scheduler(),
        transformer=wan_transformer(WanVACETransformer3DModel, **shape),
        transformer_2=wan_transformer(WanVACETransformer3DModel, 1, **shape), boundary_ratio=0.875,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        asked = wan_call(ask) | {"video": parts.frames(), "mask": [parts.pil(seed=20 + i) for i in range(5)]}
        return asked | {"prompt": asked["prompt"][0], "negative_prompt": asked["negative_prompt"][0]}

    return Built(parts.quiet(pipe), call, many=False, images=False)  # it takes one prompt and makes one video


@builds("WanAnimatePipeline")
def wan_animate(kind: type) -> Built:
    transformer = wan_transformer(
        WanAnimateTransformer3DModel, in_channels=36, image_dim=16, added_kv_proj_dim=24, motion_encoder_size=16,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_style_dim=8, motion_dim=4,
        motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2, inject_face_latents_blocks=1,
    )  # fmt: skip
    pipe = kind(
        **text_parts(kind), vae=wan_vae(), scheduler=flow_scheduler(), image_processor=vision_processor(),
        image_encoder=vision(), transformer=transformer,
    )  # fmt: skip

    def call(ask: Ask) -> dict:  # one segment: of several only the last one's latents would be returned
        asked = wan_call(ask) | {
            "image": parts.pil(), "pose_video": parts.frames(), "face_video": parts.frames(size=16, seed=20),
            "segment_frame_length": 5, "max_sequence_length": 512,
        }  # fmt: skip
        del asked["num_frames"]
        return asked

    return Built(parts.quiet(pipe), call)
