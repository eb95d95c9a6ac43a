"""HunyuanDiT."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, HunyuanDiT2DControlNetModel, HunyuanDiT2DModel
from transformers import BertConfig, BertModel

from . import Ask, Built, builds, parts

SIZE = 64  # the pipeline takes it that latents are eight times smaller
TEXT, TEXT_2 = 24, 40


def shape() -> dict:
    return {
        "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2, "sample_size": 8,
        "hidden_size": 32, "cross_attention_dim": TEXT, "cross_attention_dim_t5": TEXT_2, "pooled_projection_dim": 16,
    }  # fmt: skip


@builds("HunyuanDiTPipeline", "HunyuanDiTControlNetPipeline")
def hunyuan_dit(kind: type) -> Built:
    control = "ControlNet" in kind.__name__
    torch.manual_seed(0)
    # six blocks: the last two take skip connections from the first two
    transformer = HunyuanDiT2DModel(num_layers=6, learn_sigma=True, **shape()).eval()
    extra = {}
    if control:
        torch.manual_seed(1)
        net = HunyuanDiT2DControlNetModel(conditioning_channels=4, transformer_num_layers=6, **shape())
        extra["controlnet"] = parts.randomise(net.eval())
    vae = parts.vae(
        4, block_out_channels=[8] * 4, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1,
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.03, beta_schedule="scaled_linear", prediction_type="v_prediction",
        steps_offset=1, clip_sample=False,
    )  # fmt: skip
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=parts.WORDS + 4, hidden_size=TEXT, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=77,
    )  # fmt: skip
    bert = BertModel(config).eval()
    # masks that are passed in are not repeated for several images of a prompt, so that it must encode
    encoders = {
        "text_encoder": bert, "tokenizer": parts.tokenizer(77), "text_encoder_2": parts.t5(TEXT_2),
        "tokenizer_2": parts.tokenizer(256), "safety_checker": None, "feature_extractor": None,
    }  # fmt: skip
    pipe = kind(
        vae=vae, transformer=parts.randomise(transformer), scheduler=scheduler, requires_safety_checker=False,
        **encoders, **extra,
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        made = parts.words(ask) | {
            "num_images_per_prompt": ask.images, "height": SIZE, "width": SIZE, "generator": parts.generator(),
            "num_inference_steps": ask.steps, "guidance_scale": 5.0 if ask.guided else 1.0, "output_type": "latent",
            "use_resolution_binning": False,
        }  # fmt: skip
        if control:
            made["control_image"] = parts.picture(SIZE, 8)
            torch.manual_seed(0)  # it encodes the picture with the global generator
        return made

    return Built(parts.quiet(pipe), call)
