"""AuraFlow."""

from __future__ import annotations

import torch
from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

from . import Ask, Built, builds, parts

SIZE = 16
TEXT = 24


@builds("AuraFlowPipeline")
def aura_flow(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=SIZE, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=TEXT, caption_projection_dim=32,
        out_channels=4, pos_embed_max_size=64,
    ).eval()  # fmt: skip
    pipe = kind(
        tokenizer=None, text_encoder=None, vae=parts.vae(4), transformer=parts.randomise(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        mask = torch.ones(len(ask.prompts), 7)
        return parts.text(ask, 7, TEXT) | {
            "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask.clone(),
            "num_images_per_prompt": ask.images, "height": SIZE, "width": SIZE, "generator": parts.generator(),
            "num_inference_steps": ask.steps, "guidance_scale": 3.5 if ask.guided else 1.0, "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
