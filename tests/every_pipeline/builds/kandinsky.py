"""Kandinsky 2.1 and 2.2: a prior of image embeddings and a U-Net that takes them."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UnCLIPScheduler, UNet2DConditionModel
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

from . import Ask, Built, builds, parts

PRIORS = ("KandinskyPriorPipeline", "KandinskyV22PriorPipeline", "KandinskyV22PriorEmb2EmbPipeline")
DECODERS = (
    "KandinskyPipeline",
    "KandinskyImg2ImgPipeline",
    "KandinskyInpaintPipeline",
    "KandinskyV22Pipeline",
    "KandinskyV22Img2ImgPipeline",
    "KandinskyV22InpaintPipeline",
    "KandinskyV22ControlnetPipeline",
    "KandinskyV22ControlnetImg2ImgPipeline",
)
COMBINED = (
    "KandinskyCombinedPipeline",
    "KandinskyImg2ImgCombinedPipeline",
    "KandinskyInpaintCombinedPipeline",
    "KandinskyV22CombinedPipeline",
    "KandinskyV22Img2ImgCombinedPipeline",
    "KandinskyV22InpaintCombinedPipeline",
)


def of_prior(new: bool) -> dict:
    return {
        "prior": parts.clip_prior(),
        "image_encoder": parts.clip_vision(),
        "text_encoder": parts.clip_text(projection=True),
        "tokenizer": parts.tokenizer(),
        "scheduler": UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0 if new else 5.0
        ),
        "image_processor": parts.clip_pictures(),
    }


def of_decoder(name: str) -> dict:
    new = "V22" in name
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=9 if "Inpaint" in name else 8 if "Controlnet" in name else 4, out_channels=8,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        cross_attention_dim=32, resnet_time_scale_shift="scale_shift", encoder_hid_dim=32,
        encoder_hid_dim_type="image_proj" if new else "text_image_proj",
        addition_embed_type="image_hint" if "Controlnet" in name else "image" if new else "text_image",
    ).eval()  # fmt: skip
    noise = {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    if new:
        scheduler = DDPMScheduler(**noise, variance_type="learned_range")
        return {"unet": unet, "scheduler": scheduler, "movq": parts.movq()}
    scheduler = DDIMScheduler(**noise, set_alpha_to_one=False, steps_offset=1)
    torch.manual_seed(0)
    encoder = MultilingualCLIP(
        MCLIPConfig(
            transformerDimSize=32, imageDimSize=32, vocab_size=parts.WORDS + 4, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=64, max_position_embeddings=80, pad_token_id=0, bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()  # fmt: skip
    return {
        "text_encoder": encoder, "tokenizer": parts.tokenizer(77), "unet": unet, "scheduler": scheduler,
        "movq": parts.movq(),
    }  # fmt: skip


def rest(ask: Ask) -> dict:
    return {
        "num_images_per_prompt": ask.images,
        "guidance_scale": 4.0 if ask.guided else 1.0,
        "num_inference_steps": ask.steps,
        "generator": parts.generator(),
    }


def pictures(name: str, ask: Ask) -> dict:
    """Pictures for each prompt, and twice the steps where the pipeline leaves out half."""
    made = {"height": 8, "width": 8}
    if "Img2Img" in name:
        made |= {"strength": 0.5, "num_inference_steps": 2 * ask.steps}
    if "Img2Img" in name or "Inpaint" in name:
        made["image"] = [parts.pil(8)] * len(ask.prompts)
    if "Inpaint" in name:
        made["mask_image"] = [parts.pil(8, 9)] * len(ask.prompts)
    if "Controlnet" in name:
        made["hint"] = parts.picture(64, 8).expand(len(ask.prompts), -1, -1, -1)
    return made


@builds(*PRIORS)
def prior(kind: type) -> Built:
    def call(ask: Ask) -> dict:
        made = parts.words(ask) | rest(ask)
        if "Emb2Emb" in kind.__name__:
            made |= {"image": parts.picture(32), "strength": 0.5, "num_inference_steps": 2 * ask.steps}
        else:
            made["num_inference_steps"] = max(2, ask.steps)  # the scheduler cannot do one
        return made

    return Built(parts.quiet(kind(**of_prior("V22" in kind.__name__))), call)


@builds(*DECODERS)
def decoder(kind: type) -> Built:
    name = kind.__name__

    def call(ask: Ask) -> dict:
        if not ask.guided:  # it repeats the embeddings for several images only with guidance
            ask = ask._replace(prompts=tuple(seed for seed in ask.prompts for _ in range(ask.images)), images=1)
        made = rest(ask) | pictures(name, ask)
        made["image_embeds"] = parts.stacked(ask.prompts, 32)
        made["negative_image_embeds"] = parts.stacked((ask.negative,) * len(ask.prompts), 32)
        if "V22" not in name:
            made |= parts.words(ask)
        return made | {"output_type": "latent" if "V22" in name and "Controlnet" not in name else "pt"}

    return Built(parts.quiet(kind(**of_decoder(name))), call)


@builds(*COMBINED)
def combined(kind: type) -> Built:
    name = kind.__name__
    before = {f"prior_{key}": part for key, part in of_prior("V22" in name).items()}
    pipe = kind(**of_decoder(name), **before)

    def call(ask: Ask) -> dict:
        made = parts.words(ask) | rest(ask) | pictures(name, ask)
        made |= {"prior_guidance_scale": made["guidance_scale"], "prior_num_inference_steps": max(2, ask.steps)}
        return made | {"output_type": "latent" if "V22" in name else "pt"}

    return Built(parts.quiet(pipe), call)
