"""What the plugin costs: the same denoising with and without it, alternating in one run, as ratios.

    python tests/benchmarks/overhead.py                    # whole generations of the bundled pipeline
    python tests/benchmarks/overhead.py --model sd15       # one denoiser call at Stable Diffusion 1.5's geometry

Prints, for each setting, the median of the ratios to the plain run of the same round, and their quartiles. On a CPU
the time is that of the processor, which other programs disturb least with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from diffusers_rtsae import RTSAE, list_sites
from diffusers_rtsae.steering import get_site

EXAMPLES = Path(__file__).parents[2] / "examples"
ANCHORS = [961, 721, 481, 241, 1]


def bundled() -> tuple[StableDiffusionPipeline, dict]:
    pipe = StableDiffusionPipeline.from_pretrained(EXAMPLES / "shapes-sd")
    return pipe, {"prompt": ["a star"] * 8, "num_inference_steps": 10}


def sd15(device: str) -> tuple[StableDiffusionPipeline, dict]:
    """Random weights in the shapes of Stable Diffusion 1.5."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        )
        vae = AutoencoderKL(block_out_channels=[32])
    unet = unet.to(torch.float16 if device != "cpu" else torch.bfloat16)
    pipe = StableDiffusionPipeline(
        vae=vae.to(unet.dtype), text_encoder=None, tokenizer=None, unet=unet, scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    text = torch.randn(2, 1, 77, 768, dtype=unet.dtype, device=device)
    call = {"prompt_embeds": text[0], "negative_prompt_embeds": text[1], "num_inference_steps": 1}
    return pipe, call | {"height": 64, "width": 64}  # of the latents: this autoencoder does not scale


def random_dictionary(unet: torch.nn.Module, sites: list[str]) -> dict[str, RTSAE]:
    """Random dictionaries; only rows in use cost anything, so 64 latents stand for any number."""
    made = {}
    for site in sites:
        width = get_site(unet, site).in_channels
        made[site] = RTSAE(site, width, ANCHORS, num_latents=64, k=8)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["bundled", "sd15"], default="bundled")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    pipe, call = bundled() if arguments.model == "bundled" else sd15(arguments.device)
    pipe.to(arguments.device)
    pipe.set_progress_bar_config(disable=True)
    attentions = [site for site in list_sites(pipe.unet) if site.rpartition(".")[0].endswith("attentions")]
    one, four = attentions[-1:], attentions[-4:]

    clock = time.process_time if arguments.device == "cpu" else time.perf_counter

    def generate() -> float:
        generator = torch.Generator().manual_seed(0)
        started = clock()
        pipe(generator=generator, output_type="latent", **call)
        if arguments.device != "cpu":
            torch.cuda.synchronize()
        return clock() - started

    def steer(sites: list[str], count: int, **options):
        def prepare():
            pipe.load_rtsae(random_dictionary(pipe.unet, sites))
            if count:
                pipe.set_rtsae_features({(site, i): 0.01 for site in sites for i in range(count)}, **options)

        return prepare

    settings = {
        "plain": lambda: None,
        "plain, again": lambda: None,
        "loaded, idle": steer(one, 0),
        "1 feature, 1 site": steer(one, 1),
        "5 features, 1 site": steer(one, 5),
        "5 features, 1 site, unclipped": steer(one, 5, clip=False),
        "50 features, 1 site": steer(one, 50),
        "1 feature, 4 sites": steer(four, 1),
        "5 features, 4 sites": steer(four, 5),
        "50 features, 4 sites": steer(four, 50),
    }
    times: dict[str, list[float]] = {name: [] for name in settings}
    for round_ in range(arguments.rounds + 1):  # the first round warms up
        for name, prepare in settings.items():
            prepare()
            seconds = generate()
            pipe.unload_rtsae()
            if round_:
                times[name].append(seconds)
    print(f"{arguments.model} on {arguments.device}, {arguments.rounds} rounds")
    for name, values in times.items():
        ratios = [value / reference for value, reference in zip(values, times["plain"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4) if len(set(ratios)) > 1 else (1.0, 1.0, 1.0)
        print(f"{name:32} {median:6.3f}   quartiles {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
