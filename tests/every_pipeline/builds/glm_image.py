"""GLM-Image."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, GlmImageTransformer2DModel

from . import Ask, Built, builds, parts


@builds("GlmImagePipeline")
def glm_image(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = GlmImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        text_embed_dim=32, time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=32,
    )  # fmt: skip
    vae = parts.vae(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    pipe = kind(
        parts.tokenizer(), None, parts.t5_text(), None, vae, parts.randomise(transformer.eval()), scheduler
    )  # the vision language model would make the prior tokens

    def call(ask: Ask) -> dict:
        images = len(ask.prompts) * ask.images
        prior = [torch.randint(32, (16,), generator=parts.generator(seed)) for seed in ask.prompts]
        return {
            "prompt": [f'"{parts.prompt(seed)}"' for seed in ask.prompts], "prior_token_ids": torch.stack(prior),
            # repeated, since the pipeline doesn't
            "negative_prompt_embeds": parts.stacked((ask.negative,) * images, 4, 32), "height": 8, "width": 8,
            "num_images_per_prompt": ask.images, "guidance_scale": 1.5 if ask.guided else 1.0,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
