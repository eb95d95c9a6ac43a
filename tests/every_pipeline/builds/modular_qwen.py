"""Qwen-Image, its editing models and Qwen-Image 2.1, modular."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImage21Transformer2DModel, QwenImageTransformer2DModel

from . import Ask, Built, builds, parts
from .modular import WITHOUT, assemble, guide


@builds(
    "QwenImageModularPipeline",
    "QwenImageEditModularPipeline",
    "QwenImageEditPlusModularPipeline",
    "QwenImageLayeredModularPipeline",
)
def qwen(kind: type) -> Built:
    torch.manual_seed(0)
    edits, layered = "Edit" in kind.__name__, "Layered" in kind.__name__
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6), use_additional_t_cond=layered, use_layer3d_rope=layered,
    )  # fmt: skip
    pipe = assemble(
        # images are resized to 1024x1024 before they are encoded, so what conditions comes as latents
        kind, without=(*WITHOUT, "vae_encoder"), transformer=parts.randomise(transformer.eval()),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True, shift_terminal=0.02),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        guide(pipe, ask)
        count, image = len(ask.prompts), parts.embeddings(50, 1, 4, 1, 8, 8)
        options = {"height": 64, "width": 64}
        if layered:
            options = {"image_latents": image.permute(0, 2, 1, 3, 4), "layers": 2}
        elif edits:
            options["image_latents"] = [image, image.flip(3)] if "Plus" in kind.__name__ else image
        return options | {
            "prompt_embeds": parts.stacked(ask.prompts, 7, 32), "prompt_embeds_mask": torch.ones(count, 7).long(),
            "negative_prompt_embeds": parts.stacked((ask.negative,) * count, 7, 32),
            "negative_prompt_embeds_mask": torch.ones(count, 7).long(), "num_images_per_prompt": ask.images,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "output": "latents",
        }  # fmt: skip

    # the layered one makes a condition of the time for each prompt, which fits one image of each
    return Built(pipe, call, images=not layered)


@builds("QwenImage21ModularPipeline", "QwenImage21TurboModularPipeline")
def qwen21(kind: type) -> Built:
    torch.manual_seed(0)
    guided = "Turbo" not in kind.__name__
    transformer = QwenImage21Transformer2DModel(
        in_channels=8, out_channels=8, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=32,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipe = assemble(
        kind, transformer=parts.randomise(transformer.eval()),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True, shift_terminal=0.02),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        count = len(ask.prompts)
        mask, no_image = torch.ones(count, 7).long(), torch.zeros(count, 7).bool()
        options = {}
        if guided:
            guide(pipe, ask)
            options = {
                "negative_prompt_embeds": parts.stacked((ask.negative,) * count, 7, 32),
                "negative_prompt_embeds_mask": mask, "negative_image_pad_mask": no_image,
            }  # fmt: skip
        return options | {
            "prompt_embeds": parts.stacked(ask.prompts, 7, 32), "prompt_embeds_mask": mask, "image_pad_mask": no_image,
            "num_images_per_prompt": ask.images, "num_inference_steps": ask.steps, "generator": parts.generator(),
            "height": 128, "width": 128, "output": "latents",
        }  # fmt: skip

    return Built(pipe, call, guided=guided, negative=guided)
