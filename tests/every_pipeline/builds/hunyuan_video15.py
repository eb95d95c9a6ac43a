"""HunyuanVideo 1.5 pipelines."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Transformer3DModel,
)
from transformers import SiglipVisionConfig, SiglipVisionModel

from . import Ask, Built, builds, parts


@builds("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline")
def hunyuan_video15(kind: type) -> Built:
    from_image = "ImageToVideo" in kind.__name__
    torch.manual_seed(0)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=32, text_embed_2_dim=16, image_embed_dim=16,
        rope_axes_dim=(4, 4, 4), target_size=32, task_type="i2v" if from_image else "t2v",
    ).eval()  # fmt: skip
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8), layers_per_block=1, spatial_compression_ratio=4
    ).eval()
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    vision = {}
    if from_image:
        from transformers import SiglipImageProcessor

        config = SiglipVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16,
            patch_size=8,
        )  # fmt: skip
        vision["image_encoder"] = SiglipVisionModel(config).eval()
        vision["feature_extractor"] = SiglipImageProcessor(size={"height": 16, "width": 16})
    pipe = kind(
        **nothing, **vision, transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )  # fmt: skip
    pipe.vision_num_semantic_tokens = 4

    def call(ask: Ask) -> dict:
        pipe.guider.guidance_scale = 6.0 if ask.guided else 1.0  # the call has no argument for it
        count = len(ask.prompts)
        negatives = (ask.negative,) * count
        picture = {"image": parts.pil()} if from_image else {"height": 32, "width": 32}
        return picture | {
            "prompt_embeds": parts.stacked(ask.prompts, 8, 32), "prompt_embeds_mask": torch.ones(count, 8),
            "prompt_embeds_2": parts.stacked(ask.prompts, 4, 16), "prompt_embeds_mask_2": torch.ones(count, 4),
            "negative_prompt_embeds": parts.stacked(negatives, 8, 32),
            "negative_prompt_embeds_mask": torch.ones(count, 8),
            "negative_prompt_embeds_2": parts.stacked(negatives, 4, 16),
            "negative_prompt_embeds_mask_2": torch.ones(count, 4), "num_frames": 5, "num_inference_steps": ask.steps,
            "num_videos_per_prompt": ask.images, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, images=from_image)  # without a picture it fills in one for each prompt only
