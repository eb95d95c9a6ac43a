"""Flux 1 and its control, fill, image and reference forms."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlNetModel, FluxTransformer2DModel
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from . import Ask, Built, builds, parts

SIZE = 16
TEXT, POOLED = 24, 32


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)


def shape(inputs: int) -> dict:
    """Geometry of a denoiser for latents of one channel, which are packed to four."""
    return {
        "patch_size": 1, "in_channels": inputs, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": TEXT, "pooled_projection_dim": POOLED,
        "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip


def transformer(inputs: int = 4) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(**shape(inputs), out_channels=4).eval()


def mask() -> torch.Tensor:
    """All but the left quarter is painted anew."""
    made = torch.ones(1, 1, SIZE, SIZE)
    made[..., : SIZE // 4] = 0
    return made


def encoders() -> dict:
    return {
        "text_encoder": parts.clip_text(POOLED), "tokenizer": parts.tokenizer(),
        "text_encoder_2": parts.t5(TEXT), "tokenizer_2": parts.tokenizer(64),
    }  # fmt: skip


def text(ask: Ask, true_guidance: bool) -> dict:
    made = {
        "prompt": parts.words(ask)["prompt"], "max_sequence_length": 16, "num_images_per_prompt": ask.images,
        "height": SIZE, "width": SIZE, "generator": parts.generator(), "num_inference_steps": ask.steps,
        "guidance_scale": 3.5, "output_type": "latent",
    }  # fmt: skip
    if true_guidance:
        made["negative_prompt"] = parts.words(ask)["negative_prompt"]
        made["true_cfg_scale"] = 3.0 if ask.guided else 1.0
    return made


@builds(
    "FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxKontextPipeline", "FluxKontextInpaintPipeline",
    "FluxFillPipeline", "FluxControlPipeline", "FluxControlImg2ImgPipeline", "FluxControlInpaintPipeline",
    "FluxControlNetPipeline", "FluxControlNetImg2ImgPipeline", "FluxControlNetInpaintPipeline",
)  # fmt: skip
def flux(kind: type) -> Built:
    name = kind.__name__
    extra = {}
    inputs = 4
    if "ControlNet" in name:
        torch.manual_seed(1)
        extra["controlnet"] = parts.randomise(FluxControlNetModel(**shape(4)).eval())
    elif "Control" in name:
        inputs = 8  # the control picture is packed beside the latents
    elif "Fill" in name:
        inputs = 4 + 4 + 4  # besides the latents the masked picture and its mask, packed
    # pooled embeddings that are passed in are not repeated for several images of a prompt, so that it must encode
    pipe = kind(scheduler=scheduler(), vae=parts.vae(1), transformer=transformer(inputs), **encoders(), **extra)
    true_guidance = "Control" not in name and "Fill" not in name or name == "FluxControlNetPipeline"

    def call(ask: Ask) -> dict:
        made = text(ask, true_guidance)
        if "Control" in name:
            made["control_image"] = parts.picture(SIZE, 8)
        if any(word in name for word in ("Img2Img", "Inpaint", "Kontext", "Fill")):
            made["image"] = parts.picture(SIZE)
        if "Img2Img" in name or "Inpaint" in name:
            made |= {"strength": 0.5, "num_inference_steps": 2 * ask.steps}
        if "Inpaint" in name or "Fill" in name:
            made["mask_image"] = mask()
        if "Kontext" in name:
            made |= {"_auto_resize": False, "max_area": SIZE**2}
        return made

    return Built(parts.quiet(pipe), call, guided=true_guidance, negative=true_guidance)


@builds("FluxPriorReduxPipeline")
def redux(kind: type) -> Built:
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
    )  # fmt: skip
    vision = SiglipVisionModel(config).eval()
    pipe = kind(
        image_encoder=vision, feature_extractor=SiglipImageProcessor(size={"height": 16, "width": 16}),
        image_embedder=ReduxImageEncoder(redux_dim=16, txt_in_features=TEXT).eval(), **encoders(),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        return {"image": parts.pil(16), "prompt": parts.prompt(ask.prompts[0])}

    return Built(parts.quiet(pipe), call, many=False, images=False, guided=False, negative=False)
