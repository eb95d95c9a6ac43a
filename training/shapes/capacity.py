"""Can this model be steered at all, and where? Difference-of-means directions at every site, judged by the scorer.

python -m training.shapes.capacity --pipeline examples/shapes-sd --out training/results/capacity.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from diffusers_rtsae import list_sites
from diffusers_rtsae.analysis.scorer import FactorScorer

from .evaluate import add_arguments, load_pipeline
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
    pipe, scorer = load_pipeline(a.pipeline, a.device), FactorScorer.from_pretrained(a.scorer).to(a.device)
    sets = a.sites or [site for site in list_sites(pipe.unet) if site.rpartition(".")[0].endswith("attentions")]
    sites = list(dict.fromkeys(site for group in sets for site in group.split("+")))
    pipe.load_rtsae(difference_of_means(pipe, sites, a.samples, a.steps, a.guidance, a.batch_size))
    rows = []
    for kind in a.kinds:
        probes = [probe(factor, value, kind, a.images, seed=0) for factor, value in TARGETS]
        plain = score(scorer, run(pipe, probes, None, a.steps, a.guidance, a.batch_size), probes)
        settings = [
            (group, strength, apply_to) for group in sets for strength in a.strengths for apply_to in a.apply_to
        ]
        for group, strength, apply_to in tqdm([(None, 0.0, ""), *settings], desc=kind, unit="setting"):
            if group is None:
                steered = plain
            else:
                strengths = [{(site, t): strength for site in group.split("+")} for t in range(len(TARGETS))]
                steered = score(
                    scorer, run(pipe, probes, strengths, a.steps, a.guidance, a.batch_size, apply_to=apply_to), probes
                )
            row = {"prompts": kind, "sites": group or "none", "strength": strength, "apply_to": apply_to}
            for factor in STEERED:
                cells = [
                    measure(s, p, factor, v)
                    for s, p, (f, v) in zip(steered, plain, TARGETS, strict=True)
                    if f == factor
                ]
                row[factor] = {name: round(sum(c[name] for c in cells) / len(cells), 4) for name in cells[0]}
            rows.append(row)
            print(
                kind,
                group,
                strength,
                apply_to,
                *(f"{f} {row[f]['success']:.2f}/{row[f]['leakage']:.2f}" for f in STEERED),
                flush=True,
            )
            a.out.parent.mkdir(parents=True, exist_ok=True)
            a.out.write_text(
                json.dumps({"settings": {k: str(v) for k, v in vars(a).items()}, "rows": rows}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
