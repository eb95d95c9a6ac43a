"""CogView 3 Plus and CogView 4."""

from __future__ import annotations

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import GlmConfig, GlmModel

from . import Ask, Built, builds, parts

SIZES = {
    "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4, "text_embed_dim": 32, "time_embed_dim": 16,
    "condition_dim": 8, "pos_embed_max_size": 16, "sample_size": 8, "patch_size": 2,
}  # fmt: skip


@builds("CogView3PlusPipeline")
def cogview3(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = CogView3PlusTransformer2DModel(in_channels=4, out_channels=4, **SIZES).eval()
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=True,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=4.0, timestep_spacing="linspace",
    )  # fmt: skip
    pipe = kind(parts.tokenizer(), parts.t5_text(), parts.vae(), transformer, scheduler)

    def call(ask: Ask) -> dict:
        # words, since negative embeddings are replaced by zeros
        return {
            "prompt": [parts.prompt(seed) for seed in ask.prompts],
            "negative_prompt": [parts.prompt(ask.negative)] * len(ask.prompts),
            "num_images_per_prompt": ask.images, "guidance_scale": 5.0 if ask.guided else 1.0,
            "num_inference_steps": ask.steps, "max_sequence_length": 8, "generator": parts.generator(),
            "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)


def glm() -> GlmModel:
    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=parts.WORDS + 4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GlmModel(config).eval()


@builds("CogView4Pipeline", "CogView4ControlPipeline")
def cogview4(kind: type) -> Built:
    control = "Control" in kind.__name__
    torch.manual_seed(0)
    transformer = CogView4Transformer2DModel(
        in_channels=8 if control else 4, out_channels=4, rope_axes_dim=(16, 16), **SIZES
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    pipe = kind(parts.tokenizer(), glm(), parts.vae(), transformer, scheduler)

    def call(ask: Ask) -> dict:
        torch.manual_seed(0)  # the control image's latents are sampled without the generator
        # words, since negative embeddings are not repeated for several images
        return ({"control_image": parts.pil(16)} if control else {}) | {
            "prompt": [parts.prompt(seed) for seed in ask.prompts], "height": 16, "width": 16,
            "negative_prompt": [parts.prompt(ask.negative)] * len(ask.prompts), "max_sequence_length": 16,
            "num_images_per_prompt": ask.images, "guidance_scale": 5.0 if ask.guided else 1.0,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
