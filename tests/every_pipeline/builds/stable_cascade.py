"""Stable Cascade: a prior of image embeddings and a decoder of them."""

from __future__ import annotations

import torch
from diffusers import DDPMWuerstchenScheduler, StableCascadeUNet
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

from . import Ask, Built, builds, parts


def of_prior() -> dict:
    torch.manual_seed(0)
    prior = StableCascadeUNet(
        in_channels=4, out_channels=4, timestep_ratio_embedding_dim=16, conditioning_dim=32,
        block_out_channels=(32, 32), num_attention_heads=(4, 4), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), clip_text_in_channels=32, clip_text_pooled_in_channels=32,
        clip_image_in_channels=32, switch_level=(False,),
    )  # fmt: skip
    return {
        "prior": parts.randomise(prior).eval(),
        "text_encoder": parts.clip_text(projection=True),
        "tokenizer": parts.tokenizer(),
        "scheduler": DDPMWuerstchenScheduler(),
        "feature_extractor": None,
        "image_encoder": None,
    }


def of_decoder() -> dict:
    torch.manual_seed(0)
    only = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
    decoder = StableCascadeUNet(
        in_channels=4, out_channels=4, timestep_ratio_embedding_dim=16, patch_size=2, conditioning_dim=32,
        block_out_channels=(16, 32), num_attention_heads=(-1, 4), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(2, 1),
        block_types_per_layer=(only, (*only, "SDCascadeAttnBlock")), clip_text_pooled_in_channels=32,
        effnet_in_channels=4, pixel_mapper_in_channels=3, timestep_conditioning_type=("sca",),
    )  # fmt: skip
    torch.manual_seed(0)
    vqgan = PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=16)
    return {
        "decoder": parts.randomise(decoder).eval(),
        "text_encoder": parts.clip_text(projection=True),
        "tokenizer": parts.tokenizer(),
        "scheduler": DDPMWuerstchenScheduler(),
        "vqgan": vqgan.eval(),
    }


def rest(ask: Ask) -> dict:
    return parts.words(ask) | {"generator": parts.generator(), "num_inference_steps": ask.steps}


@builds("StableCascadePriorPipeline")
def prior(kind: type) -> Built:
    def call(ask: Ask) -> dict:
        return rest(ask) | {
            "num_images_per_prompt": ask.images, "guidance_scale": 4.0 if ask.guided else 1.0, "height": 128,
            "width": 128,
        }  # fmt: skip

    return Built(parts.quiet(kind(**of_prior())), call)


@builds("StableCascadeDecoderPipeline")
def decoder(kind: type) -> Built:
    def call(ask: Ask) -> dict:
        # several images are asked for with an embedding for each: those given are not repeated
        return rest(ask) | {
            "image_embeddings": parts.stacked(ask.prompts, 4, 3, 3).repeat_interleave(ask.images, dim=0),
            "guidance_scale": 4.0 if ask.guided else 0.0, "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(kind(**of_decoder(), latent_dim_scale=4.0)), call)


@builds("StableCascadeCombinedPipeline")
def combined(kind: type) -> Built:
    pipe = kind(**of_decoder(), **{"prior_" + key: part for key, part in of_prior().items()})

    def call(ask: Ask) -> dict:
        scale = 4.0 if ask.guided else 1.0
        return rest(ask) | {
            "prior_num_inference_steps": ask.steps, "prior_guidance_scale": scale, "decoder_guidance_scale": scale,
            "num_images_per_prompt": ask.images, "height": 128, "width": 128, "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call)
