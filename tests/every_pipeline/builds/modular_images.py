"""Image models with a single modular pipeline or two: Anima, ERNIE-Image, Flux 3, Ideogram 4, Krea 2, Z-Image."""

from __future__ import annotations

import torch
from diffusers import (
    AnimaTextConditioner,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux3Transformer2DModel,
    Krea2Transformer2DModel,
    ZImageTransformer2DModel,
)

from . import Ask, Built, builds, cosmos, ideogram, parts
from .modular import WITHOUT, assemble, guide


def common(ask: Ask, size: int = 64) -> dict:
    return {
        "num_images_per_prompt": ask.images, "num_inference_steps": ask.steps, "height": size, "width": size,
        "generator": parts.generator(), "output": "latents",
    }  # fmt: skip


@builds("AnimaModularPipeline")
def anima(kind: type) -> Built:
    torch.manual_seed(0)
    conditioner = AnimaTextConditioner(
        source_dim=24, target_dim=32, model_dim=32, num_layers=2, num_attention_heads=2, mlp_ratio=2.0,
        target_vocab_size=parts.WORDS, min_sequence_length=8,
    )  # fmt: skip
    pipe = assemble(
        kind, transformer=cosmos.transformer(4, extra_pos_embed_type=None, rope_scale=(1.0, 4.0, 4.0)),
        text_conditioner=parts.randomise(conditioner.eval()), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        guide(pipe, ask)
        given = common(ask)
        for prefix, seeds in (("", ask.prompts), ("negative_", (ask.negative,) * len(ask.prompts))):
            given |= {
                f"{prefix}qwen_prompt_embeds": parts.stacked(seeds, 6, 24),
                f"{prefix}qwen_attention_mask": torch.ones(len(seeds), 6).long(),
                f"{prefix}t5_input_ids": torch.tensor(
                    [[(7 * seed + i) % parts.WORDS for i in range(5)] for seed in seeds]
                ),
                f"{prefix}t5_attention_mask": torch.ones(len(seeds), 5).long(),
            }
        return given

    return Built(pipe, call)


@builds("Flux3ModularPipeline", "Flux3DistilledModularPipeline")
def flux3(kind: type) -> Built:
    torch.manual_seed(0)
    guided = "Distilled" not in kind.__name__
    transformer = Flux3Transformer2DModel(
        in_channels=16, cond_in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4),
        flow_map=not guided,
    )  # fmt: skip
    pipe = assemble(
        kind, without=(*WITHOUT, "prompt_upsampler"), transformer=parts.randomise(transformer.eval()),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.93),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        texts = parts.text(ask, 7, 32)
        if guided:
            guide(pipe, ask)
        else:
            del texts["negative_prompt_embeds"]
        return common(ask, 128) | texts

    return Built(pipe, call, guided=guided, negative=guided)


@builds("ErnieImageModularPipeline")
def ernie(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=64, in_channels=16, out_channels=16,
        text_in_dim=24, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    pipe = assemble(
        kind, without=(*WITHOUT, "prompt_enhancer"), transformer=parts.randomise(transformer.eval()),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        guide(pipe, ask)
        return common(ask, 128) | {
            "prompt_embeds": [parts.embeddings(seed, 6, 24) for seed in ask.prompts],
            "negative_prompt_embeds": [parts.embeddings(ask.negative, 4, 24)] * len(ask.prompts),
        }

    return Built(pipe, call)


@builds("Ideogram4ModularPipeline")
def ideogram4(kind: type) -> Built:
    pipe = assemble(
        kind, without=(*WITHOUT, "prompt_upsample"), transformer=ideogram.denoiser(0),
        unconditional_transformer=ideogram.denoiser(1), scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        return common(ask, 128) | {
            "text_features": parts.stacked(ask.prompts, 6, 13 * 16), "text_lengths": [6] * len(ask.prompts),
            "guidance_schedule": (7.0 if ask.guided else 1.0,) * ask.steps,
        }  # fmt: skip

    return Built(pipe, call, negative=False)


@builds("Krea2ModularPipeline", "Krea2TurboModularPipeline")
def krea2(kind: type) -> Built:
    torch.manual_seed(0)
    guided = "Turbo" not in kind.__name__
    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=32, num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1, axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    pipe = assemble(
        kind, transformer=parts.randomise(transformer.eval()),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=6400
        ),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        texts, mask = parts.text(ask, 6, 3, 16), torch.ones(len(ask.prompts), 6, dtype=torch.bool)
        if guided:
            guide(pipe, ask)
            texts["negative_prompt_embeds_mask"] = mask
        else:
            del texts["negative_prompt_embeds"]
        return common(ask) | texts | {"prompt_embeds_mask": mask}

    return Built(pipe, call, guided=guided, negative=guided)


@builds("ZImageModularPipeline")
def z_image(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
        axes_dims=[4, 6, 6], axes_lens=[128, 32, 32],
    )  # fmt: skip
    pipe = assemble(
        kind, without=(*WITHOUT, "vae_encoder"), transformer=parts.randomise(transformer.eval()),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        guide(pipe, ask)
        return common(ask) | {
            "prompt_embeds": [parts.embeddings(seed, 6, 24) for seed in ask.prompts],
            "negative_prompt_embeds": [parts.embeddings(ask.negative, 4, 24)] * len(ask.prompts),
        }

    return Built(pipe, call)
