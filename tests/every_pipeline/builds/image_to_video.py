"""Videos of an image by U-Nets over space and time: Stable Video Diffusion and I2VGen-XL."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    EulerDiscreteScheduler,
    UNetSpatioTemporalConditionModel,
)
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLUNet
from transformers import CLIPImageProcessor

from . import Ask, Built, builds, parts
from .stable_diffusion import NOTHING, SIZE, WIDTH, image_encoder, run, text

FRAMES = 3
PICTURE = 16  # that `image_encoder` takes


def processor() -> CLIPImageProcessor:
    size = {"height": PICTURE, "width": PICTURE}
    return CLIPImageProcessor(crop_size=size, size=size)


def videos(ask: Ask, guidance: float) -> dict:
    called = run(ask, guidance) | {"height": SIZE, "width": SIZE, "num_frames": FRAMES}
    called["num_videos_per_prompt"] = called.pop("num_images_per_prompt")
    return called


@builds("StableVideoDiffusionPipeline")
def stable_video(kind: type) -> Built:
    """
    The only condition is an image, one for each prompt; guidance grows from frame to frame. With several videos of
    several images the pipeline itself mixes them: embeddings are in the order 1 1 2 2, latents in 1 2 1 2.
    """
    torch.manual_seed(0)
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), layers_per_block=1, sample_size=SIZE
    )
    unet = UNetSpatioTemporalConditionModel(
        sample_size=SIZE, down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), block_out_channels=(32, 64),
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, layers_per_block=1,
        cross_attention_dim=WIDTH, num_attention_heads=4, num_frames=FRAMES,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        timestep_spacing="leading", timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002,
        sigma_max=700.0, steps_offset=1,
    )  # fmt: skip
    pipe = kind(
        vae=vae.eval(), image_encoder=image_encoder(), unet=unet.eval(), scheduler=scheduler,
        feature_extractor=processor(),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        called = videos(ask, 3.0)
        called["max_guidance_scale"] = called.pop("guidance_scale")
        return called | {"image": torch.cat([parts.picture(PICTURE, seed) for seed in ask.prompts])}

    return Built(parts.quiet(pipe), call, negative=False)


@builds("I2VGenXLPipeline")
def i2vgen(kind: type) -> Built:
    torch.manual_seed(0)
    unet = I2VGenXLUNet(
        sample_size=SIZE, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=WIDTH, attention_head_dim=4,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", clip_sample=False, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, set_alpha_to_one=True, steps_offset=1, timestep_spacing="leading",
    )  # fmt: skip
    pipe = kind(
        vae=parts.vae(), image_encoder=image_encoder(), feature_extractor=processor(),
        unet=parts.randomise(unet).eval(), scheduler=scheduler, **NOTHING,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        torch.manual_seed(0)  # it encodes the image without the generator
        return videos(ask, 9.0) | text(ask) | {"image": [parts.pil(PICTURE)] * len(ask.prompts)}

    return Built(parts.quiet(pipe), call)
