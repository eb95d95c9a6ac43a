"""LTX 2 pipelines, for video with sound."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2VideoTransformer3DModel,
    LTXEulerAncestralRFScheduler,
)
from diffusers.models.autoencoders.ltx2_diffusion_decoder import LTX2VideoDiffusionDecoderModel
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from . import Ask, Built, builds, parts


def ltx2_vae() -> AutoencoderKLLTX2Video:
    """An autoencoder of 3 frames of 32x64 to 2 of 4x8."""
    torch.manual_seed(0)
    return AutoencoderKLLTX2Video(
        latent_channels=8, block_out_channels=(16,), down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(16,), layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatiotemporal",), upsample_type=("spatiotemporal",),
        upsample_residual=(True,), upsample_factor=(2,),
    ).eval()  # fmt: skip


def gemma() -> Gemma3ForConditionalGeneration:
    """The text encoder; it is needed where several videos a prompt are made, for that repeats no embeddings."""
    torch.manual_seed(0)
    text = Gemma3TextConfig(
        vocab_size=parts.WORDS + 8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    first = parts.WORDS + 4
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, boi_token_index=first,
        eoi_token_index=first + 1, image_token_index=first + 2,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config).eval()


def ltx2_parts(scheduler=None, **changes) -> dict:
    """All but the vocoder, which is for decoding only."""
    text_encoder = gemma()
    torch.manual_seed(0)
    connectors = LTX2TextConnectors(
        caption_channels=32, text_proj_in_factor=3, rope_type="split", connector_rope_base_seq_len=32,
        video_connector_num_attention_heads=2, video_connector_attention_head_dim=16, video_connector_num_layers=1,
        video_connector_num_learnable_registers=8, audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=16, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=8,
    ).eval()  # fmt: skip
    config = {
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 16,
        "cross_attention_dim": 32, "vae_scale_factors": (2, 8, 8), "audio_in_channels": 8, "audio_out_channels": 8,
        "audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16,
        "num_layers": 2, "caption_channels": 32, "rope_type": "split",
    }  # fmt: skip
    transformer = LTX2VideoTransformer3DModel(**config | changes).eval()
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=8, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2, mel_bins=16, resolution=16
    ).eval()
    shifted = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096,
        shift_terminal=0.1,
    )  # fmt: skip
    return {
        "scheduler": scheduler or shifted, "vae": ltx2_vae(), "audio_vae": audio_vae, "text_encoder": text_encoder,
        "tokenizer": parts.tokenizer(), "connectors": connectors, "transformer": parts.randomise(transformer),
        "vocoder": None,
    }  # fmt: skip


def ltx2_call(ask: Ask) -> dict:
    """Classifier-free guidance without the two other guidances, which would each call the transformer once more."""
    scale = 3.0 if ask.guided else 1.0
    return parts.words(ask) | {
        "height": 32, "width": 64, "num_frames": 3, "num_inference_steps": ask.steps, "guidance_scale": scale,
        "audio_guidance_scale": scale, "stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0,
        "audio_modality_scale": 1.0, "num_videos_per_prompt": ask.images, "max_sequence_length": 8,
        "generator": parts.generator(), "output_type": "latent",
    }  # fmt: skip


def without(asked: dict, *names: str) -> dict:
    return {name: value for name, value in asked.items() if name not in names}


@builds("LTX2Pipeline")
def ltx2(kind: type) -> Built:
    return Built(parts.quiet(kind(**ltx2_parts())), ltx2_call)


@builds("LTX2ImageToVideoPipeline")
def ltx2_image_to_video(kind: type) -> Built:
    pipe = kind(**ltx2_parts())
    return Built(parts.quiet(pipe), lambda ask: ltx2_call(ask) | {"image": parts.pil(), "image_crf": 0})


@builds("LTX2ConditionPipeline")
def ltx2_condition(kind: type) -> Built:
    """With a first picture, in place of the noise, and a last one, as more tokens."""
    pipe = kind(**ltx2_parts())

    def call(ask: Ask) -> dict:
        first = LTX2VideoCondition(frames=parts.pil(), index=0, crf=0)
        last = LTX2VideoCondition(frames=parts.pil(seed=8), index=-1, crf=0)
        return ltx2_call(ask) | {"conditions": [first, last]}

    return Built(parts.quiet(pipe), call)


@builds("LTX2InContextPipeline")
def ltx2_in_context(kind: type) -> Built:
    pipe = kind(**ltx2_parts())

    def call(ask: Ask) -> dict:
        reference = LTX2ReferenceCondition(frames=parts.frames(3))
        first = LTX2VideoCondition(frames=parts.pil(), index=0, crf=0)
        return ltx2_call(ask) | {"reference_conditions": [reference], "conditions": [first]}

    return Built(parts.quiet(pipe), call)


@builds("LTX2HDRPipeline")
def ltx2_hdr(kind: type) -> Built:
    pipe = kind(**ltx2_parts())

    def call(ask: Ask) -> dict:
        asked = ltx2_call(ask) | {"reference_conditions": [LTX2HDRReferenceCondition(frames=parts.frames(3))]}
        return without(asked, "audio_guidance_scale", "audio_stg_scale", "audio_modality_scale")

    return Built(parts.quiet(pipe), call)


@builds("LTX2DFRPipeline")
def ltx2_dfr(kind: type) -> Built:
    """Distilled, with keyframes among the tokens."""
    pipe = kind(**ltx2_parts(FlowMatchEulerDiscreteScheduler(), use_keyframes_abs_pos_embedding=True))

    def call(ask: Ask) -> dict:
        sigmas = [1.0 - step / ask.steps for step in range(ask.steps)]
        return {"sigmas": sigmas} | {
            name: value for name, value in ltx2_call(ask).items()
            if name in ("prompt", "height", "width", "num_videos_per_prompt", "max_sequence_length", "generator",
                        "output_type", "num_frames")
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, guided=False, negative=False)


@builds("LTX2DFRTemporalRefinePipeline")
def ltx2_dfr_refine(kind: type) -> Built:
    """Distilled; twice the frames, in two overlapping tiles in time, each denoised in all steps."""
    torch.manual_seed(0)
    upsampler = LTX2LatentUpsamplerModel(
        in_channels=8, mid_channels=32, num_blocks_per_stage=1, spatial_upsample=False, temporal_upsample=True
    ).eval()
    pipe = kind(
        **ltx2_parts(LTXEulerAncestralRFScheduler(eta=0.5), use_keyframes_abs_pos_embedding=True),
        temporal_latent_upsampler=upsampler,
    )

    def call(ask: Ask) -> dict:
        count = len(ask.prompts)
        return {
            "prompt": parts.words(ask)["prompt"], "latents": parts.stacked((0,) * count, 8, 3, 4, 8),
            "keyframes_latents": parts.stacked((1,) * count, 8, 2, 4, 8), "keyframe_positions": [2, 4],
            "audio_latents": parts.stacked((2,) * count, 2, 5, 4), "height": 32, "width": 64, "num_frames": 5,
            "sigmas": [0.9 - 0.8 * step / ask.steps for step in range(ask.steps)], "max_sequence_length": 8,
            "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, images=False, guided=False, negative=False)


@builds("LTX2LatentUpsamplePipeline")
def ltx2_upsample(kind: type) -> Built:
    torch.manual_seed(0)
    upsampler = LTX2LatentUpsamplerModel(in_channels=8, mid_channels=32, num_blocks_per_stage=1).eval()

    def call(ask: Ask) -> dict:
        return {
            "latents": parts.stacked((0,), 8, 2, 4, 8), "height": 32, "width": 64, "num_frames": 3,
            "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    pipe = kind(vae=ltx2_vae(), latent_upsampler=upsampler)
    return Built(parts.quiet(pipe), call, many=False, images=False, guided=False, text=False, negative=False)


@builds("LTX2VideoDiffusionDecodePipeline")
def ltx2_diffusion_decode(kind: type) -> Built:
    torch.manual_seed(0)
    decoder = LTX2VideoDiffusionDecoderModel(
        latent_channels=8, decoder_head_dim=16, decoder_stage_channels=(32, 16, 16), decoder_stage_depths=(1, 1, 2),
        decoder_stage_kernels=((3, 3, 3), (3, 3, 3)), decoder_upsample_strides=((1, 2, 2), (2, 1, 1)),
        decoder_upsample_channel_reductions=(2, 1), decoder_stage5_kernel=(3, 3, 3), decoder_t_emb_dim=16,
        spatial_compression_ratio=8, temporal_compression_ratio=2,
    ).eval()  # fmt: skip
    pipe = kind(
        diffusion_decoder=parts.randomise(decoder), scheduler=FlowMatchEulerDiscreteScheduler(), vae=ltx2_vae()
    )

    def call(ask: Ask) -> dict:
        decoder.decoder.default_num_inference_steps = ask.steps  # the call has no argument for it
        return {"latents": parts.stacked((0,), 8, 2, 4, 4), "generator": parts.generator(), "output_type": "pt"}

    return Built(parts.quiet(pipe), call, many=False, images=False, guided=False, text=False, negative=False)
