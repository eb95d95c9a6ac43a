"""Chroma."""

from __future__ import annotations

import torch
from diffusers import ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from . import Ask, Built, builds, parts

SIZE = 16
TEXT = 24


@builds("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline")
def chroma(kind: type) -> Built:
    name = kind.__name__
    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT, axes_dims_rope=(4, 6, 6), approximator_num_channels=16, approximator_hidden_dim=16,
        approximator_layers=1,
    ).eval()  # fmt: skip
    if "Inpaint" in name:
        transformer.register_to_config(guidance_embeds=False)  # it reads what this configuration does not have
    # masks that are passed in are not repeated for several images of a prompt, so that it must encode
    pipe = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=parts.vae(1), text_encoder=parts.t5(TEXT),
        tokenizer=parts.tokenizer(),
        transformer=parts.randomise(transformer),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        made = parts.words(ask) | {
            "num_images_per_prompt": ask.images, "height": SIZE, "width": SIZE, "generator": parts.generator(),
            "num_inference_steps": ask.steps, "guidance_scale": 5.0 if ask.guided else 1.0, "output_type": "latent",
            "max_sequence_length": 16,
        }  # fmt: skip
        if name != "ChromaPipeline":
            made |= {"image": parts.picture(SIZE), "strength": 0.5, "num_inference_steps": 2 * ask.steps}
        if "Inpaint" in name:
            made["mask_image"] = torch.ones(1, 1, SIZE, SIZE)
            made["mask_image"][..., : SIZE // 4] = 0
        return made

    return Built(parts.quiet(pipe), call)
