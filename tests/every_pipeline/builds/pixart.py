"""PixArt alpha and sigma."""

from __future__ import annotations

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

from . import Ask, Built, builds, parts

SIZE = 16
TEXT = 40


@builds("PixArtAlphaPipeline", "PixArtSigmaPipeline")
def pixart(kind: type) -> Built:
    alpha = "Alpha" in kind.__name__
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, patch_size=2,
        cross_attention_dim=24, caption_channels=TEXT, sample_size=128 if alpha else SIZE,
        use_additional_conditions=alpha,  # sizes, which alpha is told where it paints 1024 pixels
    ).eval()  # fmt: skip
    pipe = kind(
        tokenizer=None, text_encoder=None, vae=parts.vae(4), transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        mask = torch.ones(len(ask.prompts), 7)
        mask[:, -2:] = 0
        return parts.text(ask, 7, TEXT) | {
            "negative_prompt": None, "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask.clone(),
            "num_images_per_prompt": ask.images, "height": SIZE, "width": SIZE, "generator": parts.generator(),
            "num_inference_steps": ask.steps, "guidance_scale": 4.5 if ask.guided else 1.0, "output_type": "latent",
            "use_resolution_binning": False,
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
