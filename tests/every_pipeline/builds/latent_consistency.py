"""Latent consistency models: the guidance strength is an embedding, not a second row."""

from __future__ import annotations

from diffusers import LCMScheduler

from . import Ask, Built, builds, parts
from .stable_diffusion import BETAS, NOTHING, UNCHECKED, pictures, run, text


@builds("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline")
def latent_consistency(kind: type) -> Built:
    net = parts.sd_unet(time_cond_proj_dim=16)
    scheduler = LCMScheduler(**BETAS, set_alpha_to_one=True)
    pipe = kind(vae=parts.vae(), unet=net, scheduler=scheduler, **NOTHING, **UNCHECKED)

    def call(ask: Ask) -> dict:
        called = run(ask) | {"prompt_embeds": text(ask)["prompt_embeds"], "guidance_scale": 8.5}
        return called | ({"image": pictures(ask)} if "Img2Img" in kind.__name__ else {})

    return Built(parts.quiet(pipe), call, guided=False, negative=False)
