"""Lumina Next and Lumina 2."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel, LuminaNextDiT2DModel
from transformers import Gemma2Config, Gemma2Model, GemmaConfig, GemmaModel

from . import Ask, Built, builds, parts

SIZE = 64  # the pipelines take it that latents are eight times smaller
TEXT = 24


def vae():
    return parts.vae(
        4, block_out_channels=[8] * 4, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1,
    )  # fmt: skip


def options(ask: Ask) -> dict:
    return {
        "num_images_per_prompt": ask.images, "height": SIZE, "width": SIZE, "generator": parts.generator(),
        "num_inference_steps": ask.steps, "guidance_scale": 4.0 if ask.guided else 1.0, "output_type": "latent",
    }  # fmt: skip


@builds("LuminaPipeline")
def lumina(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = LuminaNextDiT2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_attention_heads=4,
        num_kv_heads=2, multiple_of=16, learn_sigma=True, qk_norm=True, cross_attention_dim=TEXT,
    ).eval()  # fmt: skip
    # masks that are passed in are not repeated for several images of a prompt, so that it must encode
    config = GemmaConfig(
        vocab_size=parts.WORDS + 4, hidden_size=TEXT, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=256,
    )  # fmt: skip
    gemma = GemmaModel(config).eval()
    pipe = kind(
        transformer=parts.randomise(transformer), scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(),
        text_encoder=gemma, tokenizer=parts.tokenizer(),
    )  # fmt: skip
    return Built(parts.quiet(pipe), lambda ask: parts.words(ask) | options(ask) | {"clean_caption": False})


@builds("Lumina2Pipeline")
def lumina2(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(64, 64, 64),
        cap_feat_dim=TEXT,
    ).eval()  # fmt: skip
    torch.manual_seed(0)
    # embeddings that are passed in are not repeated for several images of a prompt, so that it must encode
    config = Gemma2Config(
        vocab_size=parts.WORDS + 4, hidden_size=TEXT, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    gemma = Gemma2Model(config).eval()
    pipe = kind(
        transformer=parts.randomise(transformer), scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0), vae=vae(),
        text_encoder=gemma, tokenizer=parts.tokenizer(),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        return parts.words(ask) | options(ask) | {"system_prompt": "w1", "max_sequence_length": 16}

    return Built(parts.quiet(pipe), call)
