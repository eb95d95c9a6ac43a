"""Bria 3 and Fibo."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLWan,
    BriaFibo2Transformer2DModel,
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from . import Ask, Built, builds, flux2, parts

TEXT = 24


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)


def shape() -> dict:
    return {
        "patch_size": 1, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "guidance_embeds": False, "axes_dims_rope": [4, 6, 6],
    }  # fmt: skip


def options(ask: Ask, size: int) -> dict:
    return {
        "num_images_per_prompt": ask.images, "height": size, "width": size, "generator": parts.generator(),
        "num_inference_steps": ask.steps, "guidance_scale": 5.0 if ask.guided else 1.0, "output_type": "latent",
    }  # fmt: skip


@builds("BriaPipeline")
def bria(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = BriaTransformer2DModel(joint_attention_dim=TEXT, **shape()).eval()
    # embeddings that are passed in are not repeated for several images of a prompt, so that it must encode
    pipe = kind(
        transformer=parts.randomise(transformer), scheduler=scheduler(), vae=parts.vae(1), text_encoder=parts.t5(TEXT),
        tokenizer=parts.tokenizer(),
    )  # fmt: skip
    return Built(parts.quiet(pipe), lambda ask: parts.words(ask) | options(ask, 16) | {"max_sequence_length": 16})


@builds("BriaFiboPipeline", "BriaFiboEditPipeline")
def fibo(kind: type) -> Built:
    edit = "Edit" in kind.__name__
    torch.manual_seed(0)
    transformer = BriaFiboTransformer2DModel(joint_attention_dim=2 * TEXT, text_encoder_dim=TEXT, **shape()).eval()
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1] * 5, num_res_blocks=1, temperal_downsample=[False] * 4,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scale_factor_spatial=16,
    ).eval()  # fmt: skip
    # each block of the transformer is given one layer of this: its embeddings and four layers are more than enough
    config = SmolLM3Config(
        vocab_size=parts.WORDS + 4, hidden_size=TEXT, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    language = SmolLM3ForCausalLM(config).eval()
    pipe = kind(
        transformer=parts.randomise(transformer), scheduler=scheduler(), vae=vae, text_encoder=language,
        tokenizer=parts.tokenizer(64),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        made = parts.words(ask) | options(ask, 128) | {"max_sequence_length": 64}
        if edit:
            made["prompt"] = [f'{{"edit_instruction": "{words}"}}' for words in made["prompt"]]
            made["image"] = parts.pil(64)
        return made

    return Built(parts.quiet(pipe), call)


@builds("BriaFibo2Pipeline")
def fibo2(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = BriaFibo2Transformer2DModel(
        in_channels=2, patch_size=2, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=TEXT,
        injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=2,
        gist_min_text_len=4, gist_max_text_len=16, axes_dims=(4, 6, 6), axes_lens=(32, 32, 32),
    ).eval()  # fmt: skip
    pipe = kind(
        transformer=parts.randomise(transformer), scheduler=scheduler(), vae=flux2.vae(), text_encoder=None,
        processor=None,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        # for the Perceiver and for the one block that reads text
        return parts.text(ask, 2, 7, TEXT) | options(ask, 64)

    return Built(parts.quiet(pipe), call)
