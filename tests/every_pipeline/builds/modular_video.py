"""Video models: HunyuanVideo 1.5, Helios and LTX, modular."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    FlowMatchEulerDiscreteScheduler,
    HeliosDMDScheduler,
    HeliosScheduler,
    HeliosTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
)

from . import Ask, Built, builds, ltx, parts, wan
from .modular import WITHOUT, assemble, guide


@builds("HunyuanVideo15ModularPipeline")
def hunyuan_video15(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=32, text_embed_2_dim=16, image_embed_dim=16,
        rope_axes_dim=(4, 4, 4), target_size=32, task_type="t2v",
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8), layers_per_block=1, spatial_compression_ratio=4
    )
    pipe = assemble(
        kind, transformer=parts.randomise(transformer.eval()), vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        guide(pipe, ask)
        count = len(ask.prompts)
        given = parts.text(ask, 8, 32) | parts.text(ask, 4, 16, end="_2")
        for prefix in ("", "negative_"):
            given[f"{prefix}prompt_embeds_mask"] = torch.ones(count, 8)
            given[f"{prefix}prompt_embeds_mask_2"] = torch.ones(count, 4)
        return given | {
            "batch_size": count, "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": ask.steps,
            "generator": parts.generator(), "output": "latents",
        }  # fmt: skip

    # with a picture as without one it fills in embeddings of it for each prompt, which fit one video of each
    return Built(pipe, call, images=False)


@builds("HeliosModularPipeline", "HeliosPyramidModularPipeline", "HeliosPyramidDistilledModularPipeline")
def helios(kind: type) -> Built:
    pyramid, guided = "Pyramid" in kind.__name__, "Distilled" not in kind.__name__
    pipe = assemble(
        kind, without=(*WITHOUT, "vae_encoder"),
        transformer=wan.wan_transformer(HeliosTransformer3DModel, rope_dim=(4, 4, 4), rope_max_seq_len=None),
        scheduler=(HeliosScheduler if guided else HeliosDMDScheduler)(
            stages=3 if pyramid else 1, use_dynamic_shifting=True,
            gamma=0.3,  # with 1/3, the default, the covariance of the pyramid's noise is singular in float32
        ),
    )  # fmt: skip

    def call(ask: Ask) -> dict:  # two chunks, each denoised in all steps, in the pyramid in each of three sizes
        if guided:
            guide(pipe, ask)
        given = parts.text(ask, 8, 32) | {
            "num_videos_per_prompt": ask.images, "height": 64, "width": 64, "num_frames": 10,
            "num_latent_frames_per_chunk": 2, "generator": parts.generator(), "output": "latent_chunks",
        }  # fmt: skip
        if pyramid:
            return given | {"pyramid_num_inference_steps_list": [ask.steps] * 3}
        return given | {"num_inference_steps": ask.steps}

    # the text is repeated for several videos of a prompt, but not the latents
    return Built(pipe, call, images=False, guided=guided, negative=guided)


@builds("LTXModularPipeline")
def ltx_video(kind: type) -> Built:
    made = ltx.ltx_parts()
    pipe = assemble(kind, **{name: made[name] for name in ("transformer", "scheduler", "vae")})

    def call(ask: Ask) -> dict:
        guide(pipe, ask)
        mask = torch.ones(len(ask.prompts), 6)
        return parts.text(ask, 6, 32) | {
            "prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "height": 32, "width": 64,
            "num_frames": 3, "num_videos_per_prompt": ask.images, "num_inference_steps": ask.steps,
            "generator": parts.generator(), "output": "latents",
        }  # fmt: skip

    return Built(pipe, call)
