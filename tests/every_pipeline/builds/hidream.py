"""HiDream-I1."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImageTransformer2DModel

from . import Ask, Built, builds, parts


@builds("HiDreamImagePipeline")
def hidream(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=32, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(8, 8), llama_layers=[0, 1, 1, 0],
    ).eval()  # fmt: skip
    texts = {f"{name}{i}": None for name in ("text_encoder", "tokenizer") for i in ("", "_2", "_3", "_4")}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False)
    pipe = kind(scheduler=scheduler, vae=parts.vae(), transformer=parts.randomise(transformer), **texts)
    pipe.default_sample_size = 8  # all sizes are scaled to this one

    def call(ask: Ask) -> dict:
        nothing = (ask.negative,) * len(ask.prompts)
        return {
            "prompt_embeds_t5": parts.stacked(ask.prompts, 6, 32),
            "prompt_embeds_llama3": parts.stacked(ask.prompts, 2, 6, 16).transpose(0, 1),
            "pooled_prompt_embeds": parts.stacked(ask.prompts, 32),
            "negative_prompt_embeds_t5": parts.stacked(nothing, 6, 32),
            "negative_prompt_embeds_llama3": parts.stacked(nothing, 2, 6, 16).transpose(0, 1),
            "negative_pooled_prompt_embeds": parts.stacked(nothing, 32), "num_images_per_prompt": ask.images,
            "guidance_scale": 5.0 if ask.guided else 1.0, "num_inference_steps": ask.steps,
            "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
