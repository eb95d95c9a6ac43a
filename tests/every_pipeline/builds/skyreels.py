"""SkyReels V2 video pipelines, with and without diffusion forcing."""

from __future__ import annotations

import torch
from diffusers import SkyReelsV2Transformer3DModel, UniPCMultistepScheduler
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from . import Ask, Built, builds, parts, wan


def skyreels_parts(kind: type, shift: float, **changes) -> dict:
    return wan.text_parts(kind) | {
        "vae": wan.wan_vae(), "transformer": wan.wan_transformer(SkyReelsV2Transformer3DModel, **changes),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        ),
    }  # fmt: skip


@builds("SkyReelsV2Pipeline")
def skyreels(kind: type) -> Built:
    return Built(parts.quiet(kind(**skyreels_parts(kind, 8.0))), wan.wan_call)


@builds("SkyReelsV2ImageToVideoPipeline")
def skyreels_image_to_video(kind: type) -> Built:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=16,
    )  # fmt: skip
    pipe = kind(
        **skyreels_parts(kind, 5.0, in_channels=36, image_dim=16, added_kv_proj_dim=24),
        image_encoder=CLIPVisionModelWithProjection(vision).eval(), image_processor=wan.vision_processor(),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        return wan.wan_call(ask) | {"image": parts.pil(), "max_sequence_length": 512}

    return Built(parts.quiet(pipe), call, images=False)  # the embedded picture is repeated for each prompt only


@builds("SkyReelsV2DiffusionForcingPipeline")
def skyreels_forcing(kind: type) -> Built:
    return Built(parts.quiet(kind(**skyreels_parts(kind, 8.0))), wan.wan_call)


@builds("SkyReelsV2DiffusionForcingImageToVideoPipeline")
def skyreels_forcing_image_to_video(kind: type) -> Built:
    pipe = kind(**skyreels_parts(kind, 5.0))

    def call(ask: Ask) -> dict:  # without a last picture the pipeline cannot make more than two videos
        return wan.wan_call(ask) | {"image": parts.pil(), "last_image": parts.pil(seed=8), "num_frames": 9}

    return Built(parts.quiet(pipe), call)


@builds("SkyReelsV2DiffusionForcingVideoToVideoPipeline")
def skyreels_forcing_video_to_video(kind: type) -> Built:
    pipe = kind(**skyreels_parts(kind, 8.0))

    def call(ask: Ask) -> dict:  # one part of a long video
        frames = {"num_frames": 13, "base_num_frames": 13, "overlap_history": 5}
        return wan.wan_call(ask) | {"video": parts.frames()} | frames

    return Built(parts.quiet(pipe), call, images=False)  # the pipeline sets `num_videos_per_prompt` to 1
