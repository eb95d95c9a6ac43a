"""A report of dictionaries, measured on pictures that their pipeline generates for it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_rtsae import SparseDictionary, load_dictionary
from diffusers_rtsae.files import write_json
from diffusers_rtsae.models import is_of_steps

from ..data.collect import anchor_timesteps, trajectories
from ..data.prompts import read_samples
from ..data.sequences import read_folder
from ..recipe import Collect, Recipe, bundled
from .reconstruction import evaluate, timing
from .replacement import recovered


def report(results: dict[str, dict], folder: Path) -> None:
    """Write the figures of several dictionaries or sites, by name, to `report.json`, `report.md` and `report.png`."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", results)
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    titles = ("FVU, teacher-forced", "FVU, rolled out", "noise prediction recovered, rolled out")
    keys = ("fvu_teacher_forced_per_anchor", "fvu_online_per_anchor", "recovered_online_per_anchor")
    for axis, title, key in zip(axes, titles, keys, strict=True):
        for name, figures in results.items():
            if key in figures:
                axis.plot(range(len(figures[key])), figures[key], marker="o", label=name)
        axis.set_title(title, fontsize=9)
        axis.set(xlabel="anchor, in the order of time", ylim=(0, 1 if "recovered" in key else None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(folder / "report.png", dpi=120)
    plain = [key for key, value in next(iter(results.values())).items() if not isinstance(value, list | dict)]
    lines = ["| | " + " | ".join(results) + " |", "| --- |" + " --- |" * len(results)]
    lines += [
        f"| {key} | " + " | ".join(str(figures.get(key, "–")) for figures in results.values()) + " |" for key in plain
    ]
    (folder / "report.md").write_text("\n".join(["# Dictionaries", "", *lines, "", "![Per anchor](report.png)", ""]))


@torch.no_grad()
def evaluate_pipeline(pipe: DiffusionPipeline, sae: SparseDictionary, collect: Collect, seed: int = 1) -> dict:
    """All figures of one dictionary, on pictures that the pipeline generates from the prompts of `collect`."""
    anchors = anchor_timesteps(pipe, collect, list(sae.config.anchors))
    train = {"num_latents": 1, "k": 1, "steps": 1, "batch_size": 1, "learning_rate": 1.0}
    recipe = Recipe(
        pipeline="", base_model="", seed=seed, sites=[sae.config.site], anchors=anchors,
        activation=sae.config.activation, collect=collect, train=train,
    )  # fmt: skip
    samples, rows, shares = read_samples(collect, seed), [], []
    for start in range(0, len(samples), collect.batch_size):
        part = samples[start : start + collect.batch_size]
        rows.append(trajectories(pipe, part, start, recipe, anchors)[0][sae.config.site])
        if len(shares) * collect.batch_size < 32:  # 32 pictures are enough: each takes three more calls an anchor
            generators = [torch.Generator().manual_seed(sample.seed) for sample in part]
            prompts = [sample.prompt for sample in part]
            call = {"num_inference_steps": collect.steps, "guidance_scale": collect.guidance(start)}
            shares.append(recovered(pipe, sae, prompts, generators, **call))
    figures = evaluate(sae, torch.cat(rows).float(), sae.config.k)
    for key in shares[0]:
        values = torch.tensor([share[key] for share in shares])
        figures[key] = (
            [round(v, 4) for v in values.mean(0).tolist()] if values.ndim > 1 else round(values.mean().item(), 4)
        )
    return figures | timing(sae)


def _opened(dictionaries: Sequence[str]) -> Iterator[tuple[str, SparseDictionary]]:
    """The dictionary of each site with its name in a report."""
    for source in dictionaries:
        for site, sae in load_dictionary(bundled(source), dtype=torch.float32).sites.items():
            yield site if len(dictionaries) == 1 else f"{Path(source).name} {site}", sae


def evaluate_sequences(dictionaries: Sequence[str], folder: str, out: Path, device: str | None = None) -> None:
    """Write a report of several dictionaries of a process that is no denoising, on a folder of its trajectories."""
    results = {}
    for name, sae in _opened(dictionaries):
        site, steps, width = sae.config.site, len(sae.config.anchors), sae.config.in_channels
        sequences = read_folder(folder, [site])
        rows = torch.cat([part.flatten(0, -3).float() for part in sequences.parts[site]])
        if rows.shape[1:] != (steps, width) or not is_of_steps(sae.config.anchors):
            raise ValueError(
                f"Expected a dictionary of {rows.shape[1]} steps of width {rows.shape[2]}, as in {folder}, got {name} "
                f"with the anchors {list(sae.config.anchors)} and width {width}."
            )
        sae.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        results[name] = evaluate(sae, rows, sae.config.k) | timing(sae)
        print(name, json.dumps(results[name]), flush=True)
    report(results, out)


def evaluate_all(
    dictionaries: Sequence[str], pipeline: str, collect: Collect, seed: int, out: Path, device: str | None = None
) -> None:
    """Write a report of several dictionaries of one pipeline, on pictures from the prompts of `collect`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = DiffusionPipeline.from_pretrained(bundled(pipeline)).to(device)
    pipe.set_progress_bar_config(disable=True)
    results = {}
    for name, sae in _opened(dictionaries):
        results[name] = evaluate_pipeline(pipe, sae, collect, seed)
        print(name, json.dumps(results[name]), flush=True)
    report(results, out)
