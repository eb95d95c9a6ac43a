"""What the plugin costs: generations with and without it, alternating in one run, as ratios of medians.

python tests/benchmarks/overhead.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

import diffusers_rtsae  # noqa: F401 - gives pipelines their methods
from diffusers_rtsae.pipeline import get_dictionary

EXAMPLES = Path(__file__).parents[2] / "examples"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    pipe = StableDiffusionPipeline.from_pretrained(EXAMPLES / "shapes-sd")
    pipe.set_progress_bar_config(disable=True)

    def generate() -> float:
        generator = torch.Generator().manual_seed(0)
        started = time.perf_counter()
        pipe(
            ["a star"] * arguments.batch,
            num_inference_steps=arguments.steps,
            generator=generator,
            output_type="latent",
        )
        return time.perf_counter() - started

    def loaded(features: dict | None, **options):
        def prepare():
            pipe.load_rtsae(EXAMPLES / "shapes-rtsae")
            site = next(iter(get_dictionary(pipe).sites))
            if features is not None:
                pipe.set_rtsae_features({(site, index): value for index, value in features.items()}, **options)

        return prepare

    settings = {
        "plain": lambda: None,
        "plain again": lambda: None,
        "loaded, idle": loaded(None),
        "add 1 feature": loaded({0: 1.0}),
        "add 5 features": loaded(dict.fromkeys(range(5), 1.0)),
        "ablate 5 features (encodes)": loaded(dict.fromkeys(range(5), 0.0), operation="scale"),
    }
    times: dict[str, list[float]] = {name: [] for name in settings}
    for round_ in range(arguments.rounds + 1):  # the first round warms up
        for name, prepare in settings.items():
            prepare()
            seconds = generate()
            pipe.unload_rtsae()
            if round_:
                times[name].append(seconds)
    base = statistics.median(times["plain"])
    for name, values in times.items():
        ratios = sorted(value / reference for value, reference in zip(values, times["plain"], strict=True))
        print(f"{name:30} {statistics.median(values) / base:6.3f}   paired {ratios[0]:.3f} to {ratios[-1]:.3f}")


if __name__ == "__main__":
    main()
