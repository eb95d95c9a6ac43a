"""Can this model be steered at all, and where? Difference-of-means directions at every site, judged by the scorer.

    python -m training.shapes.capacity --pipeline examples/shapes-sd --out training/results/capacity.json

Rows are added to the JSON as they are measured; the same command, with more sites or strengths too, adds what is
missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from diffusers_rtsae import list_sites
from diffusers_rtsae.analysis.scorer import FactorScorer
from diffusers_rtsae.hub import write_json

from .evaluate import add_arguments, contents, load_pipeline, stored_rows
from .steering import STEERED, TARGETS, difference_of_means, measure, probe, run, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/capacity.json"))
    parser.add_argument(
        "--sites", nargs="*", help="sites, or sets of sites joined by +; every attention block by default"
    )
    parser.add_argument("--strengths", nargs="*", type=float, default=[1.0, 2.0, 4.0])
    parser.add_argument("--apply-to", nargs="*", default=["cond", "contrast"])
    parser.add_argument("--kinds", nargs="*", default=["open", "contradicted"])
    parser.add_argument("--images", type=int, default=16, help="prompts for each target value")
    parser.add_argument("--samples", type=int, default=512, help="pictures behind the means")
    a = parser.parse_args()
    pipe, scorer = load_pipeline(a.pipeline, a.device, a.dtype), FactorScorer.from_pretrained(a.scorer).to(a.device)
    sets = a.sites or [site for site in list_sites(pipe.unet) if site.rpartition(".")[0].endswith("attentions")]
    sites = list(dict.fromkeys(site for group in sets for site in group.split("+")))
    pipe.load_rtsae(difference_of_means(pipe, sites, a.samples, a.steps, a.guidance, a.batch_size))
    asked = ("out", "device", "batch_size", "sites", "strengths", "apply_to", "kinds")  # what rows say themselves
    settings = {k: str(v) for k, v in vars(a).items() if k not in asked}
    settings["contents"] = contents(a.pipeline)
    rows = stored_rows(a.out, settings)
    trials = [("none", 0.0, "")]
    trials += [(group, strength, apply_to) for group in sets for strength in a.strengths for apply_to in a.apply_to]
    for kind in a.kinds:
        probes = [probe(factor, value, kind, a.images, seed=0) for factor, value in TARGETS]
        plain = score(scorer, run(pipe, probes, None, a.steps, a.guidance, a.batch_size), probes)
        for group, strength, apply_to in tqdm(trials, desc=kind, unit="setting"):
            row = {"prompts": kind, "sites": group, "strength": strength, "apply_to": apply_to}
            if any(row.items() <= done.items() for done in rows):
                continue
            steered = plain
            if group != "none":
                strengths = [{(site, t): strength for site in group.split("+")} for t in range(len(TARGETS))]
                images = run(pipe, probes, strengths, a.steps, a.guidance, a.batch_size, apply_to=apply_to, clip=False)
                steered = score(scorer, images, probes)
            for factor in STEERED:
                cells = [
                    measure(s, p, factor, v)
                    for s, p, (f, v) in zip(steered, plain, TARGETS, strict=True)
                    if f == factor
                ]
                row[factor] = {name: round(sum(c[name] for c in cells) / len(cells), 4) for name in cells[0]}
            rows.append(row)
            found = [f"{f} {row[f]['success']:.2f}/{row[f]['leakage_mean']:.2f}" for f in STEERED]
            print(kind, group, strength, apply_to, *found, flush=True)
            a.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(a.out, {"settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
