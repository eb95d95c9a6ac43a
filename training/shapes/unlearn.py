"""Removing a concept by its features alone, in UnlearnCanvas' protocol on shapes x styles.

    python -m training.shapes.unlearn --out training/results/unlearn.json

For each labelled style and shape its latents are scaled while prompts name it. *Unlearned*: the share of pictures
that do not show it any more, though the prompt names it. *In-domain*: prompts that name another value of the same
factor still show that. *Cross-domain*: the other of the two factors is still right. *Valid*: of the pictures whose
concept was removed. Beside it the model without any edit. Rows are added to the JSON as they are measured; the same
command continues where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from diffusers_rtsae import Dictionary, load_dictionary
from diffusers_rtsae.analysis.scorer import FactorScorer
from diffusers_rtsae.hub import write_json

from .evaluate import add_arguments, contents, load_pipeline, stored_rows
from .scenes import FACTORS
from .steering import Probe, code, probe, prompted, run, score

DOMAINS = {"style": "shape", "shape": "style"}


def right(readings: list[dict], one: Probe, factor: str) -> float:
    """Share of pictures that show the value of `factor` that a probe's scenes have."""
    wanted = [FACTORS[factor][i] for i in code(one.scenes, factor)]
    return sum(r[factor] == w for r, w in zip(readings, wanted, strict=True)) / len(wanted)


def markdown(rows: list[dict]) -> str:
    """Means over the concepts of each factor, by scale."""
    names = ("unlearned", "in_domain", "cross_domain", "valid")
    text = ["| scale | factor | " + " | ".join(names) + " |", "| --- | --- |" + " --- |" * len(names)]
    for scale, factor in dict.fromkeys((r["scale"], r["factor"]) for r in rows):
        own = [r for r in rows if (r["scale"], r["factor"]) == (scale, factor)]
        means = [sum(r[name] for r in own) / len(own) for name in names]
        text.append(f"| {scale:g} | {factor} | " + " | ".join(f"{m:.2f}" for m in means) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--dictionary", type=Path, default=Path("examples/shapes-rtsae"))
    parser.add_argument("--out", type=Path, default=Path("runs/unlearn.json"))
    parser.add_argument("--prompts", type=int, default=12, help="that name the concept, and that name another value")
    parser.add_argument(
        "--scales", nargs="*", type=float, default=[0.0, -1.0, -2.0], help="1 leaves things as they are"
    )
    a = parser.parse_args()
    pipe, scorer = load_pipeline(a.pipeline, a.device, a.dtype), FactorScorer.from_pretrained(a.scorer).to(a.device)
    dictionary: Dictionary = load_dictionary(a.dictionary)
    concepts = {name: label for name, label in dictionary.labels.items() if label["factor"] in DOMAINS}
    pipe.load_rtsae(dictionary)
    settings = {k: str(v) for k, v in vars(a).items() if k not in ("out", "device", "batch_size", "scales")}
    settings["contents"] = contents(a.pipeline, a.dictionary)
    rows = stored_rows(a.out, settings)
    others = [
        probe(label["factor"], label["value"], "contradicted", a.prompts, seed=600) for label in concepts.values()
    ]
    named = [prompted(one) for one in others]
    for scale in tqdm([1.0, *a.scales], unit="scale"):
        if any(r["scale"] == scale for r in rows):
            continue
        sides = []
        for prompts in (named, None):
            strengths = [{name: scale} for name in concepts] if scale != 1 else None
            options = {"masks": False, "operation": "scale", "clip": False, "neutral": 1.0} if strengths else {}
            images = run(pipe, others, strengths, a.steps, a.guidance, a.batch_size, prompts, **options)
            sides.append(score(scorer, images, others))
        for (name, label), removed, kept, one in zip(concepts.items(), *sides, others, strict=True):
            factor, count = label["factor"], len(removed)
            other = DOMAINS[factor]
            row = {
                "concept": name,
                "factor": factor,
                "scale": scale,
                "n": count,
                "unlearned": sum(r[factor] != label["value"] for r in removed) / count,
                "in_domain": right(kept, one, factor),
                "cross_domain": (right(kept, one, other) + right(removed, one, other)) / 2,
                "valid": sum(bool(r["valid"]) for r in removed) / count,
            }
            rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
        a.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(a.out, {"settings": settings, "rows": rows})
    a.out.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
