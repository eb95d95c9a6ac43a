"""unCLIP: a prior, a decoder and two U-Nets that enlarge what it made."""

from __future__ import annotations

import torch
from diffusers import UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel

from . import Ask, Built, builds, parts


def enlarge(seed: int) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=16, in_channels=6, out_channels=3, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=4, down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"), resnet_time_scale_shift="scale_shift",
        add_attention=False,
    ).eval()  # fmt: skip


@builds("UnCLIPPipeline", "UnCLIPImageVariationPipeline")
def unclip(kind: type) -> Built:
    pictures = "Image" in kind.__name__
    torch.manual_seed(0)
    decoder = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        cross_attention_dim=32, resnet_time_scale_shift="scale_shift", class_embed_type="identity",
    ).eval()  # fmt: skip
    torch.manual_seed(0)
    text_proj = UnCLIPTextProjModel(clip_embeddings_dim=32, time_embed_dim=64, cross_attention_dim=32)
    if pictures:
        before = {"image_encoder": parts.clip_vision(), "feature_extractor": None}
    else:
        scheduler = UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0)
        before = {"prior": parts.clip_prior(), "prior_scheduler": scheduler}
    pipe = kind(
        decoder=decoder, text_encoder=parts.clip_text(projection=True), tokenizer=parts.tokenizer(),
        text_proj=parts.randomise(text_proj).eval(), super_res_first=enlarge(0), super_res_last=enlarge(1),
        decoder_scheduler=UnCLIPScheduler(variance_type="learned_range"), super_res_scheduler=UnCLIPScheduler(),
        **before,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        steps = max(2, ask.steps)  # the scheduler cannot do one
        made = {
            "num_images_per_prompt": ask.images, "decoder_num_inference_steps": steps,
            "super_res_num_inference_steps": steps, "decoder_guidance_scale": 8.0 if ask.guided else 1.0,
            "generator": parts.generator(), "output_type": "np",
        }  # fmt: skip
        if pictures:
            return made | {"image": torch.cat([parts.picture(32, seed) for seed in ask.prompts])}
        return made | {
            "prompt": [parts.prompt(seed) for seed in ask.prompts], "prior_num_inference_steps": steps,
            "prior_guidance_scale": 4.0 if ask.guided else 1.0,
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, negative=False)
