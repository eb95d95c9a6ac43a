"""Wan-Animate 2, modular: a video in segments, each after a pass that only remembers the driving video."""

from __future__ import annotations

from unittest import mock

import torch
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    WanAnimate2Transformer3DModel,
)
from diffusers.models.transformers import transformer_wan_animate_2
from transformers import CLIPVisionConfig, CLIPVisionModel

from . import Ask, Built, builds, parts
from .modular import WITHOUT, assemble, guide

SIZE, FRAMES = 32, 5  # of a segment


def without_compiling(transformer: WanAnimate2Transformer3DModel) -> None:
    """Make the mask that the transformer would compile, which takes long."""

    def eager(*args, _compile: bool, **kwargs):
        return make(*args, **kwargs)

    make = transformer_wan_animate_2.create_block_mask
    key = (FRAMES // 4 + 1, SIZE * SIZE // 256)
    with mock.patch.object(transformer_wan_animate_2, "create_block_mask", eager):
        transformer.block_masks[key] = transformer.create_mask(*key, torch.device("cpu"))


@builds("WanAnimate2ModularPipeline", "WanAnimate2DistilledModularPipeline")
def wan_animate(kind: type) -> Built:
    guided = "Distilled" not in kind.__name__
    torch.manual_seed(0)
    transformer = WanAnimate2Transformer3DModel(
        text_len=8, dim=24, ffn_dim=32, freq_dim=16, text_dim=32, num_heads=2, num_layers=2
    ).eval()
    without_compiling(transformer)
    vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    # the transformer takes 1280 numbers of each part of a picture of 224x224, from the layer before the last
    vision = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=224,
        patch_size=56,
    )  # fmt: skip
    if guided:
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        )
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipe = assemble(
        kind, without=WITHOUT, transformer=parts.randomise(transformer), vae=vae.eval(), scheduler=scheduler,
        image_encoder=CLIPVisionModel(vision).eval(),
    )  # fmt: skip

    def call(ask: Ask) -> dict:  # two segments, each denoised in all steps
        if guided:
            guide(pipe, ask, 3.0)
        return {
            "prompt_embeds": parts.stacked(ask.prompts[:1], 8, 32), "prompt_ref_embeds": parts.stacked((9,), 8, 32),
            "negative_prompt_embeds": parts.stacked((ask.negative,), 8, 32), "image": parts.pil(SIZE),
            "driving_video": parts.frames(2 * FRAMES - 1, SIZE), "segment_frame_length": FRAMES, "height": SIZE,
            "width": SIZE, "num_inference_steps": ask.steps, "generator": parts.generator(),
            "output": "segment_frames",  # nothing else is left of the latents
        }  # fmt: skip

    return Built(pipe, call, many=False, images=False, guided=guided, negative=guided)
