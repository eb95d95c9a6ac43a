"""Versatile Diffusion: a U-Net of pictures, whose attention blocks are those of the text's where that is asked for."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import UNetFlatConditionModel

from . import Ask, Built, builds, parts, unbuilt

unbuilt("it has no __call__: its methods make the other three pipelines and call those", "VersatileDiffusionPipeline")
# DualTransformer2DModel.forward() got an unexpected keyword argument 'encoder_attention_mask'
unbuilt(
    "broken in diffusers 0.42: the U-Net's blocks pass its dual transformers an argument that they do not take",
    "VersatileDiffusionDualGuidedPipeline",
)


@builds("VersatileDiffusionTextToImagePipeline", "VersatileDiffusionImageVariationPipeline")
def versatile_diffusion(kind: type) -> Built:
    pictures = "ImageVariation" in kind.__name__
    made = {
        "image_unet": parts.sd_unet(), "vae": parts.vae(),
        "scheduler": DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
            set_alpha_to_one=False,
        ),
    }  # fmt: skip
    if pictures:
        made |= {"image_encoder": parts.clip_vision(), "image_feature_extractor": parts.clip_pictures()}
    else:
        torch.manual_seed(1)
        flat = UNetFlatConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
            cross_attention_dim=32, down_block_types=("CrossAttnDownBlockFlat", "DownBlockFlat"),
            up_block_types=("UpBlockFlat", "CrossAttnUpBlockFlat"),
        )  # fmt: skip
        encoder = parts.clip_text(projection=True)
        made |= {"text_unet": flat.eval(), "text_encoder": encoder, "tokenizer": parts.tokenizer()}
    pipe = kind(**made)

    def call(ask: Ask) -> dict:
        made = parts.words(ask)
        if pictures:
            made = {
                "image": [parts.pil(32, seed) for seed in ask.prompts],
                "negative_prompt": [parts.pil(32, ask.negative)] * len(ask.prompts),
            }
        return made | {
            "height": 8, "width": 8, "num_images_per_prompt": ask.images, "num_inference_steps": ask.steps,
            "guidance_scale": 7.5 if ask.guided else 1.0, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
