"""Kandinsky 6: video with audio, and super-resolution."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky6SRLatentUpscalerBank,
    Kandinsky6SRTransformer3DModel,
    Kandinsky6SRVAE,
    Kandinsky6Transformer3DModel,
    MMAudioVAE,
    MMAudioVocoder,
    PiflowScheduler,
)

from . import Ask, Built, builds, parts


@builds("Kandinsky6TI2VAPipeline")
def kandinsky6(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=32, in_text_dim2=16, time_dim=16, model_dim=32, ff_dim=64,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), in_audio_dim=6, out_audio_dim=6, model_dim_a=16,
        time_dim_a=16, ff_dim_a=32, axes_dims_a=(2, 3, 3), visual_token_type_num_embeddings=2,
    ).eval()  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8,) * 4, layers_per_block=1,
        norm_num_groups=4, scaling_factor=0.5,
    ).eval()  # fmt: skip
    sound = MMAudioVAE(
        mel_bins=8, latent_channels=6, hidden_channels=8, channel_multipliers=(1, 1), layers_per_block=1,
        sample_rate=16000, n_fft=64, hop_length=512,
    ).eval()  # fmt: skip
    vocoder = MMAudioVocoder(
        num_mels=8, upsample_initial_channel=8, upsample_rates=(4,), upsample_kernel_sizes=(8,),
        resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1,),),
    ).eval()  # fmt: skip
    pipe = kind(
        parts.randomise(transformer), vae, None, None, None, None, FlowMatchEulerDiscreteScheduler(shift=5.0),
        audio_vae=sound, vocoder=vocoder,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        count = len(ask.prompts)
        nothing = (ask.negative,) * count
        return parts.text(ask, 6, 32) | {
            "pooled_prompt_embeds": parts.stacked(ask.prompts, 16),
            "negative_pooled_prompt_embeds": parts.stacked(nothing, 16), "image": [parts.pil(64)] * count,
            "height": 64, "width": 64, "num_frames": 9, "num_videos_per_prompt": ask.images,
            "guidance_scale": 5.0 if ask.guided else 1.0, "num_inference_steps": ask.steps,
            "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)


@builds("Kandinsky6SRPipeline")
def kandinsky6_sr(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = Kandinsky6SRTransformer3DModel(
        in_visual_dim=4, out_visual_dim=40, time_dim=16, model_dim=32, ff_dim=64, num_visual_blocks=2,
        axes_dims=(4, 6, 6), nabla_window=(3, 3, 3), tile_sizes=((32, 32),),
    ).eval()  # fmt: skip
    vae = Kandinsky6SRVAE(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        layers_per_block=1, temporal_compression_ratio=2,
    ).eval()  # fmt: skip
    upscaler = Kandinsky6SRLatentUpscalerBank(
        in_channels=4, stage_channels=(8, 8, 8), num_pre_blocks=1, num_mid_blocks=1, num_post_blocks=1,
        num_x2_adapter_blocks=1, scales=(2,),
    ).eval()  # fmt: skip
    pipe = kind(parts.randomise(transformer), parts.randomise(vae), PiflowScheduler(), parts.randomise(upscaler))

    def call(ask: Ask) -> dict:
        # it has no text: a prompt is a video
        video = [torch.rand(5, 3, 16, 16, generator=parts.generator(seed)) for seed in ask.prompts]
        return {
            "video": torch.stack(video), "resolution_scale": 2, "num_inference_steps": ask.steps,
            "generator": parts.generator(), "output_type": "pt",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, images=False, guided=False, text=False, negative=False)
