"""Stable Diffusion 1 and 2: from text, images, masks, depth and image embeddings; upscalers; stable unCLIP."""

from __future__ import annotations

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    PriorTransformer,
    UnCLIPScheduler,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from . import Ask, Built, builds, parts

WIDTH = 32  # of text embeddings
TOKENS = 7
SIZE = 8  # of images and latents
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def pndm(**changes) -> PNDMScheduler:
    config = BETAS | {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
    return PNDMScheduler(**config | changes)


def ddim(**changes) -> DDIMScheduler:
    config = BETAS | {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}
    return DDIMScheduler(**config | changes)


def image_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=WIDTH,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def run(ask: Ask, guidance: float = 7.5) -> dict:
    """How long and how many."""
    return {
        "num_inference_steps": ask.steps, "num_images_per_prompt": ask.images, "generator": parts.generator(),
        "guidance_scale": guidance if ask.guided else 1.0, "output_type": "latent",
    }  # fmt: skip


def text(ask: Ask, tokens: int = TOKENS, width: int = WIDTH) -> dict:
    """Embeddings of the prompts and of the negative one."""
    return {
        "prompt_embeds": parts.stacked(ask.prompts, tokens, width),
        "negative_prompt_embeds": parts.stacked((ask.negative,) * len(ask.prompts), tokens, width),
    }


def pictures(ask: Ask, size: int = SIZE) -> torch.Tensor:
    """The same picture for each prompt."""
    return parts.picture(size).repeat(len(ask.prompts), 1, 1, 1)


def masks(ask: Ask, size: int = SIZE) -> torch.Tensor:
    """Of the right half, one for each prompt."""
    mask = torch.zeros(len(ask.prompts), 1, size, size)
    mask[..., size // 2 :] = 1
    return mask


def later(ask: Ask) -> dict:
    """`run` that begins in the middle of twice the steps."""
    return run(ask._replace(steps=2 * ask.steps)) | {"strength": 0.5}


NOTHING = {"text_encoder": None, "tokenizer": None}
UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@builds("StableDiffusionPipeline")
def text_to_image(kind: type) -> Built:
    pipe = kind(vae=parts.vae(), unet=parts.sd_unet(), scheduler=pndm(), **NOTHING, **UNCHECKED)
    return Built(parts.quiet(pipe), lambda ask: run(ask) | text(ask))


@builds("StableDiffusionImg2ImgPipeline")
def image_to_image(kind: type) -> Built:
    pipe = kind(vae=parts.vae(), unet=parts.sd_unet(), scheduler=pndm(), **NOTHING, **UNCHECKED)
    return Built(parts.quiet(pipe), lambda ask: later(ask) | text(ask) | {"image": pictures(ask)})


@builds("StableDiffusionInpaintPipeline")
def inpaint(kind: type) -> Built:
    pipe = kind(vae=parts.vae(), unet=parts.sd_unet(in_channels=9), scheduler=pndm(), **NOTHING, **UNCHECKED)

    def call(ask: Ask) -> dict:
        return run(ask) | text(ask) | {"image": pictures(ask), "mask_image": masks(ask)}

    return Built(parts.quiet(pipe), call)


@builds("StableDiffusionDepth2ImgPipeline")
def depth_to_image(kind: type) -> Built:
    pipe = kind(
        vae=parts.vae(), unet=parts.sd_unet(in_channels=5), scheduler=pndm(), **NOTHING, depth_estimator=None,
        feature_extractor=None,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        return later(ask) | text(ask) | {"image": pictures(ask), "depth_map": pictures(ask)[:, 0]}

    return Built(parts.quiet(pipe), call)


@builds("StableDiffusionImageVariationPipeline")
def image_variation(kind: type) -> Built:
    """The only condition is an image, one for each prompt."""
    pipe = kind(vae=parts.vae(), image_encoder=image_encoder(), unet=parts.sd_unet(), scheduler=pndm(), **UNCHECKED)

    def call(ask: Ask) -> dict:
        return run(ask) | {"image": torch.cat([parts.picture(16, seed) for seed in ask.prompts])}

    return Built(parts.quiet(pipe), call, negative=False)


@builds("StableDiffusionInstructPix2PixPipeline")
def instruct(kind: type) -> Built:
    scheduler = EulerAncestralDiscreteScheduler(**BETAS, steps_offset=1)
    pipe = kind(vae=parts.vae(), unet=parts.sd_unet(in_channels=8), scheduler=scheduler, **NOTHING, **UNCHECKED)
    return Built(parts.quiet(pipe), lambda ask: run(ask) | text(ask) | {"image": pictures(ask)})


@builds("StableDiffusionUpscalePipeline")
def upscale(kind: type) -> Built:
    betas = {"beta_start": 0.0001, "beta_end": 0.02}
    pipe = kind(
        vae=parts.vae(), unet=parts.sd_unet(in_channels=7, num_class_embeds=1000), **NOTHING,
        low_res_scheduler=DDPMScheduler(**betas, beta_schedule="scaled_linear"),
        scheduler=ddim(**betas, prediction_type="v_prediction"),
    )  # fmt: skip
    return Built(parts.quiet(pipe), lambda ask: run(ask) | text(ask) | {"image": pictures(ask)})


@builds("StableDiffusionLatentUpscalePipeline")
def latent_upscale(kind: type) -> Built:
    net = parts.sd_unet(in_channels=8, out_channels=5, time_cond_proj_dim=128 + WIDTH)
    pipe = kind(vae=parts.vae(), unet=net, scheduler=EulerDiscreteScheduler(**BETAS), **NOTHING)

    def call(ask: Ask) -> dict:
        pooled = {
            "pooled_prompt_embeds": parts.stacked(ask.prompts, WIDTH),
            "negative_pooled_prompt_embeds": parts.stacked((ask.negative,) * len(ask.prompts), WIDTH),
        }
        called = run(ask) | text(ask) | pooled | {"image": pictures(ask, SIZE // 2)}
        del called["num_images_per_prompt"]
        return called

    return Built(parts.quiet(pipe), call, images=False)


def unclip_parts() -> dict:
    """What both stable unCLIP pipelines have."""
    return {
        "image_normalizer": StableUnCLIPImageNormalizer(embedding_dim=WIDTH).eval(),
        "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "unet": parts.sd_unet(class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH),
        "scheduler": pndm(prediction_type="v_prediction"),
        "vae": parts.vae(),
    }


@builds("StableUnCLIPPipeline")
def unclip(kind: type) -> Built:
    """A prior makes an image embedding, then the U-Net an image; both in as many steps (the prior at least in two)."""
    torch.manual_seed(0)
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=WIDTH, num_embeddings=16,
        additional_embeddings=4,
    ).eval()  # fmt: skip
    parts.randomise(prior)
    pipe = kind(
        prior_tokenizer=parts.tokenizer(), prior_text_encoder=parts.clip_text(WIDTH, projection=True), prior=prior,
        prior_scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", num_train_timesteps=1000, clip_sample_range=5.0, prediction_type="sample"
        ),
        tokenizer=parts.tokenizer(), text_encoder=parts.clip_text(WIDTH), **unclip_parts(),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        steps = {"prior_num_inference_steps": max(ask.steps, 2)}
        return run(ask, 10.0) | parts.words(ask) | steps | {"prior_guidance_scale": 4.0 if ask.guided else 1.0}

    return Built(parts.quiet(pipe), call)


@builds("StableUnCLIPImg2ImgPipeline")
def unclip_image(kind: type) -> Built:
    pipe = kind(feature_extractor=None, image_encoder=image_encoder(), **NOTHING, **unclip_parts())
    return Built(parts.quiet(pipe), lambda ask: run(ask, 10.0) | text(ask) | {"image": pictures(ask, 16)})
