#!/usr/bin/env bash
# diffusers 0.42.1: Pyramid Attention Broadcast gives the negative prompt the attention of the positive one.
# Expected: with a skip range of 2, each attention layer is computed at every other denoising step, and kept apart for
# the two calls of classifier-free guidance, as FirstBlockCache does (pipelines name the calls by `cache_context`).
# Seen with Wan, whose pipeline calls the transformer twice a step: the layer counts calls, not steps, and has a single
# memory. Every positive call computes, every negative call is handed the positive one's result of the same step. So
# nothing is carried from step to step, and the two sides that guidance compares share their attention.
# It matters to all who read attention layers per side of guidance, and to all who wonder where guidance went.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install -qq torch==2.13.0
"$room/venv/bin/pip" install -qq diffusers==0.42.1 transformers==5.24.0
export OMP_NUM_THREADS=1 DIFFUSERS_VERBOSITY=error TRANSFORMERS_VERBOSITY=error
"$room/venv/bin/python" - <<'EOF'
import sys

import torch
import diffusers
from diffusers import (
    AutoencoderKLWan,
    PyramidAttentionBroadcastConfig,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

print("diffusers", diffusers.__version__)
torch.manual_seed(0)
transformer = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=16, ffn_dim=32, num_layers=2,
    rope_max_seq_len=32,
).eval()
pipe = WanPipeline(
    tokenizer=None, text_encoder=None, transformer=transformer,
    vae=AutoencoderKLWan(
        base_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], scale_factor_spatial=4
    ),
    scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
)
pipe.set_progress_bar_config(disable=True)
positive, negative = torch.randn(1, 8, 32), torch.randn(1, 8, 32)


def run():
    """For each of four steps: is the last self-attention's output the same for both prompts, and as one step ago?"""
    outputs = []
    handle = transformer.blocks[1].attn1.register_forward_hook(lambda module, args, out: outputs.append(out.clone()))
    pipe(
        prompt_embeds=positive, negative_prompt_embeds=negative, height=32, width=32, num_frames=5,
        num_inference_steps=4, guidance_scale=4.0, output_type="latent", generator=torch.Generator().manual_seed(0),
    )
    handle.remove()
    sides = list(zip(outputs[::2], outputs[1::2]))
    both = [torch.equal(one, other) for one, other in sides]
    kept = [torch.equal(now[0], before[0]) for before, now in zip(sides, sides[1:])]
    return both, kept


seen = {"without": run()}
transformer.enable_cache(
    PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
    )
)
seen["with"] = run()
for name, (both, kept) in seen.items():
    print(f"{name} the cache: both prompts get the same attention, step by step: {both}")
    print(f"{name} the cache: attention is as one step before, from step 2 on: {kept}")
if seen != {"without": ([False] * 4, [False] * 3), "with": ([True] * 4, [False] * 3)}:
    sys.exit("this has changed")
print("as seen before: attention is broadcast from the positive to the negative prompt, and never from step to step")
EOF
