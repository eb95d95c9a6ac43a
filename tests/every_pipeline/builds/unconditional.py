"""The first pipelines: pixels without a text or of a class, and latent diffusion."""

from __future__ import annotations

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

from . import Ask, Built, builds, parts
from .stable_diffusion import SIZE, WIDTH

CLASSES = 16


def pixels(**changes) -> UNet2DModel:
    """A U-Net of two levels without a text."""
    torch.manual_seed(0)
    config = {
        "sample_size": SIZE, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    }  # fmt: skip
    return UNet2DModel(**config | changes).eval()


def run(ask: Ask) -> dict:
    return {"num_inference_steps": ask.steps, "generator": parts.generator(), "output_type": "pt"}


@builds("DDPMPipeline", "DDIMPipeline")
def without_text(kind: type) -> Built:
    """Nothing is asked for but how many."""
    scheduler = DDPMScheduler() if kind.__name__ == "DDPMPipeline" else DDIMScheduler()
    pipe = kind(unet=pixels(), scheduler=scheduler)
    return Built(
        parts.quiet(pipe), lambda ask: run(ask) | {"batch_size": len(ask.prompts) * ask.images}, guided=False,
        text=False, negative=False,
    )  # fmt: skip


@builds("ConsistencyModelPipeline")
def consistency(kind: type) -> Built:
    """A class is the prompt."""
    unet = pixels(
        num_class_embeds=CLASSES, resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )  # fmt: skip
    pipe = kind(unet=unet, scheduler=CMStochasticIterativeScheduler(num_train_timesteps=40))

    def call(ask: Ask) -> dict:
        labels = [seed % CLASSES for seed in ask.prompts for _ in range(ask.images)]
        return run(ask) | {"batch_size": len(labels), "class_labels": labels}

    return Built(parts.quiet(pipe), call, guided=False, negative=False)


@builds("LDMSuperResolutionPipeline")
def super_resolution(kind: type) -> Built:
    """A small image is the prompt."""
    torch.manual_seed(0)
    vqvae = VQModel(
        block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=16, latent_channels=3, sample_size=SIZE
    ).eval()
    pipe = kind(
        vqvae=vqvae, unet=pixels(in_channels=6, out_channels=3),
        scheduler=DDIMScheduler(
            beta_start=0.0015, beta_end=0.0155, beta_schedule="scaled_linear", clip_sample=False
        ),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        return run(ask) | {"image": torch.cat([2 * parts.picture(SIZE, seed) - 1 for seed in ask.prompts])}

    return Built(parts.quiet(pipe), call, images=False, guided=False, negative=False)


@builds("LDMTextToImagePipeline")
def latent_diffusion(kind: type) -> Built:
    """It counts on an autoencoder that makes images smaller by 8; the negative prompt is always empty."""
    torch.manual_seed(0)
    bert = LDMBertModel(
        LDMBertConfig(
            vocab_size=parts.WORDS + 4, max_position_embeddings=77, encoder_layers=2, encoder_ffn_dim=64,
            encoder_attention_heads=4, head_dim=8, d_model=WIDTH, dropout=0.0, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    pipe = kind(vqvae=parts.vae(), bert=bert, tokenizer=parts.tokenizer(77), unet=parts.sd_unet(), scheduler=scheduler)

    def call(ask: Ask) -> dict:
        return run(ask) | {
            "prompt": [parts.prompt(seed) for seed in ask.prompts], "height": 8 * SIZE, "width": 8 * SIZE,
            "guidance_scale": 6.0 if ask.guided else 1.0,
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, images=False, negative=False)
