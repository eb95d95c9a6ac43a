"""Cosmos 1, 2 and 2.5."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers import (
    AutoencoderKLCosmos,
    AutoencoderKLWan,
    CosmosControlNetModel,
    CosmosTransformer3DModel,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.controlnets import controlnet_cosmos
from diffusers.models.transformers import transformer_cosmos

from . import Ask, Built, builds, parts


class Unchecked:
    """In place of the guardrail, whose weights are not here."""

    def to(self, *args, **kwargs) -> Unchecked:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames):
        return frames


def without_torchvision() -> None:
    """The models need torchvision only to change a mask's size."""

    def resize(image: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
        return torch.nn.functional.interpolate(image, size=size, mode=interpolation)

    stand_in = SimpleNamespace(
        functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
    )
    for module in (transformer_cosmos, controlnet_cosmos):
        if not hasattr(module, "transforms"):
            module.transforms = stand_in


SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 16, "mlp_ratio": 2.0, "text_embed_dim": 32, "adaln_lora_dim": 4,
    "max_size": (16, 16, 16), "patch_size": (1, 2, 2),
}  # fmt: skip


def transformer(channels: int, **changes) -> CosmosTransformer3DModel:
    without_torchvision()
    torch.manual_seed(0)
    made = CosmosTransformer3DModel(in_channels=channels, out_channels=4, num_layers=2, **SIZES | changes)
    return parts.randomise(made.eval())


def wan_vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scale_factor_temporal=4, scale_factor_spatial=4,
    ).eval()  # fmt: skip


def called(ask: Ask, **more) -> dict:
    """Words, since embeddings are not repeated for several videos."""
    return parts.words(ask) | {
        "height": 32, "width": 32, "guidance_scale": 7.0 if ask.guided else 1.0, "num_inference_steps": ask.steps,
        "generator": parts.generator(), "output_type": "latent",
    } | more  # fmt: skip


@builds("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline")
def cosmos1(kind: type) -> Built:
    video = "Video" in kind.__name__
    torch.manual_seed(0)
    vae = AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8), decode_block_out_channels=(8, 8, 8),
        attention_resolutions=(8,), resolution=32, num_layers=1, patch_size=2, spatial_compression_ratio=4,
        temporal_compression_ratio=4, latents_mean=[0.0] * 16, latents_std=[1.0] * 16,
    ).eval()  # fmt: skip
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, final_sigmas_type="sigma_min")
    pipe = kind(parts.t5_text(), parts.tokenizer(), transformer(4 + video), vae, scheduler, safety_checker=Unchecked())

    def call(ask: Ask) -> dict:
        image = {"image": [parts.pil(32)] * (len(ask.prompts) * ask.images)} if video else {}
        return called(ask, **image, num_frames=9, max_sequence_length=16, num_videos_per_prompt=ask.images)

    return Built(parts.quiet(pipe), call)


@builds("Cosmos2TextToImagePipeline", "Cosmos2VideoToWorldPipeline")
def cosmos2(kind: type) -> Built:
    video = "Video" in kind.__name__
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    denoiser = transformer(4 + video, extra_pos_embed_type=None, rope_scale=(1.0, 3.0, 3.0))
    pipe = kind(
        parts.t5_text(), parts.tokenizer(), denoiser, wan_vae(), scheduler, safety_checker=Unchecked()
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        if not video:
            return called(ask, max_sequence_length=16, num_images_per_prompt=ask.images)
        image = [parts.pil(32)] * (len(ask.prompts) * ask.images)
        return called(ask, image=image, num_frames=9, max_sequence_length=16, num_videos_per_prompt=ask.images)

    return Built(parts.quiet(pipe), call)


@builds("Cosmos2_5_PredictBasePipeline", "Cosmos2_5_TransferPipeline")
def cosmos25(kind: type) -> Built:
    transfer = "Transfer" in kind.__name__
    projection = {
        "extra_pos_embed_type": None, "use_crossattn_projection": True, "crossattn_proj_in_channels": 64,
        "encoder_hidden_states_channels": 32, "rope_scale": (1.0, 3.0, 3.0),
    }  # fmt: skip
    more = {}
    if transfer:
        projection |= {"img_context_dim_in": 8, "img_context_dim_out": 32}
        torch.manual_seed(0)
        net = CosmosControlNetModel(
            n_controlnet_blocks=1, in_channels=10, latent_channels=6, model_channels=32, **SIZES, **projection
        )
        more["controlnet"] = parts.randomise(net.eval())
    denoiser = transformer(
        5, **projection, **({"controlnet_block_every_n": 2, "img_context_num_tokens": 4} if transfer else {})
    )
    scheduler = UniPCMultistepScheduler(
        use_karras_sigmas=True, use_flow_sigmas=True, prediction_type="flow_prediction", sigma_max=200.0,
        sigma_min=0.01,
    )  # fmt: skip
    pipe = kind(
        parts.qwen2_vl_text(), parts.vision_tokenizer(), denoiser, wan_vae(), scheduler,
        safety_checker=Unchecked(), **more,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        given = {"num_frames": 9, "max_sequence_length": 64, "num_videos_per_prompt": ask.images}
        if transfer:
            given |= {"controls": [parts.frames(9, 32)] * len(ask.prompts), "num_frames_per_chunk": 9}
        return called(ask, **given)

    # several videos a prompt do not fit the controls
    return Built(parts.quiet(pipe), call, images=not transfer)
