"""Stable Diffusion XL and 3, modular, and a pipeline of other blocks."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.modular_pipelines import (
    ComponentSpec,
    InputParam,
    ModularPipelineBlocks,
    OutputParam,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.stable_diffusion_3.denoise import StableDiffusion3DenoiseStep

from . import Ask, Built, builds, parts, stable_diffusion_xl
from .modular import WITHOUT, assemble, guide, hush

TEXTS = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")


@builds("StableDiffusionXLModularPipeline")
def xl(kind: type) -> Built:
    pipe = assemble(kind, unet=stable_diffusion_xl.unet(), scheduler=stable_diffusion_xl.euler(), vae=parts.vae())

    def call(ask: Ask) -> dict:
        guide(pipe, ask)
        return stable_diffusion_xl.text(ask) | {
            "num_images_per_prompt": ask.images, "num_inference_steps": ask.steps, "height": 8, "width": 8,
            "generator": parts.generator(), "output": "latents",
        }  # fmt: skip

    return Built(pipe, call)


def sd3_transformer() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return parts.randomise(transformer.eval())


def sd3_call(ask: Ask) -> dict:
    return parts.text(ask, 7, 32) | {
        "pooled_prompt_embeds": parts.stacked(ask.prompts, 16),
        "negative_pooled_prompt_embeds": parts.stacked((ask.negative,) * len(ask.prompts), 16),
        "num_images_per_prompt": ask.images, "num_inference_steps": ask.steps, "generator": parts.generator(),
        "output": "latents",
    }  # fmt: skip


@builds("StableDiffusion3ModularPipeline")
def sd3(kind: type) -> Built:
    pipe = assemble(
        kind, without=(*WITHOUT, "vae_encoder"), transformer=sd3_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        guide(pipe, ask)
        return sd3_call(ask) | {"height": 64, "width": 64}

    return Built(pipe, call)


class Start(ModularPipelineBlocks):
    """Draws the noise and repeats the text for every image."""

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [ComponentSpec("scheduler", FlowMatchEulerDiscreteScheduler)]

    @property
    def inputs(self) -> list[InputParam]:
        names = (*TEXTS, "num_inference_steps", "num_images_per_prompt", "generator")
        return [InputParam(name=name) for name in names]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(name) for name in (*TEXTS, "latents", "timesteps", "batch_size")]

    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.batch_size = len(block_state.prompt_embeds)
        images = block_state.num_images_per_prompt
        for name in TEXTS:
            setattr(block_state, name, getattr(block_state, name).repeat_interleave(images, 0))
        block_state.latents = torch.randn(block_state.batch_size * images, 4, 8, 8, generator=block_state.generator)
        components.scheduler.set_timesteps(block_state.num_inference_steps)
        block_state.timesteps = components.scheduler.timesteps
        self.set_block_state(state, block_state)
        return components, state


@builds("ModularPipeline")
def other(kind: type) -> Built:
    """A block of one's own before a denoising loop of diffusers."""
    blocks = SequentialPipelineBlocks.from_blocks_dict({"start": Start(), "denoise": StableDiffusion3DenoiseStep()})
    hush(blocks)
    pipe = kind(blocks)
    pipe.update_components(transformer=sd3_transformer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))

    def call(ask: Ask) -> dict:
        guide(pipe, ask)
        return sd3_call(ask)

    return Built(pipe, call)
