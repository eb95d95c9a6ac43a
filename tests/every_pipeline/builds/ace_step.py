"""ACE-Step."""

from __future__ import annotations

import torch
from diffusers import AceStepTransformer1DModel, AutoencoderOobleck, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from transformers import Qwen3Config, Qwen3Model

from . import Ask, Built, builds, parts

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "sliding_window": 8,
}  # fmt: skip


@builds("AceStepPipeline")
def ace_step(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = AceStepTransformer1DModel(
        num_hidden_layers=2, in_channels=12, audio_acoustic_hidden_dim=4, patch_size=2, **SIZES
    ).eval()
    conditions = AceStepConditionEncoder(
        text_hidden_dim=32, timbre_hidden_dim=4, num_lyric_encoder_hidden_layers=2,
        num_timbre_encoder_hidden_layers=2, **SIZES,
    ).eval()  # fmt: skip
    conditions.silence_latent.normal_(generator=parts.generator())  # that of silence is read from its weights
    vae = AutoencoderOobleck(
        encoder_hidden_size=8, downsampling_ratios=[2, 2], channel_multiples=[1, 1], decoder_channels=8,
        decoder_input_channels=4, audio_channels=2, sampling_rate=16,
    ).eval()  # fmt: skip
    text_encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=parts.WORDS + 4, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
        )
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)
    pipe = kind(vae, text_encoder, parts.tokenizer(), parts.randomise(transformer), conditions, scheduler)

    def call(ask: Ask) -> dict:
        return {
            "prompt": [parts.prompt(seed) for seed in ask.prompts], "lyrics": ["w1 w2"] * len(ask.prompts),
            "audio_duration": 4.0, "guidance_scale": 7.0 if ask.guided else 1.0, "num_inference_steps": ask.steps,
            "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, images=False, negative=False)
