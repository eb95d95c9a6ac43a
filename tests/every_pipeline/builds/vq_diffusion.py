"""VQ Diffusion: a transformer of picture tokens, which it unmasks and changes."""

from __future__ import annotations

import torch
from diffusers import Transformer2DModel, VQDiffusionScheduler
from diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion import LearnedClassifierFreeSamplingEmbeddings

from . import Ask, Built, builds, parts


@builds("VQDiffusionPipeline")
def vq_diffusion(kind: type) -> Built:
    torch.manual_seed(0)
    transformer = Transformer2DModel(
        num_attention_heads=4, attention_head_dim=8, num_layers=2, cross_attention_dim=32, attention_bias=True,
        sample_size=8, num_vector_embeds=17, activation_fn="geglu-approximate", num_embeds_ada_norm=100,
        norm_type="ada_norm",
    )  # fmt: skip
    vqvae = parts.movq(norm_type="group", up_block_types=["UpDecoderBlock2D"])
    vqvae.quantize.embedding.weight.data = parts.embeddings(5, 16, 4)  # new ones are all close to zero
    learned = LearnedClassifierFreeSamplingEmbeddings(learnable=True, hidden_size=32, length=16)
    pipe = kind(
        vqvae=vqvae, text_encoder=parts.clip_text(), tokenizer=parts.tokenizer(), transformer=transformer.eval(),
        scheduler=VQDiffusionScheduler(num_vec_classes=17),
        learned_classifier_free_sampling_embeddings=parts.randomise(learned, std=1.0),
    )  # fmt: skip

    def call(ask: Ask) -> dict:
        return {
            "prompt": [parts.prompt(seed) for seed in ask.prompts], "num_images_per_prompt": ask.images,
            "guidance_scale": 5.0 if ask.guided else 1.0, "num_inference_steps": ask.steps,
            "generator": parts.generator(), "output_type": "np",
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, negative=False)
