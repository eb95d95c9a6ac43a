"""Flux 2 and Klein."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

from . import Ask, Built, builds, parts

SIZE = 64  # no reference picture may be smaller
TEXT = 24


def vae() -> AutoencoderKLFlux2:
    """Four times smaller, two channels."""
    torch.manual_seed(0)
    return AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=2, norm_num_groups=4, sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    ).eval()  # fmt: skip


def transformer(guidance: bool) -> Flux2Transformer2DModel:
    torch.manual_seed(0)
    return Flux2Transformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    ).eval()  # fmt: skip


@builds("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinKVPipeline", "Flux2KleinInpaintPipeline")
def flux2(kind: type) -> Built:
    name = kind.__name__
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), vae=vae(), text_encoder=None,
        tokenizer=None, transformer=transformer(name == "Flux2Pipeline"),
    )  # fmt: skip
    guided = name in ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline")  # the others are distilled

    def call(ask: Ask) -> dict:
        made = {
            "prompt_embeds": parts.stacked(ask.prompts, 7, TEXT), "num_images_per_prompt": ask.images,
            "height": SIZE, "width": SIZE, "generator": parts.generator(), "num_inference_steps": ask.steps,
            "output_type": "latent",
        }  # fmt: skip
        if guided:
            made["negative_prompt_embeds"] = parts.stacked((ask.negative,) * len(ask.prompts), 7, TEXT)
            made["guidance_scale"] = 4.0 if ask.guided else 1.0
        if "KV" in name:
            made["image"] = parts.pil(SIZE)
        if "Inpaint" in name:
            mask = torch.ones(1, 1, SIZE, SIZE)
            mask[..., : SIZE // 4] = 0
            made |= {"image": parts.picture(SIZE), "mask_image": mask}
            made |= {"strength": 0.5, "num_inference_steps": 2 * ask.steps}
        return made

    return Built(parts.quiet(pipe), call, guided=guided, negative=guided)
