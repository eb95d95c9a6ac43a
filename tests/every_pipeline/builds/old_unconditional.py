"""Deprecated pipelines without a text."""

from __future__ import annotations

import torch
from diffusers import (
    DDIMScheduler,
    IPNDMScheduler,
    KarrasVeScheduler,
    PNDMScheduler,
    RePaintScheduler,
    ScoreSdeVeScheduler,
    UNet1DModel,
    UNet2DModel,
)

from . import Ask, Built, builds, parts


def pixels(**changes) -> UNet2DModel:
    torch.manual_seed(0)
    config = {
        "sample_size": 8, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    }  # fmt: skip
    return UNet2DModel(**config | changes).eval()


def plain(pipe, output: str | None = "np", least: int = 1) -> Built:
    """Nothing is asked for but how many, in so many steps at least."""

    def call(ask: Ask) -> dict:
        made = {"output_type": output} if output else {}
        return made | {
            "batch_size": len(ask.prompts) * ask.images, "num_inference_steps": max(least, ask.steps),
            "generator": parts.generator(),
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, guided=False, text=False, negative=False)


@builds("PNDMPipeline")
def pndm(kind: type) -> Built:
    return plain(kind(unet=pixels(), scheduler=PNDMScheduler(skip_prk_steps=True)))  # the others need four steps


@builds("KarrasVePipeline")
def karras_ve(kind: type) -> Built:
    # with the usual noise (100) nothing of what a random U-Net makes would be left of the picture but black and white
    return plain(kind(unet=pixels(), scheduler=KarrasVeScheduler(sigma_max=1.0)), least=2)


@builds("ScoreSdeVePipeline")
def score_sde_ve(kind: type) -> Built:
    # as above: 1348 usually
    return plain(kind(unet=pixels(time_embedding_type="fourier"), scheduler=ScoreSdeVeScheduler(sigma_max=1.0)))


@builds("LDMPipeline")
def latent_diffusion(kind: type) -> Built:
    vqvae = parts.movq(
        norm_type="group", up_block_types=["UpDecoderBlock2D"], num_vq_embeddings=1024, latent_channels=3,
        vq_embed_dim=3, scaling_factor=1.0,
    )  # fmt: skip
    vqvae.quantize.embedding.weight.data = parts.embeddings(5, 1024, 3)  # new ones are all close to zero
    scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False)
    return plain(kind(vqvae=vqvae, unet=pixels(), scheduler=scheduler))


@builds("DanceDiffusionPipeline")
def dance(kind: type) -> Built:
    torch.manual_seed(0)
    unet = UNet1DModel(
        sample_size=32, sample_rate=32, time_embedding_dim=16, extra_in_channels=16, block_out_channels=(32, 32, 64)
    ).eval()
    return plain(kind(unet=unet, scheduler=IPNDMScheduler()), None)


@builds("RePaintPipeline")
def repaint(kind: type) -> Built:
    pipe = kind(unet=pixels(), scheduler=RePaintScheduler())

    def call(ask: Ask) -> dict:
        count = len(ask.prompts) * ask.images
        return {
            "image": (parts.picture(8) * 2 - 1).expand(count, -1, -1, -1), "num_inference_steps": ask.steps,
            "mask_image": (parts.picture(8, 9)[:, :1] > 0.5).float(), "jump_length": 1, "jump_n_sample": 2,
            "generator": parts.generator(), "output_type": "np",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, guided=False, text=False, negative=False)
