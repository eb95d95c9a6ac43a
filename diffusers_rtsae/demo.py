"""The quickstart: steer the bundled pipeline with one feature of each kind, draw what happens, and measure it."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from .analysis.plots import plot_feature_trajectories, plot_heat_maps, plot_strengths
from .analysis.record import record
from .analysis.scorer import FactorScorer, shows
from .files import whole, write_json
from .pipeline import get_dictionary

# prompts that say everything but the factor that is steered
SCENES = {
    "colour": [
        "a large heart on the left, flat, on a gray background",
        "a small star at the top, striped, on white",
    ],
    "shape": [
        "a large blue object in the centre, flat, on a white background",
        "a large pink thing on the right, dotted, on navy",
    ],
    "background": ["a large red star in the centre, flat", "a small cyan heart on the right, dotted"],
    "style": [
        "a large green circle in the centre, on a white background",
        "a large orange star at the bottom, on black",
    ],
}


def demonstrate(
    pipe: StableDiffusionPipeline, scorer: FactorScorer, out: Path, steps: int, prompts: int, console: Console
) -> None:
    """
    Write `steering.png`, `trajectories.png`, `heat_maps.png` and `measured.json`.

    Args:
        pipe (`StableDiffusionPipeline`): of the bundled world, with a dictionary loaded.
        scorer (`FactorScorer`): reads the factors back from its pictures.
        steps (`int`): of denoising.
        prompts (`int`): pictures each feature is measured on.

    Raises:
        `ValueError`: the dictionary has no labels.
    """
    started = time.monotonic()
    labels = get_dictionary(pipe).labels

    chosen: dict[str, str] = {}  # the first label of each kind
    for kind in ("colour", "shape", "background", "style"):
        known = [name for name, label in labels.items() if label.get("factor") == kind]
        if known:
            chosen[kind] = known[0]
    if not chosen:
        raise ValueError("The dictionary has no labels to steer with.")

    strengths, rows = [-1.0, 0.0, 0.5, 1.0, 2.0], []

    def generate(prompts: list[str], first_seed: int):
        seeds = [torch.Generator().manual_seed(first_seed + i) for i in range(len(prompts))]
        images = pipe(prompts, generator=seeds, num_inference_steps=steps, guidance_scale=3.0, output_type="pt").images
        return images.clamp(0, 1)

    table = Table(title="Steering with one feature, prompts that leave the factor open", title_justify="left")
    for name in ("feature", "latents", "without", "strength 1", "strength 2", "valid pictures"):
        table.add_column(name)
    results = {}
    for kind, label in track(chosen.items(), description="steering", console=console):
        for prompt in SCENES[kind]:
            seeds = [torch.Generator().manual_seed(0) for _ in strengths]
            with pipe.rtsae_steering({label: strengths}):
                images = pipe(
                    [prompt] * len(strengths), generator=seeds, num_inference_steps=steps, guidance_scale=3.0
                ).images
            rows.append((f"{kind}: {label}", prompt, images))
        many = (SCENES[kind] * prompts)[:prompts]
        readings = {0.0: scorer.read(generate(many, 100))}
        for strength in (1.0, 2.0):
            with pipe.rtsae_steering({label: strength}):
                readings[strength] = scorer.read(generate(many, 100))
        value = labels[label]["value"]
        hits = {s: sum(shows(r, kind, value) for r in read) / prompts for s, read in readings.items()}
        valid = sum(r["valid"] == "yes" for s in (1.0, 2.0) for r in readings[s]) / (2 * prompts)
        parts = labels[label]["features"]
        latents = len({row for part in parts for row in part["latents"]})
        moved = [str(latents)] * (latents > 0) + ["a map"] * any("map" in part for part in parts)
        table.add_row(
            escape(f"{kind}: {label}"), " and ".join(moved), *(f"{h:.0%}" for h in hits.values()), f"{valid:.0%}"
        )
        results[label] = {
            "factor": kind,
            "success": {str(s): h for s, h in hits.items()},
            "valid": valid,
            "pictures": prompts,
        }

    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "steering.png": plot_strengths(rows, strengths, "One feature each, by strength"),
        "trajectories.png": plot_feature_trajectories(get_dictionary(pipe), list(chosen.values())),
    }
    seen = {label: get_dictionary(pipe).seen(label)[0]["site"] for label in chosen.values()}
    traced = [label for label, site in seen.items() if site == next(iter(seen.values()))]
    prompt = "a large {} {} on the left, {}, on a {} background".format(
        *(
            chosen.get(k, d)
            for k, d in (("colour", "red"), ("shape", "star"), ("style", "flat"), ("background", "white"))
        )
    )
    recording = record(
        pipe, prompt, generator=torch.Generator().manual_seed(0), num_inference_steps=steps, guidance_scale=3.0
    )
    figures["heat_maps.png"] = plot_heat_maps(recording, traced)
    for name, figure in figures.items():
        with whole(out / name) as partial:
            figure.savefig(partial, format="png", dpi=130)
    write_json(out / "measured.json", results)
    console.print(table)
    told = f"{out}/steering.png, trajectories.png, heat_maps.png, measured.json in {time.monotonic() - started:.0f} s"
    console.print(told, markup=False, soft_wrap=True)
