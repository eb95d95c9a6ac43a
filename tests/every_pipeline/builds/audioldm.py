"""AudioLDM and MusicLDM: the text is a class embedding of the U-Net, whose cross-attention sees the picture itself."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from transformers import (
    ClapAudioConfig,
    ClapConfig,
    ClapModel,
    ClapTextConfig,
    ClapTextModelWithProjection,
)

from . import Ask, Built, builds, parts
from .audioldm2 import vocoder


def clap(music: bool) -> ClapModel | ClapTextModelWithProjection:
    """Only asked for its dtype when embeddings are given."""
    torch.manual_seed(0)
    text = ClapTextConfig(
        vocab_size=parts.WORDS + 4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        projection_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    if not music:
        return ClapTextModelWithProjection(text).eval()
    audio = ClapAudioConfig(
        spec_size=16, patch_size=4, patch_stride=[4, 4], hidden_size=8, projection_dim=16, window_size=2, depths=[1],
        num_attention_heads=[2], patch_embeds_hidden_size=8, num_mel_bins=4,
    )  # fmt: skip
    both = ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=16)
    return ClapModel(both).eval()


@builds("AudioLDMPipeline", "MusicLDMPipeline")
def audioldm(kind: type) -> Built:
    music = kind.__name__ == "MusicLDMPipeline"
    unet = parts.sd_unet(
        cross_attention_dim=(16, 32), class_embed_type="simple_projection", projection_class_embeddings_input_dim=32,
        class_embeddings_concat=True,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    extra = {"feature_extractor": None} if music else {}
    pipe = kind(
        vae=parts.vae(in_channels=1, out_channels=1), text_encoder=clap(music), tokenizer=None, unet=unet,
        scheduler=scheduler, vocoder=vocoder(), **extra,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        return parts.text(ask, 32) | {
            "num_waveforms_per_prompt": ask.images, "guidance_scale": 2.5 if ask.guided else 1.0,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "audio_length_in_s": 8 / 2**13,
            "output_type": "latent" if music else "np",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
