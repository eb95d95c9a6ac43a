"""
What finding and fitting features cost, as ratios to another checkout of this repository, both measured here and now.

    git worktree add /tmp/old 67d5303 && python -m tests.benchmarks.fitting --baseline /tmp/old

Processor seconds of a find and of a fit on the bundled pipeline, and the rise of the peak resident memory over drawing
the same pairs without fitting: on that pipeline, and for a stand-in of a denoiser with the geometry of published ones.
How often the package waits for a device and copies, a call of the denoiser, is counted by the simulated device of the
tests. Results go to tests/benchmarks/fitting.json and .md; rows of parts that are not measured stay.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from diffusers_rtsae.files import write_json

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_suffix(".json")
GEOMETRIES = {"bundled": None, "SDXL": (1024, 1280), "Flux": (4096, 3072)}  # tokens, width
COLOURS, SHAPES = ("blue", "green", "yellow", "black"), ("star", "heart", "circle", "square")


def some_pairs(count: int) -> list[tuple[str, str]]:
    """Prompts that name a colour, and the same in red."""
    where = ("", " on the left", " on the right")
    made = [(f"a {c} {s}{w}", f"a red {s}{w}") for w in where for s in SHAPES for c in COLOURS]
    return made[:count]


def small_pipeline(tokens: int, width: int):
    """The bundled pipeline with a denoiser that does next to nothing, at a site of so many tokens and channels, and a
    dictionary of it."""
    import torch
    from diffusers import ConfigMixin, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
    from torch import nn

    from diffusers_rtsae import RTSAE, Dictionary

    side = int(tokens**0.5)

    class Site(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states * 1.01

    class StandIn(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, text: int, sample_size: int = side, in_channels: int = 4, time_cond_proj_dim=None):
            super().__init__()
            self.into, self.out = nn.Linear(4, width), nn.Linear(width, 4)
            self.prompt, self.blocks = nn.Linear(text, width), nn.ModuleList([Site()])

        def forward(self, sample, timestep, encoder_hidden_states, return_dict=True, **_):
            tokens = self.into(sample.flatten(2).mT)
            hidden = self.blocks[0](tokens + self.prompt(encoder_hidden_states.mean(1))[:, None])
            output = self.out(hidden).mT.unflatten(2, sample.shape[2:])
            return UNet2DConditionOutput(output) if return_dict else (output,)

    pipe = bundled()
    torch.manual_seed(0)
    pipe.unet = StandIn(pipe.text_encoder.config.hidden_size).requires_grad_(True)
    sae = RTSAE("blocks.0", width, [961, 481, 1], num_latents=2048, k=16).requires_grad_(False)
    sae.threshold.fill_(4.0)
    sae.density.fill_(0.01)
    return pipe, Dictionary({"blocks.0": sae})


def bundled():
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    import diffusers_rtsae  # noqa: F401 - gives pipelines their methods

    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "examples/shapes-sd")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def one(work: str, geometry: str, count: int, steps: int, batch: int) -> None:
    """Do it in this process, and print processor seconds and the peak resident memory in MiB."""
    import torch

    from diffusers_rtsae import load_dictionary
    from diffusers_rtsae.analysis.find import find_features
    from diffusers_rtsae.analysis.fit import fit_feature

    if GEOMETRIES[geometry] is None:
        pipe, dictionary = bundled(), load_dictionary(ROOT / "examples/shapes-rtsae", dtype=torch.float32)
    else:
        pipe, dictionary = small_pipeline(*GEOMETRIES[geometry])
    pipe.load_rtsae(dictionary)
    pairs, call = some_pairs(count), {"num_inference_steps": steps, "guidance_scale": 3.0}
    begun = time.process_time()
    if work == "draw":
        for start in range(0, len(pairs), max(1, batch // 2)):
            prompts = [prompt for pair in pairs[start : start + max(1, batch // 2)] for prompt in pair]
            pipe(prompts, output_type="latent", **call)
    elif work == "find":
        find_features(pipe, [to for _, to in pairs], [start for start, _ in pairs], batch_size=batch, **call)
    else:
        rank = 8 if work == "map" else None
        fit_feature(pipe, pairs, 8, rank=rank, batch_size=batch, progress=False, **call)
    taken = time.process_time() - begun
    print(taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def counted(work: str) -> tuple[float, float]:
    """How often the package waits for the device and copies in a find or a fit, a call of the denoiser."""
    from diffusers_rtsae import load_dictionary
    from diffusers_rtsae.analysis.find import find_features
    from diffusers_rtsae.analysis.fit import fit_feature
    from tests.simulated_device import NAME, simulated

    pipe, pairs, call = bundled(), some_pairs(2), {"num_inference_steps": 4, "guidance_scale": 3.0}
    calls = []
    with simulated() as device:
        pipe.to(NAME)
        pipe.load_rtsae(load_dictionary(ROOT / "examples/shapes-rtsae"))
        pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
        device.reset()
        if work == "find":
            find_features(pipe, [to for _, to in pairs], [start for start, _ in pairs], 2, **call)
        else:
            fit_feature(pipe, pairs, 2, rank=8 if work == "map" else None, progress=False, **call)
        counts = device.own
    waits = counts["wait"]
    return waits / len(calls), (sum(counts.values()) - waits) / len(calls)


def measured(checkout: Path, *what) -> tuple[float, float]:
    """Processor seconds and peak memory of `one` in a process of its own, with the package of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one", *map(str, what)]
    done = subprocess.run(command, env=environment, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), float(peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="another checkout, e.g. of an earlier commit")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="*", default=["time", "counts", *GEOMETRIES], help="what to measure")
    a = parser.parse_args()
    if a.one:
        one(a.one[0], a.one[1], *map(int, a.one[2:]))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    checkouts = {"now": ROOT} | ({"before": a.baseline.resolve()} if a.baseline else {})
    for work, count in (("find", 3), ("map", 24)) if "time" in a.only else ():
        seconds = {name: measured(folder, work, "bundled", count, 25, 16)[0] for name, folder in checkouts.items()}
        tell(results, f"{work}, {count} pairs, 25 steps", seconds, "CPU seconds")
    for work in ("find", "map", "latents") if "counts" in a.only else ():
        waits, copies = counted(work)
        what = f"{work}, 2 pairs, 4 steps, simulated device"
        tell(results, what, {"waits": waits, "copies": copies}, "a call of the denoiser")
    for geometry, (count, steps, batch) in {"bundled": (32, 25, 16), "SDXL": (8, 8, 8), "Flux": (4, 4, 4)}.items():
        for work in ("map", "latents") if geometry in a.only else ():
            of = checkouts if geometry == "bundled" else {"now": ROOT}  # the other may not fit
            rises = {}
            for name, folder in of.items():
                plain, own = (measured(folder, one, geometry, count, steps, batch)[1] for one in ("draw", work))
                rises[name] = own - plain
            what = f"{work}, {geometry}, {count} pairs, {steps} steps, {batch} at once"
            tell(results, what, rises, "MiB over drawing")


def tell(results: dict[str, dict], what: str, values: dict[str, float], unit: str) -> None:
    """Print a result, and write all of them."""
    results[what] = {name: round(value, 3) for name, value in values.items()} | {"unit": unit}
    write_json(RESULTS, results)
    lines = ["| what | now | the baseline | ratio | |", "| --- | --- | --- | --- | --- |"]
    for name, one in results.items():
        if "waits" in one:
            cells = [f"{one['waits']:.2f} waits, {one['copies']:.2f} copies", "", ""]
        else:
            before = one.get("before")
            cells = [
                f"{one['now']:,.1f}",
                *(["", ""] if before is None else [f"{before:,.1f}", f"{one['now'] / before:.2f}"]),
            ]
        lines.append(f"| {' | '.join([name, *cells, one['unit']])} |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print(lines[2 + list(results).index(what)], flush=True)


if __name__ == "__main__":
    main()
