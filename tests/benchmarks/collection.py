"""What keeping trajectories costs: the same pictures generated plainly and collected from."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch

from tests.simulated_device import NAME, simulated
from training.collect import trajectories
from training.recipe import load_recipe
from training.store import TrajectoryStore
from training.train import load_pipeline

from .timing import DEVICE, per_step, rows, seconds, take_turns

ROOT = Path(__file__).parents[2]


def measure(budget: float) -> list[dict]:
    changes = [f"pipeline={ROOT / 'examples' / 'shapes-sd'}", "collect.count=8", "collect.batch_size=8"]
    recipe = load_recipe(ROOT / "training" / "recipes" / "shapes.yaml", changes)
    pipe, samples, anchors = load_pipeline(recipe, DEVICE)
    call = {"num_inference_steps": recipe.collect.steps, "guidance_scale": recipe.collect.guidance_scale}

    def plain() -> None:
        generators = [torch.Generator().manual_seed(sample.seed) for sample in samples]
        pipe([sample.prompt for sample in samples], generator=generators, output_type="latent", **call)

    def collected() -> None:
        with tempfile.TemporaryDirectory() as folder:
            tensors, _ = trajectories(pipe, samples, 0, recipe, anchors)
            TrajectoryStore(Path(folder), recipe.collected).write(0, tensors, None)

    works = {"pictures": plain, "pictures, again": plain, "pictures, collected from": collected}
    found = rows(take_turns({name: partial(seconds, work) for name, work in works.items()}, budget))
    with simulated() as device:
        pipe.to(NAME)
        counts = []
        for _ in range(2):  # batches
            device.reset()
            trajectories(pipe, samples, 0, recipe, anchors)
            counts.append(device.own)
    found[-1] |= {what: count / recipe.collect.steps for what, count in per_step(counts).items()}
    return found
