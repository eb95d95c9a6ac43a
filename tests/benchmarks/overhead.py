"""What steering costs: the same denoising with and without it; and how often a device would be waited for."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel

from diffusers_rtsae import RTSAE, Dictionary, list_sites
from diffusers_rtsae.denoiser import get_denoiser, get_site
from tests.simulated_device import NAME, simulated

from .timing import CUDA, DEVICE, per_step, row, rows, seconds, take_turns

EXAMPLES = Path(__file__).parents[2] / "examples"
ANCHORS = [961, 721, 481, 241, 1]


def bundled() -> tuple[StableDiffusionPipeline, dict]:
    pipe = StableDiffusionPipeline.from_pretrained(EXAMPLES / "shapes-sd").to(DEVICE)
    return pipe, {"prompt": ["a star"] * 8, "num_inference_steps": 6}


def sd15() -> tuple[StableDiffusionPipeline, dict]:
    """Random weights in the shapes of Stable Diffusion 1.5: two steps in float32 on a CPU, else twenty in float16."""
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
    call = {"prompt_embeds": text[0], "negative_prompt_embeds": text[1], "num_inference_steps": 20 if CUDA else 2}
    return pipe, call | {"height": 64, "width": 64}  # of the latents: this autoencoder does not scale


def people() -> tuple[DiffusionPipeline, dict]:
    pipe = DiffusionPipeline.from_pretrained(EXAMPLES / "people-dit").to(DEVICE)
    own = {"use_resolution_binning": False, "clean_caption": False}
    return pipe, own | {"prompt": ["a woman"] * 8, "num_inference_steps": 6}


def attentions(pipe) -> list[str]:
    return [site for site in list_sites(pipe.unet) if site.rpartition(".")[0].endswith("attentions")]


def steer(pipe, sites: list[str], count: int, rank: int = 0) -> None:
    """Random dictionaries, of which features are set, or a label with a map of some rank at each site; only rows in
    use cost anything, so 64 latents stand for any number."""
    widths = {site: get_site(pipe.unet, site).in_channels for site in sites}
    made = {site: RTSAE(site, width, ANCHORS, num_latents=64, k=8) for site, width in widths.items()}
    maps = {site: 0.01 * torch.randn(rank, len(ANCHORS), 2 * width + 1) for site, width in widths.items() if rank}
    part = {"latents": [], "weights": [], "bounds": [0.0, 1.0], "where": None}
    label = {"features": [part | {"site": site, "map": site} for site in maps]}
    pipe.load_rtsae(Dictionary(made, {"own": label} if rank else {}, maps=maps))
    pipe.set_rtsae_features({"own": 1.0} if rank else {(site, i): 0.01 for site in sites for i in range(count)})


def settings_of(pipe) -> dict[str, Callable[[], None]]:
    """By name, what is to be loaded and set in a pipeline that has nothing."""
    if hasattr(pipe, "transformer"):
        folder = EXAMPLES / "people-rtsae"
        return {
            "loaded, idle": lambda: pipe.load_rtsae(folder),
            "a label, 6 maps": lambda: pipe.load_rtsae(folder) or pipe.set_rtsae_features({"man": 1.0}),
        }
    found: dict[str, Callable[[], None]] = {"loaded, idle": lambda: steer(pipe, attentions(pipe)[-1:], 0)}
    for number in (1, 4):
        sites, where = attentions(pipe)[-number:], "1 site" if number == 1 else f"{number} sites"
        for count in (1, 5, 50):
            name = f"{count} {'features' if count > 1 else 'feature'}, {where}"
            found[name] = lambda sites=sites, count=count: steer(pipe, sites, count)
        found[f"maps of rank 8, {where}"] = lambda sites=sites: steer(pipe, sites, 0, 8)
    return found


class Costs:
    """Of each denoiser call inside the `with` block, the processor seconds of all of it, and of the hooks that the
    denoiser and its blocks have when the block begins: hooks before and after these read the clock."""

    def __init__(self, denoiser: torch.nn.Module):
        self.modules = [module for module in denoiser.modules() if module._forward_hooks and module is not denoiser]
        self.denoiser, self.calls, self._started = denoiser, [], 0.0

    def _begin(self, *_) -> None:
        self.calls.append([time.process_time(), 0.0])
        self._start()

    def _start(self, *_) -> None:
        self._started = time.process_time()

    def _stop(self, *_) -> None:
        self.calls[-1][1] += time.process_time() - self._started

    def _end(self, *_) -> None:
        self._stop()
        self.calls[-1][0] = time.process_time() - self.calls[-1][0]

    def __enter__(self):
        around = [(self.denoiser, self._begin, self._stop, self._start, self._end)]
        around += [(module, self._start, self._stop, self._start, self._stop) for module in self.modules]
        self._handles = []
        for module, before, after, then, last in around:
            self._handles += [
                module.register_forward_pre_hook(before, prepend=True), module.register_forward_pre_hook(after),
                module.register_forward_hook(then, prepend=True), module.register_forward_hook(last),
            ]  # fmt: skip
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()


def generate(pipe, call: dict) -> None:
    pipe(generator=torch.Generator().manual_seed(0), output_type="latent", **call)


def counted(make: Callable[[], tuple]) -> dict[str, dict[str, float]]:
    """For each setting, how often the package waits for the device and copies in a step."""
    pipe, call = make()
    pipe.set_progress_bar_config(disable=True)
    found, take = {}, pipe.scheduler.step
    with simulated() as device:
        pipe.to(NAME)
        for name, prepare in settings_of(pipe).items():
            prepare()
            counts = []

            def step(*args, counts=counts, **kwargs):
                counts.append(device.own)
                taken = take(*args, **kwargs)
                device.reset()
                return taken

            pipe.scheduler.step = step
            device.reset()
            generate(pipe, call | {"prompt": call["prompt"][:1]})
            pipe.unload_rtsae()
            found[name] = per_step(counts)
    return found


def in_turns(pipe, call: dict, budget: float, name: str, counts: dict[str, dict]) -> list[dict]:
    """
    Denoiser calls after the first of a generation, which loads what it needs of a dictionary. On a CPU what the hooks
    add, to the rest of the same call, which other programs disturb least; then whole calls beside plain ones.
    """
    settings = {"plain": lambda: None, "plain, again": lambda: None} | settings_of(pipe)
    hooks: dict[str, list[float]] = {setting: [] for setting in settings}
    rests: dict[str, list[float]] = {setting: [] for setting in settings}

    def contender(setting: str) -> Callable[[], float]:
        def run() -> float:
            settings[setting]()
            if CUDA:
                taken = seconds(lambda: generate(pipe, call))
                pipe.unload_rtsae()
                return taken
            with Costs(get_denoiser(pipe)) as costs:
                generate(pipe, call)
            pipe.unload_rtsae()
            hooks[setting] += [own for _, own in costs.calls[1:]]
            rests[setting] += [whole - own for whole, own in costs.calls[1:]]
            return statistics.median(whole for whole, _ in costs.calls[1:])

        return run

    taken = take_turns({setting: contender(setting) for setting in settings}, budget, warm_up=False)
    found = []
    for setting in [] if CUDA else settings_of(pipe):
        wholes = [own + rest for own, rest in zip(hooks[setting], rests[setting], strict=True)]
        one = row(f"{name}: {setting}", wholes, "the same calls without hooks", rests[setting])
        found.append(one | {"hooks_seconds": statistics.median(hooks[setting])} | counts[setting])
    return found + rows(taken, f"{name}: whole calls, ")


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
    found, counts = [], {make: counted(make) for make in (bundled, people)}
    for name, make, share in (("people", people, 0.1), ("bundled", bundled, 0.1), ("Stable Diffusion 1.5", sd15, 0.8)):
        pipe, call = make()
        pipe.set_progress_bar_config(disable=True)
        found += in_turns(pipe, call, share * budget, name, counts[people if make is people else bundled])
    if CUDA:
        found += one_after_the_other(pipe, call, f"{name}, eager")
        pipe.unet.compile()
        found += one_after_the_other(pipe, call, f"{name}, compiled")
        pipe, call = sd15()
        pipe.set_progress_bar_config(disable=True)
        pipe.enable_model_cpu_offload()
        found += one_after_the_other(pipe, call, f"{name}, model offload")
    return found
