"""The quickstart: steer a bundled pipeline with one feature of each kind, draw what happens, and measure it."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from .analysis.plots import plot_feature_trajectories, plot_heat_maps, plot_strengths
from .analysis.record import record
from .analysis.scorer import FactorScorer, shows
from .files import whole, write_json
from .pipeline import get_dictionary, own_size
from .worlds import World


def demonstrate(
    pipe: DiffusionPipeline,
    world: World,
    scorer: FactorScorer,
    out: Path,
    steps: int,
    prompts: int,
    console: Console,
) -> None:
    """
    Write `steering.png`, `trajectories.png`, `heat_maps.png` and `measured.json`.

    Args:
        pipe (`DiffusionPipeline`): of a bundled world, with a dictionary loaded.
        world (`World`): whose it is.
        scorer (`FactorScorer`): reads the factors back from its pictures.
        steps (`int`): of denoising.
        prompts (`int`): pictures each feature is measured on, of each kind of prompt.

    Raises:
        `ValueError`: the dictionary has no labels.
    """
    started = time.monotonic()
    labels = get_dictionary(pipe).labels

    chosen: dict[
        str, str
    ] = {}  # the first label of each factor of which two are known, to ask for one against another
    for kind in world.scenes:
        known = [name for name, label in labels.items() if label.get("factor") == kind]
        if len({labels[name]["value"] for name in known}) > 1:
            chosen[kind] = known[0]
    if not chosen:
        raise ValueError("The dictionary has no labels to steer with.")

    strengths, rows = [-1.0, 0.0, 0.5, 1.0, 2.0], []
    call = {"num_inference_steps": steps, "guidance_scale": 3.0} | own_size(pipe)

    def read(prompts: list[str]) -> list[dict]:
        seeds = [torch.Generator().manual_seed(100 + i) for i in range(len(prompts))]
        return scorer.read(pipe(prompts, generator=seeds, output_type="pt", **call).images.clamp(0, 1))

    table = Table(
        title="Steering with one feature at strength 1: share of pictures that show it", title_justify="left"
    )
    heads = ("feature", "latents", "left open", "steered", "prompt says another", "steered", "valid when steered")
    for name in heads:
        table.add_column(name)
    results = {}
    for kind, label in track(chosen.items(), description="steering", console=console):
        for prompt, _ in world.scenes[kind]:
            seeds = [torch.Generator().manual_seed(0) for _ in strengths]
            with pipe.rtsae_steering({label: strengths}):
                images = pipe([prompt] * len(strengths), generator=seeds, **call).images
            rows.append((f"{kind}: {label}", prompt, images))
        value = labels[label]["value"]
        other = next(own["value"] for own in labels.values() if own.get("factor") == kind and own["value"] != value)
        prompts_by_kind = {
            "open": [is_open for is_open, _ in world.scenes[kind]],
            "contradicted": [naming.format(other) for _, naming in world.scenes[kind]],
        }
        hits, valid = {}, []
        for which, few in prompts_by_kind.items():
            many = (few * prompts)[:prompts]
            plain = read(many)
            with pipe.rtsae_steering({label: 1.0}):
                steered = read(many)
            hits[which] = [sum(shows(r, kind, value) for r in readings) / prompts for readings in (plain, steered)]
            valid += [one["valid"] == "yes" for one in steered]
        parts = labels[label]["features"]
        latents = len({row for part in parts for row in part["latents"]})
        moved = [str(latents)] * (latents > 0) + ["a map"] * any("map" in part for part in parts)
        shares = [f"{share:.0%}" for both in hits.values() for share in both]
        table.add_row(escape(f"{kind}: {label}"), " and ".join(moved), *shares, f"{sum(valid) / len(valid):.0%}")
        results[label] = {
            "factor": kind,
            "success": {which: {"0.0": plain, "1.0": steered} for which, (plain, steered) in hits.items()},
            "valid": sum(valid) / len(valid),
            "pictures": prompts,
        }

    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "steering.png": plot_strengths(rows, strengths, "One feature each, by strength"),
        "trajectories.png": plot_feature_trajectories(get_dictionary(pipe), list(chosen.values())),
    }
    seen = {label: get_dictionary(pipe).seen(label)[0]["site"] for label in chosen.values()}
    traced = [label for label, site in seen.items() if site == next(iter(seen.values()))]
    recording = record(
        pipe,
        world.sentence.format(**world.usual | {kind: labels[label]["value"] for kind, label in chosen.items()}),
        generator=torch.Generator().manual_seed(0),
        **call,
    )
    figures["heat_maps.png"] = plot_heat_maps(recording, traced)
    for name, figure in figures.items():
        with whole(out / name) as partial:
            figure.savefig(partial, format="png", dpi=130)
    write_json(out / "measured.json", results)
    console.print(table)
    files = f"{out}/steering.png, trajectories.png, heat_maps.png, measured.json in {time.monotonic() - started:.0f} s"
    console.print(files, markup=False, soft_wrap=True)
