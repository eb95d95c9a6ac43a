"""Text by diffusion: LLaDA 2."""

from __future__ import annotations

import torch
from diffusers import BlockRefinementScheduler
from transformers import LlamaConfig, LlamaForCausalLM

from . import Ask, Built, builds, parts, unbuilt


@builds("LLaDA2Pipeline")
def llada2(kind: type) -> Built:
    tokenizer = parts.tokenizer(64)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()  # the published one's code is beside its weights
    pipe = kind(model, BlockRefinementScheduler(block_length=8), tokenizer)

    def call(ask: Ask) -> dict:
        return {
            "prompt": [parts.prompt(seed) for seed in ask.prompts], "use_chat_template": False, "gen_length": 16,
            "num_inference_steps": ask.steps, "eos_early_stop": False, "max_post_steps": 0, "output_type": "seq",
            "generator": parts.generator(),
        }  # fmt: skip

    return Built(parts.quiet(pipe), call, images=False, guided=False, negative=False)


unbuilt(
    "diffusers 0.42.1 calls transformers 5.24's model with an argument's earlier name, past_key_values for cache",
    "DiffusionGemmaPipeline",
)
