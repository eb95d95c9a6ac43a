"""DreamLite, base and distilled: one prompt; the image to edit, here zeros, is beside the latents in one picture."""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler
from diffusers.models.unets.unet_dreamlite import DreamLiteUNetModel

from . import Ask, Built, builds, parts

WIDTH = 32


@builds("DreamLitePipeline", "DreamLiteMobilePipeline")
def dreamlite(kind: type) -> Built:
    """
    The base computes the row of the negative prompt also where guidance is off, and fails for several images, whose
    size it does not repeat.
    """
    base = kind.__name__ == "DreamLitePipeline"
    torch.manual_seed(0)
    unet = DreamLiteUNetModel(
        sample_size=8, block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=24,
        transformer_layers_per_block=(1, 1, 2), encoder_hid_dim=WIDTH, encoder_hid_dim_type="text_proj_rms",
        attention_head_dim=(2, 2, 4), use_linear_projection=True, addition_embed_type="time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=16, ff_mult=2,
    )  # fmt: skip
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    pipe = kind(
        text_encoder=parts.qwen3_vl_text(WIDTH), tokenizer=parts.vision_tokenizer(), processor=None, vae=vae.eval(),
        unet=unet.eval(), scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        called = {
            "prompt": parts.prompt(ask.prompts[0]), "height": 16, "width": 16, "num_inference_steps": ask.steps,
            "num_images_per_prompt": ask.images, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip
        if base:
            called |= {"negative_prompt": parts.prompt(ask.negative), "guidance_scale": 3.5 if ask.guided else 1.0}
        return called

    return Built(parts.quiet(pipe), call, many=False, images=not base, guided=base, negative=base)
