"""LongCat-Image, from text and to edit."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImageTransformer2DModel

from . import Ask, Built, builds, parts


@builds("LongCatImagePipeline", "LongCatImageEditPipeline")
def longcat(kind: type) -> Built:
    edit = "Edit" in kind.__name__
    torch.manual_seed(0)
    transformer = LongCatImageTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    levels = 7 if edit else 1  # it makes each picture one of a million pixels
    vae = parts.vae(
        16, block_out_channels=[4] * levels, norm_num_groups=2, down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels, layers_per_block=1,
    )  # fmt: skip
    processor = parts.qwen2_vl_processor()
    pipe = kind(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae, parts.qwen2_vl_text(), processor.tokenizer,
        processor, parts.randomise(transformer.eval()),
    )  # fmt: skip
    pipe.tokenizer_max_length = 8

    def call(ask: Ask) -> dict:
        asked = {
            **({"image": parts.pil(32)} if edit else {"height": 16, "width": 16, "enable_prompt_rewrite": False}),
            "num_images_per_prompt": ask.images, "guidance_scale": 4.5 if ask.guided else 1.0,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip
        if edit:
            return asked | {"prompt": parts.prompt(ask.prompts[0]), "negative_prompt": parts.prompt(ask.negative)}
        return asked | parts.words(ask)

    return Built(parts.quiet(pipe), call, many=not edit)
