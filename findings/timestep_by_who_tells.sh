#!/usr/bin/env bash
# diffusers 0.42.1: the timestep of one step is another number for a callback, the denoiser and the scheduler.
# Expected: `timestep` in callback_on_step_end, the denoiser's `timestep` and scheduler.timesteps agree, count down from
# about 1000 and name a step, as in Stable Diffusion. Seen: Flux' denoiser is told t / 1000, Z-Image's 1 - t / 1000 (it
# counts up), and CogView4's callback is given the noise level instead: at a step that its denoiser calls 667, it says
# 0.47. Schedulers: IPNDM counts 1 to 0, EDMEuler down to below zero, MiniMaxH3's rise while noise falls, and UniPC
# with exponential sigmas, whose timesteps are rounded, gives two steps of twenty the same name (Euler does not).
# It matters to all who act from t = 800 to 400, or store activations by t: the same numbers choose other steps
# elsewhere, or none, or overwrite one step by another.
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
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    IPNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.schedulers import MiniMaxH3Scheduler

print("diffusers", diffusers.__version__)


def vae():
    return AutoencoderKL(
        block_out_channels=(8,) * 4, norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def stable_diffusion():
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    pipe = StableDiffusionPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, unet=unet, safety_checker=None,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        feature_extractor=None, requires_safety_checker=False,
    )
    return pipe, unet, dict(prompt_embeds=torch.randn(1, 4, 16), guidance_scale=1.0)


def flux():
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )
    pipe = FluxPipeline(
        vae=vae(), text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return pipe, transformer, dict(prompt_embeds=torch.randn(1, 7, 32), pooled_prompt_embeds=torch.randn(1, 32))


def z_image():
    transformer = ZImageTransformer2DModel(
        in_channels=4, n_layers=1, n_refiner_layers=1, dim=32, n_heads=2, n_kv_heads=2, cap_feat_dim=24,
        axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
    )
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(), text_encoder=None, tokenizer=None,
        transformer=transformer,
    )
    return pipe, transformer, dict(
        prompt_embeds=[torch.randn(7, 24)], negative_prompt_embeds=[torch.randn(7, 24)], guidance_scale=0.0
    )


def cogview4():
    transformer = CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        text_embed_dim=32, time_embed_dim=16, condition_dim=8, pos_embed_max_size=16, sample_size=8,
        rope_axes_dim=(16, 16),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    pipe = CogView4Pipeline(None, None, vae(), transformer, scheduler)
    return pipe, transformer, dict(prompt_embeds=torch.randn(1, 16, 32), guidance_scale=1.0)


def told(make):
    """What callback, denoiser and scheduler call the second of four steps."""
    torch.manual_seed(0)
    pipe, denoiser, inputs = make()
    pipe.set_progress_bar_config(disable=True)
    denoiser.eval()
    heard = {"callback": [], "denoiser": []}

    def listen(module, args, kwargs):
        step = kwargs["timestep"] if "timestep" in kwargs else args[1]
        heard["denoiser"].append(float(step.flatten()[0]))

    def callback(pipe, index, step, kwargs):
        heard["callback"].append(float(step))
        return kwargs

    denoiser.register_forward_pre_hook(listen, with_kwargs=True)
    pipe(
        **inputs, height=64, width=64, num_inference_steps=4, output_type="latent", callback_on_step_end=callback,
        generator=torch.Generator().manual_seed(0),
    )
    return round(heard["callback"][1], 2), round(heard["denoiser"][1], 2), round(float(pipe.scheduler.timesteps[1]), 2)


def steps(scheduler, count):
    scheduler.set_timesteps(count)
    return [round(float(step), 2) for step in scheduler.timesteps]


seen = {make.__name__: told(make) for make in (stable_diffusion, flux, z_image, cogview4)}
print("the second of four steps, by the callback, the denoiser and the scheduler:")
for name, numbers in seen.items():
    print(f"    {name}: {numbers}")
seen["IPNDM"] = steps(IPNDMScheduler(), 4)
seen["EDMEuler"] = steps(EDMEulerScheduler(), 4)
minimax = MiniMaxH3Scheduler()
seen["MiniMaxH3"] = steps(minimax, 4)
seen["MiniMaxH3, noise"] = [round(float(sigma), 2) for sigma in minimax.sigmas][: len(seen["MiniMaxH3"])]
for name in ("IPNDM", "EDMEuler", "MiniMaxH3", "MiniMaxH3, noise"):
    print(f"{name}: {seen[name]}")
for kind in (UniPCMultistepScheduler, EulerDiscreteScheduler):
    scheduler = kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_exponential_sigmas=True)
    made = steps(scheduler, 20)
    seen[kind.__name__] = len(set(made))
    print(f"{kind.__name__}, exponential sigmas: {len(set(made))} names for 20 steps, the last four: {made[-4:]}")
expected = {
    "stable_diffusion": (501.0, 501.0, 501.0), "flux": (750.0, 0.75, 750.0), "z_image": (750.0, 0.25, 750.0),
    "cogview4": (0.47, 667.0, 667.0), "IPNDM": [1.0, 0.65, 0.33, 0.09], "EDMEuler": [1.1, 0.57, -0.19, -1.55],
    "MiniMaxH3": [0.0, 0.04, 0.14], "MiniMaxH3, noise": [1.0, 0.96, 0.86], "UniPCMultistepScheduler": 19,
    "EulerDiscreteScheduler": 20,
}
if seen != expected:
    sys.exit("this has changed")
print("as seen before: what a timestep says depends on who tells it")
EOF
