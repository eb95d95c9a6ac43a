"""Marigold: depth, normals and materials of an image; each image is a prompt, the text is always empty."""

from __future__ import annotations

import torch

from . import Ask, Built, builds, parts
from .stable_diffusion import SIZE, WIDTH, ddim


@builds("MarigoldDepthPipeline", "MarigoldNormalsPipeline", "MarigoldIntrinsicsPipeline")
def marigold(kind: type) -> Built:
    name = kind.__name__
    kinds = {"MarigoldDepthPipeline": "depth", "MarigoldNormalsPipeline": "normals"}
    changes, extra = {"in_channels": 8}, {"prediction_type": kinds.get(name, "intrinsics")}
    if name == "MarigoldIntrinsicsPipeline":
        changes = {"in_channels": 12, "out_channels": 8}
        extra["target_properties"] = {"target_names": ["albedo", "shading"]}
    if name == "MarigoldDepthPipeline":
        extra |= {"scale_invariant": True, "shift_invariant": True}
    scheduler = ddim(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    pipe = kind(
        unet=parts.sd_unet(**changes), vae=parts.vae(), scheduler=scheduler, tokenizer=parts.tokenizer(),
        text_encoder=parts.clip_text(WIDTH), **extra,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        return {
            "image": torch.cat([parts.picture(SIZE, seed) for seed in ask.prompts]), "batch_size": len(ask.prompts),
            "num_inference_steps": ask.steps, "processing_resolution": 0, "generator": parts.generator(),
            "output_type": "pt", "output_latent": True,
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, images=False, guided=False, negative=False)
