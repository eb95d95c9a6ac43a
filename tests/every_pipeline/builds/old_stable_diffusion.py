"""Deprecated pipelines of the Stable Diffusion U-Net: edits of pictures, and of what a step does."""

from __future__ import annotations

import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    SchedulerMixin,
)
from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
from diffusers.pipelines.stable_diffusion.clip_image_project_model import CLIPImageProjection
from transformers import CLIPVisionConfig

from . import Ask, Built, builds, parts

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIZE = {"height": 8, "width": 8}


def ddim() -> DDIMScheduler:
    return DDIMScheduler(**NOISE, steps_offset=1, clip_sample=False, set_alpha_to_one=False)


def pndm() -> PNDMScheduler:
    return PNDMScheduler(**NOISE, steps_offset=1, skip_prk_steps=True, set_alpha_to_one=False)


def pipeline(kind: type, scheduler: SchedulerMixin, encoder: bool = False, **changes):
    """The pipeline with a small U-Net, with a text encoder where it is needed."""
    made = {
        "vae": parts.vae(), "unet": parts.sd_unet(), "scheduler": scheduler, "safety_checker": None,
        "feature_extractor": None, "requires_safety_checker": False,
        "text_encoder": parts.clip_text() if encoder else None, "tokenizer": parts.tokenizer() if encoder else None,
    }  # fmt: skip
    return parts.quiet(kind(**made | changes))


def rest(ask: Ask) -> dict:
    return {
        "num_images_per_prompt": ask.images, "guidance_scale": 7.5 if ask.guided else 1.0,
        "num_inference_steps": ask.steps, "generator": parts.generator(), "output_type": "latent",
    }  # fmt: skip


def embedded(ask: Ask) -> dict:
    return parts.text(ask, 5, 32) | rest(ask)


def worded(ask: Ask) -> dict:
    return parts.words(ask) | rest(ask)


def half(ask: Ask) -> dict:
    """Twice the steps, of which the pipeline leaves out half."""
    return {"num_inference_steps": 2 * ask.steps, "strength": 0.5}


def pictures(ask: Ask) -> torch.Tensor:
    return (parts.picture(8) * 2 - 1).expand(len(ask.prompts), -1, -1, -1)


@builds("CycleDiffusionPipeline")
def cycle(kind: type) -> Built:
    def call(ask: Ask) -> dict:
        made = {key: value for key, value in worded(ask).items() if key != "negative_prompt"}
        return made | half(ask) | {"source_prompt": [parts.prompt(5)] * len(ask.prompts), "image": pictures(ask)}

    # with guidance it takes the first two rows of each text for those of the only prompt and its empty one
    return Built(pipeline(kind, ddim(), encoder=True), call, many=False, images=False, negative=False)


@builds("StableDiffusionInpaintPipelineLegacy")
def inpaint(kind: type) -> Built:
    def call(ask: Ask) -> dict:
        mask = (parts.picture(8, 9)[:, :1] > 0.5).float().expand(len(ask.prompts), -1, -1, -1)
        return embedded(ask) | half(ask) | {"image": pictures(ask), "mask_image": mask}

    return Built(pipeline(kind, pndm()), call)


@builds("StableDiffusionModelEditingPipeline")
def model_editing(kind: type) -> Built:
    return Built(pipeline(kind, ddim()), lambda ask: embedded(ask) | SIZE)


@builds("StableDiffusionParadigmsPipeline")
def paradigms(kind: type) -> Built:
    scheduler = DDPMParallelScheduler(**NOISE, clip_sample=False, timestep_spacing="trailing")
    return Built(pipeline(kind, scheduler), lambda ask: embedded(ask) | SIZE)


@builds("StableDiffusionPix2PixZeroPipeline")
def pix2pix_zero(kind: type) -> Built:
    extra = {"inverse_scheduler": DDIMInverseScheduler(**NOISE), "caption_generator": None, "caption_processor": None}

    def call(ask: Ask) -> dict:
        directions = {"source_embeds": parts.stacked((5, 6), 5, 32), "target_embeds": parts.stacked((7, 8), 5, 32)}
        return embedded(ask) | directions | SIZE

    # the direction is added to the second row alone, which is the prompt's only if there is one prompt and image
    return Built(pipeline(kind, ddim(), **extra), call, many=False, images=False)


@builds("StableDiffusionAttendAndExcitePipeline")
def attend_and_excite(kind: type) -> Built:
    def call(ask: Ask) -> dict:
        return worded(ask) | SIZE | {"token_indices": [[1, 2]] * len(ask.prompts), "attn_res": (8, 8)}

    return Built(pipeline(kind, pndm(), encoder=True), call)


