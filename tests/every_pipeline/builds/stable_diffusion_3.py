"""Stable Diffusion 3 and its control forms."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3ControlNetModel, SD3Transformer2DModel

from . import Ask, Built, builds, parts

SIZE = 16
CLIP, TEXT = 16, 40


def shape(channels: int) -> dict:
    return {
        "sample_size": SIZE, "patch_size": 2, "in_channels": channels, "attention_head_dim": 8,
        "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": TEXT,
        "pooled_projection_dim": 2 * CLIP, "out_channels": channels, "pos_embed_max_size": 8,
    }  # fmt: skip


@builds(
    "StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline",
    "StableDiffusion3ControlNetPipeline", "StableDiffusion3ControlNetInpaintingPipeline",
)  # fmt: skip
def stable_diffusion_3(kind: type) -> Built:
    name = kind.__name__
    channels = 16 if name == "StableDiffusion3InpaintPipeline" else 4  # it asks for 16
    torch.manual_seed(0)
    # as in 3.5 medium the first block has two attentions; the last does not change the text
    transformer = SD3Transformer2DModel(
        num_layers=4 if "ControlNet" in name else 3, dual_attention_layers=(0,), qk_norm="rms_norm", **shape(channels)
    )
    # embeddings that are passed in are not repeated for several images of a prompt, so that it must encode
    encoders = {
        "text_encoder": parts.clip_text(CLIP, projection=True), "tokenizer": parts.tokenizer(),
        "text_encoder_2": parts.clip_text(CLIP, layers=3, projection=True), "tokenizer_2": parts.tokenizer(),
        "text_encoder_3": parts.t5(TEXT), "tokenizer_3": parts.tokenizer(),
    }  # fmt: skip
    extra = {}
    if "ControlNet" in name:
        torch.manual_seed(1)
        mask_channels = 1 if "Inpaint" in name else 0
        net = SD3ControlNetModel(num_layers=2, extra_conditioning_channels=mask_channels, **shape(channels))
        extra["controlnet"] = parts.randomise(net.eval())
    pipe = kind(
        transformer=parts.randomise(transformer.eval()), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=parts.vae(channels), **encoders, **extra,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        made = parts.words(ask) | {
            "num_images_per_prompt": ask.images, "height": SIZE, "width": SIZE, "generator": parts.generator(),
            "num_inference_steps": ask.steps, "guidance_scale": 5.0 if ask.guided else 1.0, "output_type": "latent",
            "max_sequence_length": 16,
        }  # fmt: skip
        mask = torch.ones(1, 1, SIZE, SIZE)
        mask[..., : SIZE // 4] = 0
        if "ControlNet" in name:
            made["control_image"] = parts.picture(SIZE, 8)
            if "Inpaint" in name:
                made["control_mask"] = mask
                torch.manual_seed(0)  # it encodes the picture with the global generator
        elif name != "StableDiffusion3Pipeline":
            made |= {"image": parts.picture(SIZE), "strength": 0.5, "num_inference_steps": 2 * ask.steps}
            if "Inpaint" in name:
                made["mask_image"] = mask
        return made

    return Built(parts.quiet(pipe), call)
