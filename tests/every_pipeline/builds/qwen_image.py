"""Qwen Image, its edit, layered and control forms, and Qwen Image 2.1."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Transformer2DModel,
    QwenImageControlNetModel,
    QwenImageTransformer2DModel,
)

from . import Ask, Built, builds, parts

SIZE = 32
EDIT_SIZE = 256
TEXT = 24


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    # without the usual `shift_terminal`, with which the time of a single step is not a number
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192,
        time_shift_type="exponential",
    )  # fmt: skip


class Coarse(AutoencoderKLQwenImage):
    """
    One that sees the mean of each square of sixteen pixels: pipelines that edit resize their picture to 1024 (640)
    pixels whatever they are given, which takes seconds to encode.
    """

    def encode(self, x: torch.Tensor, return_dict: bool = True):
        return super().encode(torch.nn.functional.avg_pool3d(x, (1, 16, 16)), return_dict)


def vae(kind: type = AutoencoderKLQwenImage, channels: int = 4, colors: int = 3) -> AutoencoderKLQwenImage:
    """Two times smaller, if coarse 32 times."""
    torch.manual_seed(0)
    made = kind(
        base_dim=4, z_dim=channels, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        input_channels=colors, latents_mean=[0.0] * channels, latents_std=[1.0] * channels,
    ).eval()  # fmt: skip
    if kind is Coarse:
        made.temperal_downsample = [False] * 5  # where pipelines read by how much it is smaller
    return made


def shape(channels: int = 4) -> dict:
    return {
        "patch_size": 2, "in_channels": 4 * channels, "out_channels": channels, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": TEXT, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip


def call(ask: Ask, size: int) -> dict:
    mask = torch.ones(len(ask.prompts), 7, dtype=torch.long)
    mask[:, -2:] = 0
    return parts.text(ask, 7, TEXT) | {
        "prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask.clone(), "num_images_per_prompt": ask.images,
        "height": size, "width": size, "generator": parts.generator(), "num_inference_steps": ask.steps,
        "true_cfg_scale": 4.0 if ask.guided else 1.0, "output_type": "latent",
    }  # fmt: skip


def left_kept(size: int) -> torch.Tensor:
    mask = torch.ones(1, 1, size, size)
    mask[..., : size // 4] = 0
    return mask


@builds(
    "QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", "QwenImageControlNetPipeline",
    "QwenImageControlNetInpaintPipeline",
)  # fmt: skip
def qwen_image(kind: type) -> Built:
    name = kind.__name__
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(num_layers=2, **shape()).eval()
    extra = {}
    if "ControlNet" in name:
        torch.manual_seed(1)
        mask_channels = 4 if "Inpaint" in name else 0
        net = QwenImageControlNetModel(num_layers=2, extra_condition_channels=mask_channels, **shape())
        extra["controlnet"] = parts.randomise(net.eval())
    pipe = kind(scheduler=scheduler(), vae=vae(), text_encoder=None, tokenizer=None, transformer=transformer, **extra)

    def ask_for(ask: Ask) -> dict:
        made = call(ask, SIZE)
        if "ControlNet" in name:
            made["control_image"] = parts.picture(SIZE, 8)
            torch.manual_seed(0)  # it encodes the picture with the global generator
            if "Inpaint" in name:
                made["control_mask"] = left_kept(SIZE)
        elif name != "QwenImagePipeline":
            made |= {"image": parts.picture(SIZE), "strength": 0.5, "num_inference_steps": 2 * ask.steps}
            if "Inpaint" in name:
                made["mask_image"] = left_kept(SIZE)
        return made

    return Built(parts.quiet(pipe), ask_for)


@builds("QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImageEditInpaintPipeline")
def qwen_image_edit(kind: type) -> Built:
    name = kind.__name__
    plus, inpaint = "Plus" in name, "Inpaint" in name
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(num_layers=2, zero_cond_t=plus, **shape()).eval()  # as in Edit 2511
    pipe = kind(
        scheduler=scheduler(), vae=vae(Coarse), text_encoder=None, tokenizer=None, processor=None,
        transformer=transformer,
    )  # fmt: skip

    def ask_for(ask: Ask) -> dict:
        made = call(ask, EDIT_SIZE) | {"image": parts.pil(32)}
        if inpaint:
            made |= {"mask_image": left_kept(32), "strength": 0.5, "num_inference_steps": 2 * ask.steps}
        return made

    return Built(parts.quiet(pipe), ask_for, many=not plus)


@builds("QwenImageLayeredPipeline")
def qwen_image_layered(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        num_layers=2, use_additional_t_cond=True, use_layer3d_rope=True, **shape(2)
    ).eval()
    # of the text encoder it asks the type alone
    pipe = kind(
        scheduler=scheduler(), vae=vae(Coarse, channels=2, colors=4), text_encoder=parts.clip_text(), tokenizer=None,
        processor=None, transformer=transformer,
    )  # fmt: skip

    def ask_for(ask: Ask) -> dict:
        made = call(ask, 0) | {"image": parts.pil(32).convert("RGBA"), "layers": 2, "resolution": 640}
        made["prompt"] = parts.words(ask)["prompt"]  # or it would describe the picture
        made["output_type"] = "pt"  # it fails for latents
        return {name: value for name, value in made.items() if name not in ("height", "width")}

    return Built(parts.quiet(pipe), ask_for)


class Processor:
    """What the pipeline asks of its processor when it is made (the real one needs torchvision)."""

    def __init__(self):
        self.tokenizer = parts.tokenizer()

    def apply_chat_template(self, messages, **_) -> list[list[int]]:
        return [self.tokenizer("w1 w2").input_ids]


@builds("QwenImage21Pipeline")
def qwen_image_21(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    small = AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1] * 5, num_res_blocks=1, latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()  # fmt: skip
    pipe = kind(
        scheduler=scheduler(), vae=small, text_encoder=None, processor=Processor(), transformer=transformer,
    )  # fmt: skip
    return Built(parts.quiet(pipe), lambda ask: call(ask, 128))  # sixteen times smaller
