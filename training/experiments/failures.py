"""Pictures of failures: labels that miss the goal in the table, on prompts where they fail.

    python -m training.experiments.failures --out training/results/failures.png

For each such label the first prompts of the table on which it did not give its value at strength 1, or changed another
factor: the picture without steering beside the one with it, and what the scorer reads wrongly.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from matplotlib.figure import Figure

from diffusers_rtsae import load_dictionary

from ..worlds.pictures import add_models, load_models, new_parser, parse
from .steering import run, score
from .table import LEAKAGE, SUCCESS


def wrong(plain: dict, steered: dict, factor: str, value: str) -> str:
    """What is wrong with a steered picture, as `World.seen` reads it; empty if nothing is."""
    found = [] if steered["valid"] else ["no valid scene"]
    found += [] if steered[factor] == value else [f"{factor} {steered[factor]}"]
    found += [f"{f} {plain[f]} → {steered[f]}" for f in plain if f not in (factor, "valid") and steered[f] != plain[f]]
    return "\n".join(found)


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "scorer", "dictionary")
    parser.add_argument("--table", type=Path, default=Path("training/results/judged.json"))
    parser.add_argument("--out", type=Path, default=Path("runs/failures.png"))
    parser.add_argument("--prompts", type=int, default=16, help="for each label, as many as in the table for a seed")
    parser.add_argument("--columns", type=int, default=5)
    a, world = parse(parser)
    pipe, scorer = load_models(a)
    pipe.load_rtsae(load_dictionary(a.dictionary))
    missed = [
        row
        for row in json.loads(a.table.read_text())["rows"]
        if (row["method"], row["strength"]) == ("feature", 1.0)
        and (row["success"] < SUCCESS or row["leakage"] > LEAKAGE)
    ]
    probes = [world.probe(row["factor"], row["label"], row["kind"], a.prompts, seed=100) for row in missed]
    plain = run(pipe, probes, None, a.steps, a.guidance, a.batch_size)
    strengths = [{row["label"]: 1.0} for row in missed]
    steered = run(pipe, probes, strengths, a.steps, a.guidance, a.batch_size, masks=False)
    readings = zip(score(world, scorer, plain, probes), score(world, scorer, steered, probes), strict=True)

    figure = Figure(figsize=(2.4 * a.columns, 1.5 * len(missed)), layout="constrained")
    axes = figure.subplots(len(missed), a.columns, squeeze=False)
    pairs = torch.cat([plain, torch.ones_like(plain[..., :4]), steered], dim=3).permute(0, 2, 3, 1).numpy()
    for i, (row, read) in enumerate(zip(missed, readings, strict=True)):
        flaws = [wrong(was, now, row["factor"], row["label"]) for was, now in zip(*read, strict=True)]
        shown = [j for j, text in enumerate(flaws) if text][: a.columns]
        for axis, j in zip(axes[i], shown, strict=False):
            axis.imshow(pairs[i * a.prompts + j])
            axis.set_title(flaws[j], fontsize=7)
        for axis in axes[i]:
            axis.set_axis_off()
        title = f"{row['label']}, {row['kind']}\nsuccess {row['success']:.2f}\nleakage {row['leakage']:.2f}"
        axes[i, 0].text(-0.05, 0.5, title, transform=axes[i, 0].transAxes, ha="right", va="center", fontsize=9)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(a.out, dpi=80)


if __name__ == "__main__":
    main()
