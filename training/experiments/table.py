"""The honest table: every labelled feature of a world's dictionary against its baselines, judged by the scorer.

    python -m training.experiments.table --out training/results/steering.json

Rows are added to the JSON as they are measured; the same command continues where it was stopped, and measures again
what another dictionary changes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from diffusers_rtsae import RTSAE, Dictionary, load_dictionary
from diffusers_rtsae.analysis.scorer import FactorScorer

from ..worlds import KINDS, Probe, World
from ..worlds.pictures import add_models, load_models, new_parser, parse
from .results import Results, best, contents, figures, table
from .steering import as_dictionary, difference_of_means, mean, measure, run, score

METHODS = {  # and the strengths at which each is measured
    "plain": (0.0,),
    "feature": (1.0, 2.0, 0.5, -1.0),
    "means": (1.0, 2.0, 0.5),
    "means with options": (1.0, 2.0, 0.5),
    "random": (1.0,),
    "prompt": (0.0,),
}
OF_DICTIONARY = ("feature", "means with options", "random")  # methods that another dictionary changes


def with_labels(sites: dict[str, RTSAE], labels: dict[str, dict], rows: list[int]) -> Dictionary:
    """Directions under the names and with the options of `labels`; `rows` says which one stands for which label."""
    named = {}
    for row, (name, label) in zip(rows, labels.items(), strict=True):
        at = dict.fromkeys(entry["site"] for entry in label["features"])
        entries = [{"site": site, "latents": [row], "weights": [1.0]} for site in at]
        named[name] = {"factor": label["factor"], "edit": label.get("edit", {}), "features": entries}
    return Dictionary(sites, named)


def random_directions(dictionary: Dictionary, seed: int = 0) -> Dictionary:
    """For each label a random direction with, at each anchor, the norm its feature has there at strength 1."""
    generator, sites = torch.Generator().manual_seed(seed), {}
    for site, rtsae in dictionary.sites.items():
        rows = []
        for name in dictionary.labels:
            norm = dictionary.trajectory(name).norm(dim=1)
            direction = torch.randn(rtsae.config.in_channels, generator=generator)
            rows.append(norm[:, None] * direction / direction.norm())
        sites[site] = as_dictionary(site, list(rtsae.config.anchors), torch.stack(rows))
    return with_labels(sites, dictionary.labels, list(range(len(dictionary.labels))))


def markdown(rows: list[dict]) -> str:
    """The table as Markdown: one line a label, success / leakage / valid on open and contradicted prompts."""
    cells = {(r["label"], r["kind"], r["method"], r["strength"]): r for r in rows}
    labels = list(dict.fromkeys(r["label"] for r in rows))

    def cell(label: str, kind: str, method: str) -> str:
        found = [r for key, r in cells.items() if key[:3] == (label, kind, method)]
        if not found:
            return "–"
        shown = best(found)
        return figures(shown) + (f" @{shown['strength']:g}" if len(METHODS[method]) > 1 else "")

    methods = {
        "plain": "no edit",
        "feature": "feature",
        "means": "difference of means",
        "means with options": "the same with the feature's options",
        "random": "random",
        "prompt": "edited prompt",
    }
    text = []
    for kind in KINDS:
        if not any(r["kind"] == kind for r in rows):
            continue
        text += [f"**{kind} prompts** (success / leakage / valid, at the best strength)", ""]
        lines = [[label, *(cell(label, kind, m) for m in methods)] for label in labels]
        text.append(table(["feature", *methods.values()], lines))
    return "\n".join(text)


Pictures = tuple[torch.Tensor, list[list[dict]]]  # images (n, 3, height, width), and their readings by seed


def pictures(
    world: World,
    pipe: DiffusionPipeline,
    scorer: FactorScorer,
    groups: dict[str, list[Probe]],
    method: str,
    strength: float,
    a: argparse.Namespace,
) -> dict[str, Pictures]:
    """What a method makes of the prompts of each label."""
    probes = [one for group in groups.values() for one in group]
    if not probes:
        return {}
    prompts = strengths = None
    options = {}
    if method == "prompt":
        prompts = [one.prompted for one in probes]
    elif method != "plain":
        strengths = [{name: strength} for name, group in groups.items() for _ in group]
        # directions that are no features have no range to be kept in, and do not find the object themselves
        options = {"adapter_name": method, "clip": method == "feature", "masks": method != "feature"}
    images = run(pipe, probes, strengths, a.steps, a.guidance, a.batch_size, prompts, **options)
    readings = iter(score(world, scorer, images, probes))
    parts = iter(images.split([sum(len(one.prompts) for one in group) for group in groups.values()]))
    return {name: (next(parts), [next(readings) for _ in group]) for name, group in groups.items()}


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "scorer", "dictionary")
    parser.add_argument("--out", type=Path, default=Path("runs/steering.json"))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--strengths", nargs="*", type=float, help="of those at which a method is measured; all")
    parser.add_argument("--samples", type=int, default=512, help="pictures behind the difference of means")
    a, world = parse(parser)
    pipe, scorer = load_models(a)
    dictionary = load_dictionary(a.dictionary, dtype=torch.float32)
    labels, digest = dictionary.labels, contents(a.dictionary)
    results = Results(a, [a.pipeline], said_by_rows=("dictionary", "kinds", "methods", "strengths"))
    results.rows = [r for r in results.rows if r.get("dictionary", digest) == digest]
    pipe.load_rtsae(dictionary, "feature")
    pipe.load_rtsae(random_directions(dictionary), "random")
    if {"means", "means with options"} & set(a.methods):
        means = difference_of_means(world, pipe, list(dictionary.sites), a.samples, a.steps, a.guidance, a.batch_size)
        rows_of_means = [world.targets.index((label["factor"], label["value"])) for label in labels.values()]
        optioned = with_labels(means.sites, labels, rows_of_means)
        plainly = {name: label | {"edit": {}} for name, label in optioned.labels.items()}
        pipe.load_rtsae(Dictionary(means.sites, plainly), "means")
        pipe.load_rtsae(optioned, "means with options")

    for kind in a.kinds:
        groups = {  # for each label the prompts of each seed
            name: [world.probe(label["factor"], label["value"], kind, a.prompts, seed=100 + s) for s in a.seeds]
            for name, label in labels.items()
        }
        plain: dict[str, Pictures] = {}
        trials = [(m, s) for m in a.methods for s in METHODS[m] if not a.strengths or s in (0.0, *a.strengths)]
        for method, strength in tqdm(trials, desc=kind, unit="setting"):
            setting = {"kind": kind, "method": method, "strength": strength}
            missing = {name: group for name, group in groups.items() if not results.has(label=name, **setting)}
            if not missing:
                continue
            new = {name: group for name, group in missing.items() if name not in plain}
            plain |= pictures(world, pipe, scorer, new, "plain", 0.0, a)
            made = plain if method == "plain" else pictures(world, pipe, scorer, missing, method, strength, a)
            rows = []
            for name in missing:
                (images, readings), (before, was), label = made[name], plain[name], labels[name]
                cells = [measure(r, p, label["factor"], label["value"]) for r, p in zip(readings, was, strict=True)]
                row = {"label": name, "factor": label["factor"]} | setting
                row |= {"dictionary": digest} if method in OF_DICTIONARY else {}
                row |= mean(cells)
                row |= {"success_per_seed": [round(c["success"], 4) for c in cells], "n": len(images)}
                row["image_distance"] = round((images - before).square().mean((1, 2, 3)).sqrt().mean().item(), 4)
                rows.append(row)
            results.add(*rows)
    print(markdown([r for r in results.rows if r["label"] in labels]))


if __name__ == "__main__":
    main()
