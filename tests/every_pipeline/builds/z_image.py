"""Z-Image, its control forms and Omni."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageControlNetModel, ZImageTransformer2DModel
from transformers import Siglip2ImageProcessor, Siglip2VisionConfig, Siglip2VisionModel

from . import Ask, Built, builds, parts

SIZE = 16
TEXT = 24
CHANNELS = 4


def shape() -> dict:
    return {"dim": 32, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}


def transformer(**changes) -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    made = ZImageTransformer2DModel(
        in_channels=CHANNELS, n_layers=2, cap_feat_dim=TEXT, axes_dims=[4, 6, 6], axes_lens=[256, 64, 64], **shape(),
        **changes,
    )  # fmt: skip
    return parts.randomise(made.eval())


def options(ask: Ask, size: int) -> dict:
    return {
        "num_images_per_prompt": ask.images, "height": size, "width": size, "generator": parts.generator(),
        "num_inference_steps": ask.steps, "guidance_scale": 4.0 if ask.guided else 0.0, "output_type": "latent",
    }  # fmt: skip


@builds(
    "ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline", "ZImageControlNetPipeline",
    "ZImageControlNetInpaintPipeline",
)  # fmt: skip
def z_image(kind: type) -> Built:
    name = kind.__name__
    extra = {}
    if "ControlNet" in name:
        torch.manual_seed(1)
        # for the control picture alone, or also for the masked picture and its mask
        inputs = 2 * CHANNELS + 1 if "Inpaint" in name else CHANNELS
        net = ZImageControlNetModel(control_layers_places=[0, 1], control_in_dim=inputs, **shape())
        extra["controlnet"] = parts.randomise(net.eval())
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=parts.vae(CHANNELS), text_encoder=None,
        tokenizer=None, transformer=transformer(), **extra,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        made = options(ask, SIZE)
        made["prompt_embeds"] = [parts.embeddings(seed, 7, TEXT) for seed in ask.prompts]
        made["negative_prompt_embeds"] = [parts.embeddings(ask.negative, 7, TEXT) for _ in ask.prompts]
        if "ControlNet" in name:
            made["control_image"] = parts.picture(SIZE, 8)
        if "Img2Img" in name or name == "ZImageInpaintPipeline":
            made |= {"strength": 0.5, "num_inference_steps": 2 * ask.steps, "image": parts.picture(SIZE)}
        if "Inpaint" in name:
            made["image"] = parts.picture(SIZE)
            made["mask_image"] = torch.ones(1, 1, SIZE, SIZE)
            made["mask_image"][..., : SIZE // 4] = 0
            if "ControlNet" in name:  # which repeats the pictures, but not their mask
                made["mask_image"] = made["mask_image"].repeat(len(ask.prompts) * ask.images, 1, 1, 1)
        return made

    return Built(parts.quiet(pipe), call)


@builds("ZImageOmniPipeline")
def z_image_omni(kind: type) -> Built:
    torch.manual_seed(0)
    config = Siglip2VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_patches=16,
        patch_size=16,
    )  # fmt: skip
    siglip = Siglip2VisionModel(config).eval()
    vae = parts.vae(
        CHANNELS, block_out_channels=[8] * 3, down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3, layers_per_block=1,
    )  # fmt: skip
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=None, tokenizer=None,
        vae=vae.to(torch.bfloat16),  # which it gives the picture in
        transformer=transformer(siglip_feat_dim=16), siglip=siglip,
        siglip_processor=Siglip2ImageProcessor(patch_size=16, max_num_patches=16),
    )  # fmt: skip

    def segments(seed: int) -> list[torch.Tensor]:
        """Text before the picture, between it and what is painted (the prompt), and after that."""
        return [parts.embeddings(90, 3, TEXT), parts.embeddings(seed, 7, TEXT), parts.embeddings(91, 2, TEXT)]

    def call(ask: Ask) -> dict:
        return options(ask, 64) | {
            "image": parts.pil(64), "prompt_embeds": [segments(seed) for seed in ask.prompts],
            "negative_prompt_embeds": [segments(ask.negative) for _ in ask.prompts],
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
