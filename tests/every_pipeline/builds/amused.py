"""aMUSEd: a transformer of picture tokens, which it unmasks."""

from __future__ import annotations

import torch
from diffusers import AmusedScheduler, UVit2DModel

from . import Ask, Built, builds, parts


@builds("AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline")
def amused(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = UVit2DModel(
        hidden_size=32, cond_embed_dim=32, micro_cond_encode_dim=8, micro_cond_embed_dim=40, encoder_hidden_size=32,
        vocab_size=40, codebook_size=32, in_channels=16, block_out_channels=16, num_res_blocks=1, downsample=True,
        upsample=True, block_num_heads=2, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        sample_size=8,
    )  # fmt: skip
    vqvae = parts.movq(
        norm_type="group", up_block_types=["UpDecoderBlock2D"], num_vq_embeddings=32, lookup_from_codebook=True
    )
    pipe = kind(
        vqvae=vqvae, tokenizer=None, text_encoder=None, transformer=parts.randomise(transformer).eval(),
        scheduler=AmusedScheduler(mask_token_id=32),
    )  # fmt: skip
    name = kind.__name__

    def call(ask: Ask) -> dict:
        count = len(ask.prompts)
        made = {"height": 8, "width": 8, "num_inference_steps": ask.steps}
        if name != "AmusedPipeline":
            pictures = parts.picture(8).expand(count, -1, -1, -1)
            made = {"image": pictures, "strength": 0.5, "num_inference_steps": 2 * ask.steps}
        if name == "AmusedInpaintPipeline":
            made["mask_image"] = (parts.picture(8, 9)[:, :1] > 0.5).float().expand(count, -1, -1, -1)
        return parts.text(ask, 32) | made | {
            "encoder_hidden_states": parts.stacked(ask.prompts, 5, 32),
            "negative_encoder_hidden_states": parts.stacked((ask.negative,) * count, 5, 32),
            "num_images_per_prompt": ask.images, "guidance_scale": 10.0 if ask.guided else 1.0,
            "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