@builds("StableDiffusionDiffEditPipeline")
def diff_edit(kind: type) -> Built:
    extra = {"inverse_scheduler": DDIMInverseScheduler(**NOISE, steps_offset=1, clip_sample=False)}

    def call(ask: Ask) -> dict:
        inverted = parts.embeddings(5, ask.steps, 4, 8, 8).expand(len(ask.prompts), -1, -1, -1, -1)
        mask = (parts.picture(8, 9)[:, 0] > 0.5).float()
        return embedded(ask) | {
            "num_inference_steps": 2 * ask.steps, "inpaint_strength": 0.5, "image_latents": inverted,
            "mask_image": mask,
        }  # fmt: skip

    return Built(pipeline(kind, ddim(), **extra), call)


@builds("StableDiffusionGLIGENPipeline", "StableDiffusionGLIGENTextImagePipeline")
def gligen(kind: type) -> Built:
    with_pictures = "TextImage" in kind.__name__
    unet = parts.randomise(parts.sd_unet(attention_type="gated-text-image" if with_pictures else "gated"), std=0.5)
    torch.manual_seed(0)
    extra = {}
    if with_pictures:
        extra = {
            "processor": parts.clip_pictures(), "image_encoder": parts.clip_vision(),
            "image_project": CLIPImageProjection(32),
        }  # fmt: skip
    pipe = pipeline(kind, pndm(), encoder=True, unet=unet, **extra)

    def call(ask: Ask) -> dict:
        made = {"gligen_phrases": [parts.prompt(5)], "gligen_boxes": [[0.1, 0.3, 0.6, 0.9]]}
        if with_pictures:
            made["gligen_images"] = [parts.pil(32)]
        return worded(ask) | made | SIZE | {"gligen_scheduled_sampling_beta": 0.5}

    return Built(pipe, call)


@builds("StableDiffusionLDM3DPipeline")
def ldm3d(kind: type) -> Built:
    pipe = pipeline(kind, pndm(), vae=parts.vae(in_channels=6, out_channels=6), image_encoder=None)
    # it cannot return the latents: it takes what it returns apart
    return Built(pipe, lambda ask: embedded(ask) | SIZE | {"output_type": "np"})


@builds("StableDiffusionPanoramaPipeline")
def panorama(kind: type) -> Built:
    # it counts on pictures eight times as large as the latents, and on views of 64 latents
    vae = parts.vae(
        block_out_channels=[8] * 4, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    pipe = pipeline(kind, ddim(), vae=vae, image_encoder=None)
    # it asks for the rows of several images in the wrong order: what it takes for the unconditional of the first is
    # the first, for the prompt's the second
    return Built(pipe, lambda ask: embedded(ask) | {"height": 64, "width": 576}, many=False, images=False)


@builds("StableDiffusionPipelineSafe")
def safe(kind: type) -> Built:
    pipe = pipeline(kind, pndm(), encoder=True, image_encoder=None)
    concept = {"sld_guidance_scale": 2000.0, "sld_warmup_steps": 0, "sld_threshold": 0.025}
    return Built(pipe, lambda ask: worded(ask) | SIZE | concept | {"output_type": "np"})


@builds("StableDiffusionSAGPipeline")
def self_attention(kind: type) -> Built:
    pipe = pipeline(kind, ddim(), image_encoder=None)
    return Built(pipe, lambda ask: embedded(ask) | SIZE)


@builds("SemanticStableDiffusionPipeline")
def semantic(kind: type) -> Built:
    scheduler = DPMSolverMultistepScheduler(**NOISE, steps_offset=1)

    def call(ask: Ask) -> dict:
        edits = {"editing_prompt": [parts.prompt(5), parts.prompt(6)], "edit_warmup_steps": 0, "edit_threshold": 0.5}
        return worded(ask) | SIZE | edits

    return Built(pipeline(kind, scheduler, encoder=True), call)


@builds("PaintByExamplePipeline")
def paint_by_example(kind: type) -> Built:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=8,
        projection_dim=32,
    )  # fmt: skip
    pipe = kind(
        vae=parts.vae(), image_encoder=PaintByExampleImageEncoder(config).eval(), unet=parts.sd_unet(in_channels=9),
        scheduler=pndm(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        # the prompts are the pictures whose content is painted
        mask = (parts.picture(8, 9)[:, :1] > 0.5).float().expand(len(ask.prompts), -1, -1, -1)
        return rest(ask) | {
            "example_image": torch.cat([parts.picture(32, seed) for seed in ask.prompts]), "image": pictures(ask),
            "mask_image": mask.clone(),
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, negative=False)
