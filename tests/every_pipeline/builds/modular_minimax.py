"""MiniMax-H3, for video with sound, and MiniMax-Music 3, modular."""

from __future__ import annotations

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    MiniMaxH3Scheduler,
    MiniMaxH3Transformer3DModel,
    MiniMaxMusic3ConditionEncoder,
    MiniMaxMusic3Transformer1DModel,
)

from . import Ask, Built, builds, parts
from .modular import WITHOUT, assemble, guide


@builds("MiniMaxH3ModularPipeline")
def minimax_h3(kind: type) -> Built:
    """Distilled; text, sound and video are one sequence, without a batch dimension."""
    torch.manual_seed(0)
    transformer = MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=16, hidden_size=32, num_layers=2, num_refiner_layers=1, ffn_dim=64,
        in_channels=24, audio_in_channels=32, text_dim=24, freq_dim=16, time_embed_hidden_dim=32, time_embed_dim=16,
        rope_freq_dim=2,
    )  # fmt: skip
    pipe = assemble(
        kind, without=(*WITHOUT, "before_encode", "vae_encoder"), transformer=parts.randomise(transformer.eval()),
        scheduler=MiniMaxH3Scheduler(shift=12.0), audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        return {
            "prompt_embeds": parts.stacked(ask.prompts[:1], 6, 24), "text_token_tags": torch.full((6,), pipe.text_tag),
            "height": 32, "width": 64, "num_frames": 124,  # the shortest that it makes
            "num_inference_steps": ask.steps + 1,  # the last of these is not done
            "generator": parts.generator(), "output": ["latents", "audio_latents"],
        }  # fmt: skip

    return Built(pipe, call, many=False, images=False, guided=False, negative=False)


@builds("MiniMaxMusic3ModularPipeline")
def minimax_music3(kind: type) -> Built:
    """From what the language model made of the words, in two windows, each denoised in all steps."""
    torch.manual_seed(0)
    transformer = MiniMaxMusic3Transformer1DModel(
        in_channels=8, condition_dim=16, num_layers=2, num_attention_heads=2, attention_head_dim=16, ff_inner_dim=64,
        rotary_dim=8, fourier_embedding_dim=16,
    )  # fmt: skip
    encoder = MiniMaxMusic3ConditionEncoder(condition_hidden_dim=12, num_condition_layers=2, out_dim=16)
    pipe = assemble(
        kind, without=("semantic_generator", "decode"), transformer=parts.randomise(transformer.eval()),
        condition_encoder=parts.randomise(encoder.eval()),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, invert_sigmas=True),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        guide(pipe, ask, 1.7)
        return {
            "frame_hiddens": parts.stacked(ask.prompts[:1], 220, 2 * 12), "num_inference_steps": ask.steps,
            "generator": parts.generator(), "output": "latent_chunks",
        }  # fmt: skip

    return Built(pipe, call, many=False, images=False, negative=False)
