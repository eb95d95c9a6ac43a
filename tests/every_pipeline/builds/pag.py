"""Pipelines with perturbed attention guidance."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderDC,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    MotionAdapter,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from transformers import BertConfig, BertModel

from . import Ask, Built, builds, parts

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD_NOISE = SD_BETAS | {"steps_offset": 1}


def controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """A ControlNet that does not shrink its picture, as `parts.vae` does not."""
    torch.manual_seed(0)
    return parts.randomise(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16,))).eval()


def text(ask: Ask) -> dict:
    return parts.text(ask, 5, 32) | rest(ask)


def words(ask: Ask) -> dict:
    return {
        "prompt": [parts.prompt(seed) for seed in ask.prompts],
        "negative_prompt": [parts.prompt(ask.negative)] * len(ask.prompts),
    } | rest(ask)


def rest(ask: Ask) -> dict:
    return {
        "num_images_per_prompt": ask.images,
        "guidance_scale": 5.0 if ask.guided else 1.0,
        "num_inference_steps": ask.steps,
        "generator": parts.generator(),
        "output_type": "latent",
    }


def pooled(ask: Ask) -> dict:
    return {
        "pooled_prompt_embeds": parts.stacked(ask.prompts, 32),
        "negative_pooled_prompt_embeds": parts.stacked((ask.negative,) * len(ask.prompts), 32),
    }


def pictures(kind: type, ask: Ask) -> dict:
    """What a pipeline takes besides the text: its pictures, and twice the steps of which it leaves out half."""
    picture, mask, name = parts.picture(8), (parts.picture(8, 9)[:, :1] > 0.5).float(), kind.__name__
    half = {"strength": 0.5, "num_inference_steps": 2 * ask.steps}
    if "Inpaint" in name:
        more = {"control_image": parts.picture(8, 8)} if "ControlNet" in name else {}
        return {"image": picture, "mask_image": mask, "height": 8, "width": 8} | half | more
    if "Img2Img" in name:
        more = {"control_image": parts.picture(8, 8)} if "ControlNet" in name else {}
        return {"image": picture} | half | more
    return {"image": picture} if "ControlNet" in name else {"height": 8, "width": 8}


@builds(
    "StableDiffusionPAGPipeline",
    "StableDiffusionPAGImg2ImgPipeline",
    "StableDiffusionPAGInpaintPipeline",
    "StableDiffusionControlNetPAGPipeline",
    "StableDiffusionControlNetPAGInpaintPipeline",
)
def stable_diffusion(kind: type) -> Built:
    name = kind.__name__
    whole = name == "StableDiffusionPAGInpaintPipeline"  # the U-Net that also takes the mask and the masked picture
    unet = parts.sd_unet(in_channels=9 if whole else 4)
    scheduler = PNDMScheduler(**SD_NOISE, skip_prk_steps=True, set_alpha_to_one=False)
    if "ControlNet" in name:
        scheduler = (DDIMScheduler if "Inpaint" in name else UniPCMultistepScheduler).from_config(scheduler.config)
    extra = {"controlnet": controlnet(unet)} if "ControlNet" in name else {}
    pipe = kind(
        vae=parts.vae(), text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, **extra,
    )  # fmt: skip
    return Built(parts.quiet(pipe), lambda ask: text(ask) | pictures(kind, ask))


@builds(
    "StableDiffusionXLPAGPipeline",
    "StableDiffusionXLPAGImg2ImgPipeline",
    "StableDiffusionXLPAGInpaintPipeline",
    "StableDiffusionXLControlNetPAGPipeline",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline",
)
def stable_diffusion_xl(kind: type) -> Built:
    unet = parts.sd_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    extra = {"controlnet": controlnet(unet)} if "ControlNet" in kind.__name__ else {}
    pipe = kind(
        vae=parts.vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=unet,
        scheduler=EulerDiscreteScheduler(**SD_NOISE, timestep_spacing="leading"), add_watermarker=False, **extra,
    )  # fmt: skip
    return Built(parts.quiet(pipe), lambda ask: text(ask) | pooled(ask) | pictures(kind, ask))


@builds("StableDiffusion3PAGPipeline", "StableDiffusion3PAGImg2ImgPipeline")
def stable_diffusion_3(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip
    # the text itself: embeddings that are given are not repeated for several images
    encoders = {"text_encoder": parts.clip_text(16, projection=True), "tokenizer": parts.tokenizer()}
    encoders |= {f"{key}_2": part for key, part in encoders.items()}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = kind(transformer, scheduler, parts.vae(), **encoders, text_encoder_3=None, tokenizer_3=None)

    def call(ask: Ask) -> dict:
        return words(ask) | pictures(kind, ask) | {"height": 8, "width": 8}

    return Built(parts.quiet(pipe), call)


@builds("PixArtSigmaPAGPipeline")
def pixart(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=3, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, use_additional_conditions=False,
    ).eval()  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    pipe = kind(None, None, parts.vae(), transformer, scheduler)

    def call(ask: Ask) -> dict:
        ones = torch.ones(len(ask.prompts), 5)
        return text(ask) | {
            "prompt_attention_mask": ones, "negative_prompt_attention_mask": ones, "negative_prompt": None,
            "use_resolution_binning": False, "height": 8, "width": 8,
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)


@builds("SanaPAGPipeline")
def sana(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=32,
        sample_size=8,
    ).eval()  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    ).eval()  # fmt: skip
    pipe = kind(None, None, vae, transformer, FlowMatchEulerDiscreteScheduler(shift=3.0))

    def call(ask: Ask) -> dict:
        ones = torch.ones(len(ask.prompts), 5)
        return text(ask) | {
            "prompt_attention_mask": ones, "negative_prompt_attention_mask": ones, "negative_prompt": None,
            "use_resolution_binning": False, "height": 32, "width": 32,
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)


@builds("HunyuanDiTPAGPipeline")
def hunyuan_dit(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8, hidden_size=32,
        num_layers=4, mlp_ratio=2.0, cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16,
        text_len=77, text_len_t5=256,
    ).eval()  # fmt: skip
    bert = BertConfig(
        vocab_size=parts.WORDS + 4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=77,
    )  # fmt: skip
    # the pipeline counts on pictures eight times as large as the latents
    vae = parts.vae(
        block_out_channels=[8] * 4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.03, beta_schedule="scaled_linear", prediction_type="v_prediction",
        steps_offset=1, clip_sample=False,
    )  # fmt: skip
    # the text itself: masks that are given are not repeated for several images
    pipe = kind(
        vae, BertModel(bert).eval(), parts.tokenizer(77), transformer, scheduler, requires_safety_checker=False,
        text_encoder_2=parts.t5(), tokenizer_2=parts.tokenizer(256),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        # without classifier-free guidance perturbed attention does not run here: the style is always repeated thrice
        return words(ask) | {
            "use_resolution_binning": False, "height": 64, "width": 64, "pag_scale": 3.0 if ask.guided else 0.0,
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)


@builds("AnimateDiffPAGPipeline")
def animate_diff(kind: type) -> Built:
    unet = parts.sd_unet()
    torch.manual_seed(0)
    motion = MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_num_attention_heads=4, motion_norm_num_groups=4,
        motion_max_seq_length=8, use_motion_mid_block=False,
    )  # fmt: skip
    scheduler = DDIMScheduler(**SD_NOISE | {"beta_schedule": "linear"}, clip_sample=False)
    pipe = kind(
        vae=parts.vae(), text_encoder=None, tokenizer=None, unet=unet, motion_adapter=motion, scheduler=scheduler
    )
    parts.randomise(pipe.unet).eval()  # a new motion module adds nothing

    def call(ask: Ask) -> dict:
        return {key: value for key, value in text(ask).items() if key != "num_images_per_prompt"} | {
            "num_frames": 3, "height": 8, "width": 8,
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, images=False)
