"""OmniGen, from text."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, OmniGenTransformer2DModel
from diffusers.pipelines.omnigen import processor_omnigen

from . import Ask, Built, builds, parts


def without_torchvision(kind: type) -> None:
    """Only pictures need torchvision, but the processor is not there without."""
    module = sys.modules[kind.__module__]
    if not hasattr(module, "OmniGenMultiModalProcessor"):
        transforms = ("Compose", "Lambda", "ToTensor", "Normalize")
        processor_omnigen.transforms = SimpleNamespace(**dict.fromkeys(transforms, lambda *_, **__: None))
        module.OmniGenMultiModalProcessor = processor_omnigen.OmniGenMultiModalProcessor


@builds("OmniGenPipeline")
def omnigen(kind: type) -> Built:
    without_torchvision(kind)
    torch.manual_seed(0)
    transformer = OmniGenTransformer2DModel(
        in_channels=4, patch_size=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=64, num_layers=2, pad_token_id=0, vocab_size=parts.WORDS + 4, max_position_embeddings=256,
        original_max_position_embeddings=256, pos_embed_max_size=16, time_step_dim=16,
        rope_scaling={"type": "su", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
    )  # fmt: skip
    vae = parts.vae(
        block_out_channels=[8] * 4, down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1,
    )  # fmt: skip
    transformer = parts.randomise(transformer.eval())
    pipe = kind(transformer, FlowMatchEulerDiscreteScheduler(invert_sigmas=True), vae, parts.tokenizer(64))

    def call(ask: Ask) -> dict:
        return {
            "prompt": [parts.prompt(seed) for seed in ask.prompts], "height": 64, "width": 64,
            "num_images_per_prompt": ask.images, "guidance_scale": 2.5 if ask.guided else 1.0,
            "num_inference_steps": ask.steps, "generator": parts.generator(), "output_type": "latent",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, negative=False)
