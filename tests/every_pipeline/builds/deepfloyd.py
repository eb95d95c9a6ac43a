"""DeepFloyd IF: its pipelines denoise pictures, not latents."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from . import Ask, Built, builds, parts


@builds(
    "IFPipeline",
    "IFImg2ImgPipeline",
    "IFInpaintingPipeline",
    "IFSuperResolutionPipeline",
    "IFImg2ImgSuperResolutionPipeline",
    "IFInpaintingSuperResolutionPipeline",
)
def deepfloyd(kind: type) -> Built:
    name = kind.__name__
    larger, changes = "SuperResolution" in name, "Img2Img" in name or "Inpaint" in name
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=6 if larger else 3, out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=8, act_fn="gelu",
        cross_attention_dim=32, resnet_time_scale_shift="scale_shift", encoder_hid_dim=32,
        encoder_hid_dim_type="text_proj", addition_embed_type="text", addition_embed_type_num_heads=4,
        cross_attention_norm="group_norm", class_embed_type="timestep" if larger else None,
        only_cross_attention=larger, resnet_skip_time_act=larger, resnet_out_scale_factor=1.414 if larger else 1.0,
    ).eval()  # fmt: skip
    scheduler = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True,
        dynamic_thresholding_ratio=0.95, sample_max_value=1.5,
    )  # fmt: skip
    extra = {"image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2")} if larger else {}
    pipe = kind(
        tokenizer=None, text_encoder=None, unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        watermarker=None, requires_safety_checker=False, **extra,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        def pictures(size: int, seed: int) -> torch.Tensor:
            return parts.picture(size, seed).expand(len(ask.prompts), -1, -1, -1) * 2 - 1

        made = parts.text(ask, 5, 32) | {
            "num_images_per_prompt": ask.images, "guidance_scale": 5.0 if ask.guided else 1.0,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "output_type": "pt",
        }  # fmt: skip
        if larger:
            made |= {"image": pictures(4, 7), "noise_level": 100} | ({} if changes else {"height": 8, "width": 8})
        if changes:
            made |= {"original_image" if larger else "image": pictures(8, 8)}
            made |= {"strength": 0.5, "num_inference_steps": 2 * ask.steps}
        if "Inpaint" in name:
            made["mask_image"] = (parts.picture(8, 9)[:, :1] > 0.5).float()
        return made

    return Built(parts.quiet(pipe), call)
