"""Flux, Flux Kontext and Flux 2, modular."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel, FluxTransformer2DModel

from . import Ask, Built, builds, parts
from .modular import assemble, guide


@builds("FluxModularPipeline", "FluxKontextModularPipeline")
def flux(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    pipe = assemble(
        kind, transformer=parts.randomise(transformer.eval()), vae=parts.vae(4),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        options = (
            {"image": [parts.pil(16)] * len(ask.prompts), "_auto_resize": False, "max_area": 256}
            if "Kontext" in kind.__name__
            else {}
        )
        return options | {
            "prompt_embeds": parts.stacked(ask.prompts, 7, 32),
            "pooled_prompt_embeds": parts.stacked(ask.prompts, 16),
            "num_images_per_prompt": ask.images, "num_inference_steps": ask.steps, "height": 16, "width": 16,
            "generator": parts.generator(), "output": "latents",
        }  # fmt: skip

    return Built(pipe, call, guided=False, negative=False)


@builds("Flux2ModularPipeline", "Flux2KleinModularPipeline", "Flux2KleinBaseModularPipeline")
def flux2(kind: type) -> Built:
    torch.manual_seed(0)
    guided, embedded = "KleinBase" in kind.__name__, "Klein" not in kind.__name__
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=embedded,
    )  # fmt: skip
    pipe = assemble(
        kind, transformer=parts.randomise(transformer.eval()),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        count = len(ask.prompts)
        options = {"guidance_scale": 4.0} if embedded else {}
        if guided:
            guide(pipe, ask)
            options["negative_prompt_embeds"] = parts.stacked((ask.negative,) * count, 7, 32)
        return options | {
            "prompt_embeds": parts.stacked(ask.prompts, 7, 32), "num_images_per_prompt": ask.images, "height": 128,
            "width": 128, "num_inference_steps": ask.steps, "generator": parts.generator(), "output": "latents",
        }  # fmt: skip

    return Built(pipe, call, guided=guided, negative=guided)
