"""LongCat-AudioDiT."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LongCatAudioDiTTransformer, LongCatAudioDiTVae

from . import Ask, Built, builds, parts


@builds("LongCatAudioDiTPipeline")
def longcat_audio(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=32, latent_dim=4, ff_mult=2.0
    ).eval()
    vae = LongCatAudioDiTVae(
        channels=4, c_mults=[1, 2], strides=[2, 2], latent_dim=4, encoder_latent_dim=8, downsampling_ratio=4,
        sample_rate=16,
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True)
    text_encoder = parts.t5_text(multilingual=True)
    pipe = kind(vae, text_encoder, parts.tokenizer(), parts.randomise(transformer), scheduler)

    def call(ask: Ask) -> dict:
        return parts.words(ask) | {
            "audio_duration_s": 4.0, "guidance_scale": 4.0 if ask.guided else 1.0, "num_inference_steps": ask.steps,
            "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, images=False)
