"""DiT, for classes of ImageNet."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel, DPMSolverMultistepScheduler

from . import Ask, Built, builds, parts


@builds("DiTPipeline")
def dit(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=16,
        patch_size=2,
    ).eval()  # fmt: skip
    pipe = kind(transformer=transformer, vae=parts.vae(4), scheduler=DPMSolverMultistepScheduler())

    def call(ask: Ask) -> dict:
        return {
            "class_labels": list(ask.prompts), "guidance_scale": 4.0 if ask.guided else 1.0,
            "generator": parts.generator(), "num_inference_steps": ask.steps, "output_type": "pt",
        }  # fmt: skip

    # several images of a class are several labels, and the unconditional class is fixed
    return Built(parts.quiet(pipe), call, images=False, negative=False)
