"""Stable Audio Open and Stable Audio 3."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderOobleck,
    AutoencoderSAME,
    CosineDPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableAudio3DiTModel,
    StableAudio3DurationEmbedder,
    StableAudioDiTModel,
    StableAudioProjectionModel,
)
from diffusers.utils import is_torchsde_available

from . import Ask, Built, builds, parts


@builds("StableAudioPipeline")
def stable_audio(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = StableAudioDiTModel(
        sample_size=16, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        num_key_value_attention_heads=1, out_channels=4, cross_attention_dim=16, time_proj_dim=16,
        global_states_input_dim=32, cross_attention_input_dim=16,
    ).eval()  # fmt: skip
    vae = AutoencoderOobleck(
        encoder_hidden_size=8, downsampling_ratios=[2, 2], channel_multiples=[1, 1], decoder_channels=8,
        decoder_input_channels=4, audio_channels=2, sampling_rate=16,
    ).eval()  # fmt: skip
    projection = StableAudioProjectionModel(text_encoder_dim=32, conditioning_dim=16, min_value=0, max_value=8)
    # the published one needs torchsde
    solver = CosineDPMSolverMultistepScheduler if is_torchsde_available() else EDMDPMSolverMultistepScheduler
    scheduler = solver(
        sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, sigma_schedule="exponential", prediction_type="v_prediction"
    )
    pipe = kind(vae, None, projection.eval(), None, parts.randomise(transformer), scheduler)

    def call(ask: Ask) -> dict:
        return parts.text(ask, 6, 32) | {
            "audio_end_in_s": 3.0, "num_waveforms_per_prompt": ask.images,
            "guidance_scale": 7.0 if ask.guided else 1.0, "num_inference_steps": ask.steps,
            "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)


@builds("StableAudio3Pipeline", "StableAudio3AudioToAudioPipeline", "StableAudio3InpaintPipeline")
def stable_audio3(kind: type) -> Built:
    again, inpaint = "AudioToAudio" in kind.__name__, "Inpaint" in kind.__name__
    torch.manual_seed(0)
    transformer = StableAudio3DiTModel(
        io_channels=4, embed_dim=32, depth=2, num_heads=2, cond_token_dim=32, global_cond_dim=32,
        local_add_cond_dim=5, timestep_features_dim=16, ff_mult=2.0, num_memory_tokens=2,
    ).eval()  # fmt: skip
    vae = AutoencoderSAME(
        audio_channels=2, patch_size=2, encoder_channels=8, encoder_c_mults=(2,), encoder_strides=(2,),
        encoder_transformer_depths=(1,), latent_dim=4, dim_heads=8, ff_mult=1, sampling_rate=16,
    ).eval()  # fmt: skip
    duration = StableAudio3DurationEmbedder(output_dim=32, fourier_dim=16, max_val=8.0).eval()
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = kind(
        vae=parts.randomise(vae), text_encoder=None, tokenizer=None, duration_embedder=duration,
        transformer=parts.randomise(transformer), scheduler=scheduler,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        count = len(ask.prompts)
        given = {
            "prompt_embeds": parts.stacked(ask.prompts, 6, 32), "duration": 4.0,
            "num_waveforms_per_prompt": ask.images, "num_inference_steps": ask.steps, "generator": parts.generator(),
            "output_type": "latent",
        }  # fmt: skip
        if again or inpaint:
            given["audio"] = torch.rand(1, 2, 64, generator=parts.generator(7)).repeat(count, 1, 1)
        if again:
            given["init_noise_level"] = 0.9
        elif inpaint:
            given |= {"mask_start_seconds": 1.0, "mask_end_seconds": 3.0}
        else:
            given["negative_prompt_embeds"] = parts.stacked((ask.negative,) * count, 6, 32)
            given["guidance_scale"] = 4.0 if ask.guided else 1.0
        return given

    guided = not again and not inpaint
    return Built(parts.quiet(pipe), call, guided=guided, negative=guided)
