"""Pipelines of several families: of Stable Diffusion 1 on the bundled weights, the others small and random."""

from inspect import signature

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
    UNet2DConditionModel,
)
from kinds import MADE

from diffusers_rtsae import SparseDictionary

PROMPTS = ["a star", "a large blue heart on the left"]
UNET_SITE, DIT_SITE = "up_blocks.1.attentions.1", "transformer_blocks.0"


def picture(count: int = 1, size: int = 64) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(7))


def dictionary(site: str, width: int, kind: str = "RTSAE") -> dict[str, SparseDictionary]:
    torch.manual_seed(0)
    sae = MADE[kind](site, width, [961, 481, 1], 16, 4)
    sae.typical_activation.fill_(20.0)
    sae.max_activation.fill_(40.0)
    return {site: sae}


def bundled(kind, **extra):
    def build(pipe):
        known = signature(kind.__init__).parameters
        components = {name: part for name, part in pipe.components.items() if name in known}
        built = kind(**(components | extra), requires_safety_checker=False)
        built.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        return built, UNET_SITE, 160

    return build


def controlnet(pipe):
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 96))
    return bundled(StableDiffusionControlNetPipeline, controlnet=net)(pipe)


def changed_unet(pipe, **changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**{k: v for k, v in pipe.unet.config.items() if not k.startswith("_")} | changes)


def adapter(pipe):
    extra = T2IAdapter(channels=[64, 160, 192], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter")
    unet = changed_unet(
        pipe,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    return bundled(StableDiffusionAdapterPipeline, adapter=extra, unet=unet)(pipe)


def latent_consistency(pipe):
    built, site, width = bundled(LatentConsistencyModelPipeline, unet=changed_unet(pipe, time_cond_proj_dim=32))(pipe)
    built.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return built, site, width


def instruct(pipe):
    return bundled(StableDiffusionInstructPix2PixPipeline, unet=changed_unet(pipe, in_channels=8))(pipe)


def small_vae(latent_channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[8], norm_num_groups=4, latent_channels=latent_channels, sample_size=16,
        down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"], scaling_factor=1.0,
        shift_factor=0.0,
    )  # fmt: skip


def xl_unet(time_ids: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=8 * time_ids + 32,
        cross_attention_dim=48,
    )  # fmt: skip


def xl(pipe):
    torch.manual_seed(0)
    built = StableDiffusionXLPipeline(
        vae=small_vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=xl_unet(6),
        scheduler=EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip
    return built, "up_blocks.0.attentions.1", 64


def xl_refiner(pipe):
    torch.manual_seed(0)
    built = StableDiffusionXLImg2ImgPipeline(
        vae=small_vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=xl_unet(5),
        scheduler=EulerDiscreteScheduler(), requires_aesthetics_score=True, add_watermarker=False,
    )  # fmt: skip
    return built, "up_blocks.0.attentions.1", 64


def pixart(pipe):
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=48,
        in_channels=4, cross_attention_dim=24, out_channels=8,
    )  # fmt: skip
    parts = {"tokenizer": None, "text_encoder": None, "vae": small_vae(), "scheduler": DDIMScheduler()}
    return PixArtAlphaPipeline(**parts, transformer=transformer), DIT_SITE, 24


def sd3(pipe):
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=48, pooled_projection_dim=32, out_channels=4,
    )  # fmt: skip
    nothing = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    scheduler = FlowMatchEulerDiscreteScheduler()
    return StableDiffusion3Pipeline(transformer, scheduler, small_vae(), **nothing), DIT_SITE, 32


def flux(pipe, site=DIT_SITE):
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    return FluxPipeline(scheduler, small_vae(1), **nothing, transformer=transformer), site, 32


def flux_single(pipe):
    return flux(pipe, "single_transformer_blocks.0")


def embeddings(seed: int, **shapes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


TEXT = {"prompt": PROMPTS, "guidance_scale": 4.0}
XL_TEXT = embeddings(
    1, prompt_embeds=(2, 7, 48), negative_prompt_embeds=(2, 7, 48), pooled_prompt_embeds=(2, 32),
    negative_pooled_prompt_embeds=(2, 32),
) | {"guidance_scale": 4.0}  # fmt: skip
PIXART_TEXT = embeddings(1, prompt_embeds=(2, 7, 48), negative_prompt_embeds=(2, 7, 48)) | {
    "prompt_attention_mask": torch.ones(2, 7), "negative_prompt_attention_mask": torch.ones(2, 7),
    "negative_prompt": None, "use_resolution_binning": False, "height": 16, "width": 16,
}  # fmt: skip
FLUX_TEXT = embeddings(1, prompt_embeds=(2, 7, 48), pooled_prompt_embeds=(2, 32)) | {"height": 16, "width": 32}
TRUE_CFG = embeddings(2, negative_prompt_embeds=(2, 7, 48), negative_pooled_prompt_embeds=(2, 32))
