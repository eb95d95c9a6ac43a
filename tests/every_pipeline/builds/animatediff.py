"""Videos of a Stable Diffusion U-Net with motion modules: AnimateDiff and PIA."""

from __future__ import annotations

from inspect import signature

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    MotionAdapter,
    SparseControlNetModel,
)

from . import Ask, Built, builds, parts, stable_diffusion_xl
from .controlnet import controlnet
from .stable_diffusion import BETAS, NOTHING, SIZE, WIDTH, run, text

FRAMES = 2


def motion(**changes) -> MotionAdapter:
    torch.manual_seed(0)
    config = {
        "block_out_channels": (16, 32), "motion_layers_per_block": 1, "motion_mid_block_layers_per_block": 1,
        "motion_num_attention_heads": 4, "motion_norm_num_groups": 4, "motion_max_seq_length": 8,
    }  # fmt: skip
    return MotionAdapter(**config | changes)


def ddim() -> DDIMScheduler:
    betas = BETAS | {"beta_schedule": "linear"}
    return DDIMScheduler(**betas, clip_sample=False, timestep_spacing="linspace", steps_offset=1)


def moving(kind: type, **components):
    """The pipeline with no layer of its U-Net at zero, as those of a new motion module are."""
    pipe = kind(vae=parts.vae(), motion_adapter=components.pop("motion_adapter", motion()), **components)
    parts.randomise(pipe.unet).eval()
    return parts.quiet(pipe)


def frames(seed: int = 7) -> list:
    return parts.frames(FRAMES, SIZE, seed)


def call_of(kind: type, ask: Ask) -> dict:
    """`run` and the videos that a pipeline takes; it makes one video a prompt, whatever is asked."""
    taken, count = signature(kind.__call__).parameters, len(ask.prompts)
    called = {name: value for name, value in run(ask).items() if name != "num_images_per_prompt"}
    if "video" in taken:
        called |= {"video": [frames()] * count, "strength": 0.5, "num_inference_steps": 2 * ask.steps}
    else:
        called["num_frames"] = FRAMES
    if "conditioning_frames" in taken:
        called["conditioning_frames"] = frames(20)
    return called


@builds("AnimateDiffPipeline", "AnimateDiffVideoToVideoPipeline")
def animatediff(kind: type) -> Built:
    pipe = moving(kind, unet=parts.sd_unet(), scheduler=ddim(), **NOTHING)
    return Built(pipe, lambda ask: call_of(kind, ask) | text(ask), images=False)


@builds("AnimateDiffControlNetPipeline", "AnimateDiffVideoToVideoControlNetPipeline")
def controlled(kind: type) -> Built:
    """
    What is checked of the frames for the ControlNet is the length of a list, which has to be as many as there are
    frames, or videos in if they are lists of frames too: one prompt or two, then, in the first, with two frames.
    """
    unet = parts.sd_unet()
    pipe = moving(kind, unet=unet, controlnet=controlnet(unet), scheduler=ddim(), **NOTHING)

    def call(ask: Ask) -> dict:
        called, count = call_of(kind, ask) | text(ask), len(ask.prompts)
        if "video" in called or count > 1:
            called["conditioning_frames"] = [frames(20)] * count
        return called

    return Built(pipe, call, images=False)


@builds("AnimateDiffSparseControlNetPipeline")
def sparsely_controlled(kind: type) -> Built:
    torch.manual_seed(0)
    net = SparseControlNetModel(
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), block_out_channels=(16, 32),
        layers_per_block=1, norm_num_groups=4, cross_attention_dim=WIDTH, attention_head_dim=4,
        motion_max_seq_length=8, motion_num_attention_heads=4,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        **BETAS | {"beta_schedule": "linear"}, algorithm_type="dpmsolver++", use_karras_sigmas=True
    )
    pipe = moving(kind, unet=parts.sd_unet(), controlnet=parts.randomise(net).eval(), scheduler=scheduler, **NOTHING)

    def call(ask: Ask) -> dict:
        return call_of(kind, ask) | text(ask) | {"controlnet_frame_indices": [0, FRAMES - 1]}

    return Built(pipe, call, images=False)


@builds("AnimateDiffSDXLPipeline")
def animatediff_xl(kind: type) -> Built:
    pipe = moving(
        kind, unet=stable_diffusion_xl.unet(), scheduler=ddim(), **stable_diffusion_xl.NOTHING,
        motion_adapter=motion(use_motion_mid_block=False),
    )  # fmt: skip
    return Built(pipe, lambda ask: call_of(kind, ask) | stable_diffusion_xl.text(ask), images=False)


@builds("PIAPipeline")
def pia(kind: type) -> Built:
    """The first frame, encoded, and how far each frame may be from it, are further channels of the input."""
    scheduler = EulerDiscreteScheduler(**BETAS | {"beta_schedule": "linear"}, steps_offset=1)
    pipe = moving(
        kind, unet=parts.sd_unet(), scheduler=scheduler, **NOTHING, motion_adapter=motion(conv_in_channels=9)
    )

    def call(ask: Ask) -> dict:
        return call_of(kind, ask) | text(ask) | {"image": parts.pil(SIZE)}

    return Built(pipe, call, images=False)
