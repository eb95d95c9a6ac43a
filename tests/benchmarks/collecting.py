"""What keeping trajectories costs: the same pictures generated plainly and collected from, alternating, as ratios.

    OMP_NUM_THREADS=1 python tests/benchmarks/collecting.py

Prints the median of the ratios to the plain run of the same round and their quartiles; on a CPU the time is that of
the processor.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the trainer is part of the clone

from training.collect import trajectories  # noqa: E402
from training.recipe import load_recipe  # noqa: E402
from training.store import TrajectoryStore  # noqa: E402
from training.train import load_pipeline  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    changes = [f"pipeline={ROOT / 'examples' / 'shapes-sd'}", "collect.count=16", "collect.batch_size=16"]
    recipe = load_recipe(ROOT / "training" / "recipes" / "shapes.yaml", changes)
    pipe, samples, anchors = load_pipeline(recipe, torch.device(a.device))
    clock = time.process_time if a.device == "cpu" else time.perf_counter
    call = {"num_inference_steps": recipe.collect.steps, "guidance_scale": recipe.collect.guidance_scale}

    def plain() -> None:
        generators = [torch.Generator().manual_seed(sample.seed) for sample in samples]
        pipe([sample.prompt for sample in samples], generator=generators, output_type="latent", **call)

    def collected() -> None:
        with tempfile.TemporaryDirectory() as folder:
            tensors, _ = trajectories(pipe, samples, 0, recipe, anchors)
            TrajectoryStore(Path(folder), recipe.collected).write(0, tensors, None)

    times: dict[str, list[float]] = {"plain": [], "plain, again": [], "collected": []}
    for round_ in range(a.rounds + 1):  # the first warms up
        for name, generate in zip(times, (plain, plain, collected), strict=True):
            started = clock()
            generate()
            if a.device != "cpu":
                torch.cuda.synchronize()
            if round_:
                times[name].append(clock() - started)
    for name in ("plain, again", "collected"):
        ratios = [value / reference for value, reference in zip(times[name], times["plain"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        print(f"{name:16} {median:6.3f}   quartiles {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
