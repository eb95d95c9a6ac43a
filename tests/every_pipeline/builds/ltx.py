"""LTX video pipelines."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXEulerAncestralRFScheduler,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel

from . import Ask, Built, builds, parts


def ltx_vae() -> AutoencoderKLLTXVideo:
    """An autoencoder of 3 frames of 32x64 to 2 of 4x8."""
    torch.manual_seed(0)
    return AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8), down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8), layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False), decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3, downsample_type=("conv",) * 2, upsample_residual=(False,) * 2,
        upsample_factor=(1, 1),
    ).eval()  # fmt: skip


def ltx_parts(scheduler=None) -> dict:
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        num_layers=2, caption_channels=32,
    ).eval()  # fmt: skip
    shifted = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096,
        shift_terminal=0.1,
    )  # fmt: skip
    return {
        "scheduler": scheduler or shifted, "vae": ltx_vae(), "transformer": transformer,
        "text_encoder": parts.t5_text(), "tokenizer": parts.tokenizer(),
    }  # fmt: skip


def ltx_call(ask: Ask) -> dict:
    return parts.words(ask) | {
        "height": 32, "width": 64, "num_frames": 3, "num_inference_steps": ask.steps,
        "guidance_scale": 3.0 if ask.guided else 1.0, "num_videos_per_prompt": ask.images, "max_sequence_length": 8,
        "generator": parts.generator(), "output_type": "latent",
    }  # fmt: skip


@builds("LTXPipeline")
def ltx(kind: type) -> Built:
    return Built(parts.quiet(kind(**ltx_parts())), ltx_call)


@builds("LTXImageToVideoPipeline")
def ltx_image_to_video(kind: type) -> Built:
    return Built(parts.quiet(kind(**ltx_parts())), lambda ask: ltx_call(ask) | {"image": parts.pil()})


@builds("LTXConditionPipeline")
def ltx_condition(kind: type) -> Built:
    pipe = kind(**ltx_parts(FlowMatchEulerDiscreteScheduler()))
    return Built(parts.quiet(pipe), lambda ask: ltx_call(ask) | {"image": parts.pil(), "strength": 0.8})


@builds("LTXI2VLongMultiPromptPipeline")
def ltx_long(kind: type) -> Built:
    pipe = kind(**ltx_parts(LTXEulerAncestralRFScheduler()))

    def call(ask: Ask) -> dict:  # two overlapping windows in time, each denoised in all steps, one after the other
        asked = ltx_call(ask) | {
            "prompt": parts.prompt(ask.prompts[0]), "cond_image": parts.pil(), "num_frames": 9,
            "temporal_tile_size": 6, "temporal_overlap": 2,
            "num_inference_steps": ask.steps + 1,  # the last of these is not done
        }  # fmt: skip
        del asked["num_videos_per_prompt"]
        return asked

    return Built(parts.quiet(pipe), call, many=False, images=False)  # a list of prompts is one for each window


@builds("LTXLatentUpsamplePipeline")
def ltx_upsample(kind: type) -> Built:
    torch.manual_seed(0)
    upsampler = LTXLatentUpsamplerModel(in_channels=8, mid_channels=32, num_blocks_per_stage=1).eval()

    def call(ask: Ask) -> dict:
        return {
            "latents": parts.stacked((0,), 8, 2, 4, 8), "height": 32, "width": 64, "generator": parts.generator(),
            "output_type": "latent",
        }  # fmt: skip

    pipe = kind(vae=ltx_vae(), latent_upsampler=upsampler)
    return Built(parts.quiet(pipe), call, many=False, images=False, guided=False, text=False, negative=False)
