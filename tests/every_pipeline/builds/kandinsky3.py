"""Kandinsky 3."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, Kandinsky3UNet

from . import Ask, Built, builds, parts


@builds("Kandinsky3Pipeline", "Kandinsky3Img2ImgPipeline")
def kandinsky3(kind: type) -> Built:
    torch.manual_seed(0)
    unet = Kandinsky3UNet(
        time_embedding_dim=32, groups=4, attention_head_dim=8, layers_per_block=2, block_out_channels=(16, 16, 32, 32),
        cross_attention_dim=32, encoder_hid_dim=32,
    ).eval()  # fmt: skip
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        beta_start=0.0001,
        beta_end=0.02,
        clip_sample=True,
        variance_type="fixed_small",
    )
    pipe = kind(parts.tokenizer(128), parts.t5_text(), parts.randomise(unet, std=0.05), scheduler, parts.movq())

    def call(ask: Ask) -> dict:
        made = {"height": 64, "width": 64, "num_inference_steps": ask.steps}
        if "Img2Img" in kind.__name__:
            made = {"image": [parts.pil(8)] * len(ask.prompts), "strength": 0.5, "num_inference_steps": 2 * ask.steps}
        return parts.words(ask) | made | {
            "num_images_per_prompt": ask.images, "guidance_scale": 3.0 if ask.guided else 1.0,
            "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
