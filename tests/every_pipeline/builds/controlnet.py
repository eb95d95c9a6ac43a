"""Stable Diffusion 1 and XL with ControlNets and T2I adapters."""

from __future__ import annotations

from inspect import signature

import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    EulerAncestralDiscreteScheduler,
    T2IAdapter,
    UniPCMultistepScheduler,
)

from . import Ask, Built, builds, parts, stable_diffusion_xl
from .stable_diffusion import BETAS, NOTHING, SIZE, UNCHECKED, later, masks, pictures, pndm, run, text


def controlnet(unet, kind: type = ControlNetModel, **changes):
    """A ControlNet of the U-Net's layout that does not make the picture smaller, with no layer at zero."""
    torch.manual_seed(0)
    taken = signature(kind.__init__).parameters
    config = {name: value for name, value in unet.config.items() if name in taken}
    config |= {"conditioning_embedding_out_channels": (8,)} | changes
    return parts.randomise(kind(**config)).eval()


def conditions(kind: type, ask: Ask) -> dict:
    """`run` and the pictures that a pipeline of this name takes."""
    taken = signature(kind.__call__).parameters
    name = kind.__name__
    called = later(ask) if "Img2Img" in name else run(ask)
    if "Inpaint" in name:
        called |= {"mask_image": masks(ask), "strength": 1.0}
    if "image" in taken:
        called["image"] = pictures(ask)
    if "control_image" in taken:
        called["control_image"] = pictures(ask)
    return called


@builds(
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
)
def one(kind: type) -> Built:
    unet = parts.sd_unet()
    scheduler = UniPCMultistepScheduler(**BETAS, steps_offset=1)
    pipe = kind(vae=parts.vae(), unet=unet, controlnet=controlnet(unet), scheduler=scheduler, **NOTHING, **UNCHECKED)
    return Built(parts.quiet(pipe), lambda ask: conditions(kind, ask) | text(ask))


@builds(
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
)
def xl(kind: type) -> Built:
    unet = stable_diffusion_xl.unet()
    pipe = kind(
        vae=parts.vae(), unet=unet, controlnet=controlnet(unet), scheduler=stable_diffusion_xl.euler(),
        **stable_diffusion_xl.NOTHING, **stable_diffusion_xl.UNMARKED,
    )  # fmt: skip
    return Built(parts.quiet(pipe), lambda ask: conditions(kind, ask) | stable_diffusion_xl.text(ask))


@builds(
    "StableDiffusionXLControlNetUnionPipeline",
    "StableDiffusionXLControlNetUnionImg2ImgPipeline",
    "StableDiffusionXLControlNetUnionInpaintPipeline",
)
def union(kind: type) -> Built:
    unet = stable_diffusion_xl.unet()
    net = controlnet(unet, ControlNetUnionModel, num_trans_channel=16, num_proj_channel=16)
    pipe = kind(
        vae=parts.vae(), unet=unet, controlnet=net,
        scheduler=stable_diffusion_xl.euler(), **stable_diffusion_xl.NOTHING, **stable_diffusion_xl.UNMARKED,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        called = conditions(kind, ask) | stable_diffusion_xl.text(ask)
        return called | {"control_image": [called["control_image"]], "control_mode": [3]}

    return Built(parts.quiet(pipe), call)


def adapter(**changes) -> T2IAdapter:
    torch.manual_seed(0)
    return T2IAdapter(channels=[16, 32], num_res_blocks=1, **changes).eval()


@builds("StableDiffusionAdapterPipeline")
def adapted(kind: type) -> Built:
    pipe = kind(
        vae=parts.vae(), unet=parts.sd_unet(), scheduler=pndm(), **NOTHING, **UNCHECKED,
        adapter=adapter(adapter_type="full_adapter", downscale_factor=1),
    )  # fmt: skip
    return Built(parts.quiet(pipe), lambda ask: run(ask) | text(ask) | {"image": pictures(ask)})


@builds("StableDiffusionXLAdapterPipeline")
def adapted_xl(kind: type) -> Built:
    scheduler = EulerAncestralDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")
    pipe = kind(
        vae=parts.vae(), unet=stable_diffusion_xl.unet(), scheduler=scheduler, **stable_diffusion_xl.NOTHING,
        adapter=adapter(adapter_type="full_adapter_xl", downscale_factor=2),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        size = {"height": SIZE, "width": SIZE}
        return run(ask, 5.0) | stable_diffusion_xl.text(ask) | {"image": pictures(ask)} | size

    return Built(parts.quiet(pipe), call)


def cross(unet) -> ControlNetXSAdapter:
    torch.manual_seed(0)
    return ControlNetXSAdapter.from_unet(unet, size_ratio=0.5, conditioning_embedding_out_channels=(8,))


@builds("StableDiffusionControlNetXSPipeline")
def controlnet_xs(kind: type) -> Built:
    """The pipeline makes one denoiser of the U-Net and the ControlNet."""
    unet = parts.sd_unet(layers_per_block=2)
    pipe = kind(vae=parts.vae(), unet=unet, controlnet=cross(unet), scheduler=pndm(), **NOTHING, **UNCHECKED)
    parts.randomise(pipe.unet).eval()
    return Built(parts.quiet(pipe), lambda ask: conditions(kind, ask) | text(ask))


@builds("StableDiffusionXLControlNetXSPipeline")
def controlnet_xs_xl(kind: type) -> Built:
    unet = stable_diffusion_xl.unet(layers_per_block=2)
    pipe = kind(
        vae=parts.vae(), unet=unet, controlnet=cross(unet), scheduler=stable_diffusion_xl.euler(),
        **stable_diffusion_xl.NOTHING, **stable_diffusion_xl.UNMARKED,
    )  # fmt: skip
    parts.randomise(pipe.unet).eval()
    return Built(parts.quiet(pipe), lambda ask: conditions(kind, ask) | stable_diffusion_xl.text(ask))
