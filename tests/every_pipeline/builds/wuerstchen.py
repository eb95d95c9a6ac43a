"""Wuerstchen: a prior of image embeddings and a decoder of them."""

from __future__ import annotations

import torch
from diffusers import DDPMWuerstchenScheduler
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior

from . import Ask, Built, builds, parts


def of_prior() -> dict:
    torch.manual_seed(0)
    prior = WuerstchenPrior(c_in=4, c=32, c_cond=32, c_r=16, depth=2, nhead=4)
    return {
        "prior": parts.randomise(prior).eval(),
        "text_encoder": parts.clip_text(),
        "tokenizer": parts.tokenizer(),
        "scheduler": DDPMWuerstchenScheduler(),
    }


def of_decoder() -> dict:
    torch.manual_seed(0)
    decoder = WuerstchenDiffNeXt(
        c_r=16, c_cond=32, c_hidden=[16, 32], nhead=[-1, 4], blocks=[1, 1], level_config=["CT", "CTA"],
        inject_effnet=[False, True], effnet_embd=4, clip_embd=32,
    )  # fmt: skip
    torch.manual_seed(0)
    vqgan = PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=16)
    return {
        "decoder": parts.randomise(decoder).eval(),
        "text_encoder": parts.clip_text(),
        "tokenizer": parts.tokenizer(),
        "scheduler": DDPMWuerstchenScheduler(),
        "vqgan": vqgan.eval(),
    }


def rest(ask: Ask) -> dict:
    return parts.words(ask) | {"generator": parts.generator(), "num_inference_steps": ask.steps}


@builds("WuerstchenPriorPipeline")
def prior(kind: type) -> Built:
    def call(ask: Ask) -> dict:
        return rest(ask) | {
            "num_images_per_prompt": ask.images, "guidance_scale": 4.0 if ask.guided else 1.0, "height": 128,
            "width": 128,
        }  # fmt: skip

    return Built(parts.quiet(kind(**of_prior())), call)


@builds("WuerstchenDecoderPipeline")
def decoder(kind: type) -> Built:
    def call(ask: Ask) -> dict:
        # several images are asked for with an embedding for each: those given are not repeated. The text is repeated
        # for each embedding, so that several prompts with one each do not fit.
        return rest(ask) | {
            "image_embeddings": parts.stacked(ask.prompts, 4, 3, 3).repeat_interleave(ask.images, dim=0),
            "guidance_scale": 4.0 if ask.guided else 0.0, "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(kind(**of_decoder(), latent_dim_scale=4.0)), call, many=False)


@builds("WuerstchenCombinedPipeline")
def combined(kind: type) -> Built:
    pipe = kind(**of_decoder(), **{"prior_" + key: part for key, part in of_prior().items()})

    def call(ask: Ask) -> dict:
        scale = 4.0 if ask.guided else 1.0
        return rest(ask) | {
            "prior_num_inference_steps": ask.steps, "prior_guidance_scale": scale, "decoder_guidance_scale": scale,
            "num_images_per_prompt": ask.images, "height": 128, "width": 128, "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, many=False)  # as the decoder
