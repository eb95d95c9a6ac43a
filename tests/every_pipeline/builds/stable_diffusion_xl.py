"""Stable Diffusion XL and its refiner: from text, images, masks and instructions."""

from __future__ import annotations

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

from . import Ask, Built, builds, parts, stable_diffusion

WIDTH = 48  # of text embeddings
POOLED = 32
TIME = 8  # of each of the time ids


def unet(time_ids: int = 6, **changes) -> UNet2DConditionModel:
    """A U-Net of two levels, the lower one with two transformer blocks."""
    torch.manual_seed(0)
    config = {
        "sample_size": stable_diffusion.SIZE, "block_out_channels": (16, 32), "layers_per_block": 1,
        "norm_num_groups": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (2, 4),
        "use_linear_projection": True, "transformer_layers_per_block": (1, 2), "cross_attention_dim": WIDTH,
        "addition_embed_type": "text_time", "addition_time_embed_dim": TIME,
        "projection_class_embeddings_input_dim": TIME * time_ids + POOLED,
    }  # fmt: skip
    return UNet2DConditionModel(**config | changes).eval()


def euler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**stable_diffusion.BETAS, steps_offset=1, timestep_spacing="leading")


def text(ask: Ask) -> dict:
    """Embeddings of the prompts and of the negative one, and pooled ones."""
    negative = (ask.negative,) * len(ask.prompts)
    return stable_diffusion.text(ask, width=WIDTH) | {
        "pooled_prompt_embeds": parts.stacked(ask.prompts, POOLED),
        "negative_pooled_prompt_embeds": parts.stacked(negative, POOLED),
    }


NOTHING = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
UNMARKED = {"add_watermarker": False}


@builds("StableDiffusionXLPipeline")
def text_to_image(kind: type) -> Built:
    pipe = kind(vae=parts.vae(), unet=unet(), scheduler=euler(), **NOTHING, **UNMARKED)
    return Built(parts.quiet(pipe), lambda ask: stable_diffusion.run(ask, 5.0) | text(ask))


@builds("StableDiffusionXLImg2ImgPipeline")
def refiner(kind: type) -> Built:
    pipe = kind(
        vae=parts.vae(), unet=unet(5), scheduler=euler(), **NOTHING, **UNMARKED, requires_aesthetics_score=True
    )

    def call(ask: Ask) -> dict:
        return stable_diffusion.later(ask) | text(ask) | {"image": stable_diffusion.pictures(ask)}

    return Built(parts.quiet(pipe), call)


@builds("StableDiffusionXLInpaintPipeline")
def inpaint(kind: type) -> Built:
    pipe = kind(vae=parts.vae(), unet=unet(in_channels=9), scheduler=euler(), **NOTHING, **UNMARKED)

    def call(ask: Ask) -> dict:
        masked = {
            "image": stable_diffusion.pictures(ask), "mask_image": stable_diffusion.masks(ask), "strength": 1.0,
        }  # fmt: skip
        return stable_diffusion.run(ask) | text(ask) | masked

    return Built(parts.quiet(pipe), call)


@builds("StableDiffusionXLInstructPix2PixPipeline")
def instruct(kind: type) -> Built:
    pipe = kind(vae=parts.vae(), unet=unet(in_channels=8), scheduler=euler(), **NOTHING, **UNMARKED)

    def call(ask: Ask) -> dict:
        return stable_diffusion.run(ask, 5.0) | text(ask) | {"image": stable_diffusion.pictures(ask)}

    return Built(parts.quiet(pipe), call)
