#!/usr/bin/env bash
# diffusers 0.42.1: PixArt-alpha cannot take a single step with most samplers, its published one among them.
# Expected: num_inference_steps=1 is a (poor) generation with one step, as with every other pipeline. Seen: for one step
# the pipeline takes the second of what `scheduler.step(..., return_dict=False)` returns, as one-step distillation (DMD)
# wants it. DPMSolverMultistep and others return one value, so it fails with IndexError; where there are two, as with
# DDIM, the result is silently the prediction of the clean latents and not the sampler's step. Two steps work.
# It matters to all who call a pipeline with one step as the cheapest way to encode a prompt, or to warm up.
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
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    UniPCMultistepScheduler,
)

print("diffusers", diffusers.__version__)
torch.manual_seed(0)
transformer = PixArtTransformer2DModel(
    sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=16,
    in_channels=4, cross_attention_dim=16, out_channels=8,
).eval()
vae = AutoencoderKL(
    block_out_channels=[8], norm_num_groups=4, latent_channels=4, sample_size=8,
    down_block_types=["DownEncoderBlock2D"], up_block_types=["UpDecoderBlock2D"],
)
text = torch.randn(1, 3, 16)
call = {
    "prompt": None, "negative_prompt": None, "prompt_embeds": text, "negative_prompt_embeds": text,
    "prompt_attention_mask": torch.ones(1, 3), "negative_prompt_attention_mask": torch.ones(1, 3), "height": 8,
    "width": 8, "use_resolution_binning": False, "output_type": "latent", "guidance_scale": 1.0,
}


def drawn(scheduler, steps):
    """What is drawn, or the error."""
    pipe = PixArtAlphaPipeline(None, None, vae, transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    try:
        return pipe(**call, num_inference_steps=steps, latents=torch.ones(1, 4, 8, 8)).images
    except IndexError:
        return "IndexError"


seen = {}
for kind in (DPMSolverMultistepScheduler, UniPCMultistepScheduler, DDIMScheduler):
    results = [drawn(kind(), steps) for steps in (1, 2)]
    seen[kind.__name__] = tuple(one if isinstance(one, str) else "draws" for one in results)
    print(f"{kind.__name__}: one step: {seen[kind.__name__][0]}, two steps: {seen[kind.__name__][1]}")
# of a sampler that changes nothing but says that the clean latents are seven, the picture of one step is seven


class Still(DDIMScheduler):
    def step(self, model_output, timestep, sample, eta=0.0, return_dict=True, **options):
        return sample, torch.full_like(sample, 7)


seen["second value"] = float(drawn(Still(), 1).mean()), float(drawn(Still(), 2).mean())
print("mean of what is drawn where a step changes nothing, in one step and in two:", seen["second value"])
expected = {
    "DPMSolverMultistepScheduler": ("IndexError", "draws"), "UniPCMultistepScheduler": ("IndexError", "draws"),
    "DDIMScheduler": ("draws", "draws"), "second value": (7.0, 1.0),
}
if seen != expected:
    sys.exit("this has changed")
print("as seen before: one step of PixArt is not a step of its sampler")
EOF
