"""HunyuanVideo 1 pipelines, with those of SkyReels 1 and FramePack."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from . import Ask, Built, builds, parts


def hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    """An autoencoder of 5 frames of 32x32 to 2 of 8x8."""
    torch.manual_seed(0)
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8), down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3, layers_per_block=1, norm_num_groups=4, scaling_factor=0.5,
        spatial_compression_ratio=4,
    ).eval()  # fmt: skip


def hunyuan_transformer(kind: type = HunyuanVideoTransformer3DModel, **changes):
    torch.manual_seed(0)
    config = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
        "num_single_layers": 2, "num_refiner_layers": 1, "mlp_ratio": 2.0, "text_embed_dim": 32,
        "pooled_projection_dim": 32, "rope_axes_dim": (4, 4, 4),
    }  # fmt: skip
    return kind(**config | changes).eval()


def hunyuan_text() -> dict:
    """Both text encoders; they are needed where several videos a prompt are made, for that repeats no embeddings."""
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=parts.WORDS + 4, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    clip = CLIPTextConfig(
        vocab_size=parts.WORDS + 4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return {
        "text_encoder": LlamaModel(llama).eval(), "tokenizer": parts.tokenizer(),
        "text_encoder_2": CLIPTextModel(clip).eval(), "tokenizer_2": parts.tokenizer(),
    }  # fmt: skip


def hunyuan_call(ask: Ask) -> dict:
    return parts.words(ask) | {
        "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": ask.steps,
        "true_cfg_scale": 4.0 if ask.guided else 1.0, "num_videos_per_prompt": ask.images, "max_sequence_length": 8,
        "prompt_template": {"template": "{}", "crop_start": 0}, "generator": parts.generator(),
        "output_type": "latent",
    }  # fmt: skip


def pictures(count: int) -> torch.Tensor:
    """One picture, several times: these pipelines want one a video."""
    return parts.picture().repeat(count, 1, 1, 1)


@builds("HunyuanVideoPipeline")
def hunyuan_video(kind: type) -> Built:
    pipe = kind(
        **hunyuan_text(), transformer=hunyuan_transformer(), vae=hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip
    return Built(parts.quiet(pipe), hunyuan_call)


@builds("HunyuanVideoImageToVideoPipeline")
def hunyuan_image_to_video(kind: type) -> Built:
    pipe = kind(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, image_processor=None,
        transformer=hunyuan_transformer(image_condition_type="token_replace"), vae=hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        count = len(ask.prompts)
        asked = hunyuan_call(ask) | {
            "image": pictures(count), "prompt_embeds": parts.stacked(ask.prompts, 8, 32),
            "pooled_prompt_embeds": parts.stacked(ask.prompts, 32), "prompt_attention_mask": torch.ones(count, 8),
            "negative_prompt_embeds": parts.stacked((ask.negative,) * count, 8, 32),
            "negative_pooled_prompt_embeds": parts.stacked((ask.negative,) * count, 32),
            "negative_prompt_attention_mask": torch.ones(count, 8),
        }  # fmt: skip
        return {name: value for name, value in asked.items() if name not in ("prompt", "negative_prompt")}

    return Built(parts.quiet(pipe), call, images=False)  # the text is not repeated, neither words nor embeddings


@builds("HunyuanSkyreelsImageToVideoPipeline")
def hunyuan_skyreels(kind: type) -> Built:
    pipe = kind(
        **hunyuan_text(), transformer=hunyuan_transformer(in_channels=8), vae=hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        return hunyuan_call(ask) | {"image": pictures(len(ask.prompts) * ask.images)}

    return Built(parts.quiet(pipe), call)


@builds("HunyuanVideoFramepackPipeline")
def framepack(kind: type) -> Built:
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    pipe = kind(
        **hunyuan_text(), image_encoder=SiglipVisionModel(vision).eval(), vae=hunyuan_vae(),
        feature_extractor=SiglipImageProcessor(size={"height": 16, "width": 16}),
        transformer=hunyuan_transformer(
            HunyuanVideoFramepackTransformer3DModel, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip

    def call(ask: Ask) -> dict:  # two sections, the later one in time first, each denoised in all steps
        sections = {"latent_window_size": 2, "num_frames": 10}
        return hunyuan_call(ask) | {"image": pictures(len(ask.prompts))} | sections

    return Built(parts.quiet(pipe), call, images=False)  # the pipeline repeats only the text
