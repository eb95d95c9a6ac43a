"""Shap-E: its pipelines denoise the parameters of a shape, which the seeds of the prompts or pictures choose."""

from __future__ import annotations

import torch
from diffusers import HeunDiscreteScheduler

from . import Ask, Built, builds, parts


@builds("ShapEPipeline", "ShapEImg2ImgPipeline")
def shap_e(kind: type) -> Built:
    pictures = "Img2Img" in kind.__name__
    prior = parts.clip_prior(
        6, embedding_dim=16, additional_embeddings=0, embedding_proj_dim=32, clip_embed_dim=32, time_embed_dim=64,
        time_embed_act_fn="gelu", norm_in_type="layer", encoder_hid_proj_type=None, added_emb_type=None,
        embedding_proj_norm_type="layer" if pictures else None,
    )  # fmt: skip
    if pictures:
        encoders = {"image_encoder": parts.clip_vision(projection=False), "image_processor": parts.clip_pictures()}
    else:
        encoders = {"text_encoder": parts.clip_text(projection=True), "tokenizer": parts.tokenizer()}
    scheduler = HeunDiscreteScheduler(
        beta_schedule="exp", prediction_type="sample", use_karras_sigmas=True, clip_sample=True, clip_sample_range=1.0
    )
    pipe = kind(prior=prior, scheduler=scheduler, shap_e_renderer=None, **encoders)

    def call(ask: Ask) -> dict:
        if pictures:
            made = {"image": torch.cat([parts.picture(32, seed) for seed in ask.prompts])}
        else:
            made = {"prompt": [parts.prompt(seed) for seed in ask.prompts]}
        return made | {
            "num_images_per_prompt": ask.images, "guidance_scale": 4.0 if ask.guided else 1.0,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, negative=False)  # what is guided away from is zeros
