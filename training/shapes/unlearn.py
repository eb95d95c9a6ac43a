"""Removing a concept by its features alone, in UnlearnCanvas' protocol on shapes x styles.

    python -m training.shapes.unlearn --out training/results/unlearn.json

For each style and shape the latents that are most present when prompts name it, against prompts that name another
value, are multiplied by a scale (0: set to zero) wherever they are active; so SAeUron (2501.18052) does, with negative
scales. *Unlearned*: the share of pictures that do not show the concept any more, though the prompt names it.
*In-domain*: prompts that name another value of the same factor still show that. *Cross-domain*: the other of the two
factors is still right. *Valid*: of the pictures whose concept was removed. Beside it the model without any edit. Rows
are added to the JSON as they are measured; the same command continues where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from diffusers_rtsae import Dictionary, load_dictionary
from diffusers_rtsae.analysis.find import find_features
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
    """Means over the concepts of each factor, by number of latents and scale."""
    names = ("unlearned", "in_domain", "cross_domain", "valid")
    text = ["| factor | latents | scale | " + " | ".join(names) + " |", "| --- | --- | --- |" + " --- |" * len(names)]
    for factor, count, minus in sorted(dict.fromkeys((r["factor"], r["latents"], -r["scale"]) for r in rows)):
        own = [r for r in rows if (r["factor"], r["latents"], -r["scale"]) == (factor, count, minus)]
        means = [sum(r[name] for r in own) / len(own) for name in names]
        head = f"| {factor} | " + (f"{count} | {-minus:g} | " if count else "no edit | | ")
        text.append(head + " | ".join(f"{m:.2f}" for m in means) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--dictionary", type=Path, default=Path("examples/shapes-rtsae"))
    parser.add_argument("--out", type=Path, default=Path("runs/unlearn.json"))
    parser.add_argument("--prompts", type=int, default=12, help="that name the concept, and that name another value")
    parser.add_argument("--features", nargs="*", type=int, default=[8, 32], help="latents of a concept")
    parser.add_argument("--scales", nargs="*", type=float, default=[0.0, -1.0, -2.0])
    a = parser.parse_args()
    pipe, scorer = load_pipeline(a.pipeline, a.device, a.dtype), FactorScorer.from_pretrained(a.scorer).to(a.device)
    dictionary: Dictionary = load_dictionary(a.dictionary)
    settings = {k: str(v) for k, v in vars(a).items() if k not in ("out", "device", "batch_size", "scales")}
    settings["contents"] = contents(a.pipeline, a.dictionary)
    rows = stored_rows(a.out, settings)
    concepts = [(factor, value) for factor in DOMAINS for value in FACTORS[factor]]
    others = [probe(*concept, "contradicted", a.prompts, seed=600) for concept in concepts]
    named = [prompted(one) for one in others]

    pipe.load_rtsae(dictionary)
    (site,) = dictionary.sites
    call = {"num_inference_steps": a.steps, "guidance_scale": a.guidance}
    found = {}
    for concept in tqdm(concepts, desc="features", unit="concept"):
        choose = probe(*concept, "contradicted", a.prompts, seed=601)
        table = find_features(pipe, prompted(choose), choose.prompts, max(a.features), seeds=1, **call)
        found[concept] = [feature.index for feature in table]
    pipe.unload_rtsae()

    for count, scale in [(0, 1.0), *((n, s) for n in a.features for s in a.scales)]:
        if any((r["latents"], r["scale"]) == (count, scale) for r in rows):
            continue
        strengths = None
        if count:
            entries = {value: found[factor, value][:count] for factor, value in concepts}
            labels = {
                value: {"features": [{"site": site, "latents": e, "weights": [1.0] * len(e), "where": None}]}
                for value, e in entries.items()
            }
            pipe.load_rtsae(Dictionary(dictionary.sites, labels, dictionary.config))
            strengths = [{value: scale} for _, value in concepts]
        sides = []
        for prompts in (named, None):
            options = {"masks": False, "operation": "scale", "clip": False, "neutral": 1.0} if strengths else {}
            images = run(pipe, others, strengths, a.steps, a.guidance, a.batch_size, prompts, **options)
            sides.append(score(scorer, images, others))
        pipe.unload_rtsae()
        for (factor, value), removed, kept, one in zip(concepts, *sides, others, strict=True):
            other, n = DOMAINS[factor], len(removed)
            row = {
                "factor": factor,
                "concept": value,
                "latents": count,
                "scale": scale,
                "n": n,
                "unlearned": sum(r[factor] != value for r in removed) / n,
                "in_domain": right(kept, one, factor),
                "cross_domain": (right(kept, one, other) + right(removed, one, other)) / 2,
                "valid": sum(bool(r["valid"]) for r in removed) / n,
            }
            rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
        a.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(a.out, {"settings": settings, "rows": rows})
    a.out.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
