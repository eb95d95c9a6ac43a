"""Sana and Sana Sprint."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaControlNetModel,
    SanaTransformer2DModel,
    SCMScheduler,
)

from . import Ask, Built, builds, parts

SIZE = 32
TEXT = 40


def vae() -> AutoencoderDC:
    """Four times smaller, four channels."""
    torch.manual_seed(0)
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 16), decoder_block_out_channels=(8, 8, 16),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()), scaling_factor=0.4,
    ).eval()  # fmt: skip


def shape() -> dict:
    return {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 8,
        "num_cross_attention_heads": 4, "cross_attention_head_dim": 8, "cross_attention_dim": 32,
        "caption_channels": TEXT, "sample_size": SIZE // 4,
    }  # fmt: skip


@builds("SanaPipeline", "SanaControlNetPipeline", "SanaSprintPipeline", "SanaSprintImg2ImgPipeline")
def sana(kind: type) -> Built:
    name = kind.__name__
    sprint = "Sprint" in name
    special = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads", "timestep_scale": 1000.0} if sprint else {}
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(num_layers=2, **shape(), **special).eval()
    if sprint:
        scheduler = SCMScheduler(prediction_type="trigflow", sigma_data=0.5)
    else:
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
        )
    extra = {}
    if "ControlNet" in name:
        torch.manual_seed(1)
        extra["controlnet"] = parts.randomise(SanaControlNetModel(num_layers=1, **shape()).eval())
    pipe = kind(tokenizer=None, text_encoder=None, vae=vae(), transformer=transformer, scheduler=scheduler, **extra)

    def call(ask: Ask) -> dict:
        mask = torch.ones(len(ask.prompts), 7)
        mask[:, -2:] = 0
        made = {
            "prompt_embeds": parts.stacked(ask.prompts, 7, TEXT), "prompt_attention_mask": mask,
            "num_images_per_prompt": ask.images, "height": SIZE, "width": SIZE, "generator": parts.generator(),
            "num_inference_steps": ask.steps, "guidance_scale": 4.5 if ask.guided else 1.0, "output_type": "latent",
            "use_resolution_binning": False,
        }  # fmt: skip
        if sprint:
            made["intermediate_timesteps"] = 1.3 if ask.steps == 2 else None
            if "Img2Img" in name:
                made |= {"image": parts.picture(SIZE), "strength": 0.5, "num_inference_steps": 2 * ask.steps}
                made["intermediate_timesteps"] = 1.3 if 2 * ask.steps == 2 else None
        else:
            made["negative_prompt"] = None
            made["negative_prompt_embeds"] = parts.stacked((ask.negative,) * len(ask.prompts), 7, TEXT)
            made["negative_prompt_attention_mask"] = mask.clone()
        if "ControlNet" in name:
            made["control_image"] = parts.picture(SIZE, 8)
        return made

    return Built(parts.quiet(pipe), call, guided=not sprint, negative=not sprint)
