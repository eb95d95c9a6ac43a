"""What steering costs: the same denoising with and without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from diffusers_rtsae import RTSAE, list_sites
from diffusers_rtsae.denoiser import get_site
from diffusers_rtsae.steering import Controller

from .timing import CUDA, DEVICE, row, rows, seconds, take_turns

EXAMPLES = Path(__file__).parents[2] / "examples"
ANCHORS = [961, 721, 481, 241, 1]


def bundled() -> tuple[StableDiffusionPipeline, dict]:
    pipe = StableDiffusionPipeline.from_pretrained(EXAMPLES / "shapes-sd").to(DEVICE)
    return pipe, {"prompt": ["a star"] * 8, "num_inference_steps": 10}


def sd15() -> tuple[StableDiffusionPipeline, dict]:
    """Random weights in the shapes of Stable Diffusion 1.5: one step in float32 on a CPU, else twenty in float16."""
    torch.manual_seed(0)
    dtype = torch.float16 if CUDA else torch.float32
    with torch.device(DEVICE):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        )
        vae = AutoencoderKL(block_out_channels=[32])
    pipe = StableDiffusionPipeline(
        vae=vae.to(dtype), text_encoder=None, tokenizer=None, unet=unet.to(dtype),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    text = torch.randn(2, 1, 77, 768, dtype=dtype, device=DEVICE)
    call = {"prompt_embeds": text[0], "negative_prompt_embeds": text[1], "num_inference_steps": 20 if CUDA else 1}
    return pipe, call | {"height": 64, "width": 64}  # of the latents: this autoencoder does not scale


def attentions(pipe) -> list[str]:
    return [site for site in list_sites(pipe.unet) if site.rpartition(".")[0].endswith("attentions")]


def steer(pipe, sites: list[str], count: int, **options) -> None:
    """Random dictionaries; only rows in use cost anything, so 64 latents stand for any number."""
    widths = {site: get_site(pipe.unet, site).in_channels for site in sites}
    pipe.load_rtsae({site: RTSAE(site, width, ANCHORS, num_latents=64, k=8) for site, width in widths.items()})
    if count:
        pipe.set_rtsae_features({(site, i): 0.01 for site in sites for i in range(count)}, **options)


class HookTime:
    """Sums up the time spent in `Controller.site`; of which there is none to tell on a device that runs behind."""

    def __enter__(self):
        self.total, self.original = 0.0, Controller.site

        def timed(*arguments):
            edited = []
            self.total += seconds(lambda: edited.append(self.original(*arguments)))
            return edited[0]

        Controller.site = timed
        return self

    def __exit__(self, *_):
        Controller.site = self.original


def in_turns(pipe, call: dict, budget: float, name: str) -> list[dict]:
    """Whole calls as ratios to plain ones; on a CPU also the time in the hooks alone."""
    one, four = attentions(pipe)[-1:], attentions(pipe)[-4:]
    hooks: dict[str, list[float]] = {}

    def contender(setting: str, prepare: Callable[[], None] = lambda: None) -> Callable[[], float]:
        def run() -> float:
            prepare()
            generator = torch.Generator().manual_seed(0)
            with HookTime() as hook:
                took = seconds(lambda: pipe(generator=generator, output_type="latent", **call))
            hooks.setdefault(setting, []).append(hook.total)
            pipe.unload_rtsae()
            return took

        return run

    settings = {
        "plain": lambda: None,
        "plain, again": lambda: None,
        "loaded, idle": lambda: steer(pipe, one, 0),
        "5 features, 1 site": lambda: steer(pipe, one, 5),
        "50 features, 1 site": lambda: steer(pipe, one, 50),
        "50 features, 4 sites": lambda: steer(pipe, four, 50),
    }
    taken = take_turns({s: contender(s, prepare) for s, prepare in settings.items()}, budget)
    found = rows(taken, f"{name}: ")
    if not CUDA:
        hooks = {setting: values[1:] for setting, values in hooks.items()}  # the first round warmed up
        for setting in settings:
            if "features" in setting:
                rest = [whole - hook for whole, hook in zip(taken[setting], hooks[setting], strict=True)]
                found.append(row(f"{name}: hooks, {setting}", hooks[setting], "the rest of the same calls", rest))
        few, many = (f"{count} features, 1 site" for count in (5, 50))
        found.append(row(f"{name}: hooks, {many}", hooks[many], f"hooks, {few}", hooks[few]))
    return found


def one_after_the_other(pipe, call: dict, name: str, repeats: int = 5) -> list[dict]:
    """For what new hooks make slow to start, as compiling does: each setting repeated, then the next."""
    settings = {"plain": ([], 0), "5 features, 1 site": (attentions(pipe)[-1:], 5),
                "50 features, 4 sites": (attentions(pipe)[-4:], 50), "plain, again": ([], 0)}  # fmt: skip
    taken = {}
    for setting, (sites, count) in settings.items():
        if sites:
            steer(pipe, sites, count)
        else:
            torch.compiler.reset()
        generate = lambda: pipe(generator=torch.Generator().manual_seed(0), output_type="latent", **call)  # noqa: E731
        generate()
        taken[setting] = [seconds(generate) for _ in range(repeats)]
        if sites:
            pipe.unload_rtsae()
    steps = call["num_inference_steps"]
    return [
        found
        | {
            "steps_per_second": steps / found["seconds"],
            "baseline_steps_per_second": steps / found["baseline_seconds"],
        }
        for found in rows(taken, f"{name}: ")
    ]


def measure(budget: float) -> list[dict]:
    found = []
    for name, make in (("bundled", bundled), ("Stable Diffusion 1.5", sd15)):
        pipe, call = make()
        pipe.set_progress_bar_config(disable=True)
        found += in_turns(pipe, call, budget / 2, name)
    if CUDA:
        found += one_after_the_other(pipe, call, f"{name}, eager")
        pipe.unet.compile()
        found += one_after_the_other(pipe, call, f"{name}, compiled")
        pipe, call = sd15()
        pipe.set_progress_bar_config(disable=True)
        pipe.enable_model_cpu_offload()
        found += one_after_the_other(pipe, call, f"{name}, model offload")
    return found
