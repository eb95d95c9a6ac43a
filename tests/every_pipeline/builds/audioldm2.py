"""AudioLDM 2: a U-Net with cross-attention to two texts."""

from __future__ import annotations

import torch
from diffusers import AudioLDM2UNet2DConditionModel, DDIMScheduler
from transformers import GPT2Config, GPT2LMHeadModel, SpeechT5HifiGan, SpeechT5HifiGanConfig

from . import Ask, Built, builds, parts


def vocoder() -> SpeechT5HifiGan:
    """One that makes two samples of each of 8 columns; a rate that is a power of two divides exactly."""
    torch.manual_seed(0)
    config = SpeechT5HifiGanConfig(
        model_in_dim=8, sampling_rate=2**14, upsample_initial_channel=8, upsample_rates=[2], upsample_kernel_sizes=[4],
        resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]], normalize_before=False,
        initializer_range=0.3,
    )  # fmt: skip
    return SpeechT5HifiGan(config).eval()


@builds("AudioLDM2Pipeline")
def audioldm2(kind: type) -> Built:
    torch.manual_seed(0)
    unet = AudioLDM2UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=((None, 16, 32), (None, 16, 32)),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    gpt = GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    scheduler = DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipe = kind(
        vae=parts.vae(in_channels=1, out_channels=1), text_encoder=None, text_encoder_2=parts.t5_text(),
        projection_model=None, language_model=GPT2LMHeadModel(gpt).eval(), tokenizer=None, tokenizer_2=None,
        feature_extractor=None, unet=unet, scheduler=scheduler, vocoder=vocoder(),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        generated = {f"generated_{key}": value for key, value in parts.text(ask, 8, 16).items()}
        generated["negative_generated_prompt_embeds"] = generated.pop("generated_negative_prompt_embeds")
        return parts.text(ask, 5, 32) | generated | {
            "num_waveforms_per_prompt": ask.images, "guidance_scale": 3.5 if ask.guided else 1.0,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "audio_length_in_s": 8 / 2**13,
            "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
