"""PRX, with latents and with pixels."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PRXPipeline
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel

from . import Ask, Built, builds, parts


@builds("PRXPipeline", "PRXPixelPipeline")
def prx(kind: type) -> Built:
    latent = kind is PRXPipeline
    torch.manual_seed(0)
    transformer = PRXTransformer2DModel(
        in_channels=4 if latent else 3, patch_size=2, context_in_dim=32, hidden_size=32, mlp_ratio=2.0, num_heads=4,
        depth=2, axes_dim=[4, 4], **({} if latent else {"bottleneck_size": 16, "resolution_embeds": True}),
    )  # fmt: skip
    transformer = parts.randomise(transformer.eval())
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = kind(transformer, scheduler, None, None, **({"vae": parts.vae()} if latent else {}))

    def call(ask: Ask) -> dict:
        return parts.text(ask, 6, 32) | {
            "height": 16, "width": 16, "use_resolution_binning": False, "num_images_per_prompt": ask.images,
            "guidance_scale": 4.0 if ask.guided else 1.0, "num_inference_steps": ask.steps,
            "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    # with guidance it makes two times, whatever the batch: more than one image fails
    return Built(parts.quiet(pipe), call, many=False, images=False)
