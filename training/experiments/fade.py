"""Does a picture move gradually between the strengths 0 and 1?

    python -m training.experiments.fade --out training/results/fade.json

The labels of one factor, on prompts that name another value, at nine strengths: with the option `fade`, and without.
The *place* of a picture is how far the mean colour where its object is has come on the straight way from that at
strength 0 to that at 1; its *jump*, the largest change of place between two strengths: an eighth were perfectly even,
1 all at once. Rows are added to the JSON as they are measured; the same command continues where it was stopped.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from diffusers_rtsae import load_dictionary

from ..worlds.pictures import add_models, load_pipeline, new_parser, parse
from .results import Results, table
from .steering import run

STRENGTHS = tuple(i / 8 for i in range(9))
SHOWN = (0.25, 0.5, 0.75)


def places(colours: torch.Tensor) -> torch.Tensor:
    """Of colours `(strengths, prompts, 3)`, the place `(prompts, strengths)` of each between the first strength and
    the last."""
    moved = colours - colours[0]
    return ((moved * moved[-1]).sum(2) / moved[-1].square().sum(1).clamp(min=1e-9)).T


def markdown(rows: list[dict]) -> str:
    """Places and jumps by factor, with and without fading."""
    lines = []
    for factor in dict.fromkeys(row["factor"] for row in rows):
        for fades in (True, False):
            own = [row for row in rows if row["factor"] == factor and row["fades"] == fades]
            jumps = [jump for row in own for jump in row["jumps"]]
            even = sum(jump < 0.5 for jump in jumps) / len(jumps)
            means = [statistics.mean(row["places"][str(s)] for row in own) for s in SHOWN]
            cells = (f"{value:.2f}" for value in (*means, statistics.median(jumps), even))
            lines.append([f"{len({row['label'] for row in own})} {factor}", "yes" if fades else "no", *cells])
    heads = [*(f"place at {s:g}" for s in SHOWN), "median jump", "share of pictures that never jump half the way"]
    return table(["labels", "fades", *heads], lines)


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "dictionary")
    parser.add_argument("--out", type=Path, default=Path("runs/fade.json"))
    parser.add_argument("--prompts", type=int, default=4, help="for each label")
    parser.add_argument("--factor", default="colour")
    parser.add_argument("--fade", nargs=2, type=float, default=[0.14, 0.5])
    a, world = parse(parser)
    pipe = load_pipeline(a.pipeline, a.device, a.dtype)
    dictionary = load_dictionary(a.dictionary, dtype=torch.float32)
    pipe.load_rtsae(dictionary)
    results = Results(a, [a.pipeline, a.dictionary])
    own = {name: label for name, label in dictionary.labels.items() if label["factor"] == a.factor}
    for name, label in tqdm(own.items(), unit="label"):
        if results.has(label=name):
            continue
        probe = world.probe(a.factor, label["value"], "contradicted", a.prompts, seed=1200)
        where = world.masks(probe.scenes, world.image_size)[:, None]
        many, rows = [{name: strength} for strength in STRENGTHS], []
        for fades, options in ((True, {"fade": tuple(a.fade)}), (False, {})):
            images = run(
                pipe, [probe] * len(many), many, a.steps, a.guidance, a.batch_size, masks=False, **options
            ).unflatten(0, (len(many), -1))
            found = places((images * where).sum((3, 4)) / where.sum((2, 3)))
            row = {"label": name, "factor": a.factor, "fades": fades}
            row["places"] = {str(s): round(float(found[:, STRENGTHS.index(s)].mean()), 4) for s in SHOWN}
            row["jumps"] = [round(jump, 4) for jump in found.diff(dim=1).abs().amax(1).tolist()]
            rows.append(row)
        results.add(*rows)
    results.tell(markdown(results.rows))


if __name__ == "__main__":
    main()
