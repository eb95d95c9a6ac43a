"""Removing a concept by its features alone, in UnlearnCanvas' protocol on two factors of a world.

    python -m training.experiments.unlearn --out training/results/unlearn.json

Each value of the two factors (in shapes the styles and the shapes) is removed in three ways: by the dictionary's own
label at strength −1; by erasing all tokens on which the label's latents see it; and by scaling the latents that are
more present when prompts name the value than when they name another, wherever they are active, in both guidance
branches (0 sets them to zero), as SAeUron (2501.18052) does with negative scales. All act on every picture, also where
there is nothing to remove. *Unlearned*: the share of pictures
that do not show the concept although the prompt names it. *In-domain*: prompts that name another value of the same
factor still show that value. *Cross-domain*: the other factor is still right. *Valid*: the share of valid pictures
among those whose concept was removed. The model without any edit is the baseline. Rows are added to the JSON as they
are measured; the same command continues where it was stopped.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from diffusers_rtsae import Dictionary, load_dictionary
from diffusers_rtsae.analysis.find import Feature, find_features

from ..commands import Adding
from ..worlds import Probe
from ..worlds.pictures import add_models, calling, load_models, new_parser, parse
from .results import Results, table
from .steering import run, score

FIGURES = {
    "unlearned": "does not show it any more",
    "in_domain": "other values still right",
    "cross_domain": "other factor still right",
    "valid": "valid",
}


def right(readings: list[dict], one: Probe, factor: str) -> float:
    """Share of pictures that show the value of `factor` that a probe's scenes have."""
    hits = [seen[factor] == scene[factor] for seen, scene in zip(readings, one.scenes, strict=True)]
    return sum(hits) / len(hits)


def entries(found: Sequence[Feature]) -> list[dict]:
    """The parts of a label made of these features, one for each site."""
    parts = []
    for site in dict.fromkeys(feature.site for feature in found):
        latents = [feature.index for feature in found if feature.site == site]
        parts.append({"site": site, "latents": latents, "weights": [1.0] * len(latents), "where": None})
    return parts


def markdown(rows: list[dict]) -> str:
    """Means over the concepts of each factor, by edit."""
    lines = []
    for factor, edit in sorted(dict.fromkeys((r["factor"], r["edit"]) for r in rows), key=lambda one: one[0]):
        own = [r for r in rows if (r["factor"], r["edit"]) == (factor, edit)]
        lines.append([factor, edit, *(f"{statistics.mean(r[name] for r in own):.2f}" for name in FIGURES)])
    return table(["factor", "edit", *FIGURES.values()], lines)


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "scorer", "dictionary")
    parser.add_argument("--out", type=Path, default=Path("runs/unlearn.json"))
    parser.add_argument("--prompts", type=int, default=12, help="that name the concept, and that name another value")
    parser.add_argument("--features", nargs="*", action=Adding, type=int, default=[8, 32], help="latents of a concept")
    parser.add_argument("--scales", nargs="*", action=Adding, type=float, default=[0.0, -1.0, -2.0])
    a, world = parse(parser)
    pipe, scorer = load_models(a)
    dictionary: Dictionary = load_dictionary(a.dictionary)
    results = Results(a, [a.pipeline, a.dictionary], said_by_rows=("features", "scales"))
    concepts = [(factor, value) for domain in world.domains for factor, value in world.targets if factor == domain]
    others = [world.probe(*concept, "contradicted", a.prompts, seed=600) for concept in concepts]
    named = [one.prompted for one in others]
    names = {(label["factor"], label["value"]): name for name, label in dictionary.labels.items()}

    counts_and_scales = [
        one
        for one in itertools.product(a.features, a.scales)
        if not results.has(edit="{} latents × {:g}".format(*one))
    ]
    pipe.load_rtsae(dictionary)
    call = calling(pipe, a)
    found = {}
    for concept in tqdm(concepts if counts_and_scales else [], desc="features", unit="concept"):
        choose = world.probe(*concept, "contradicted", a.prompts, seed=601)
        ranked = find_features(pipe, choose.prompted, choose.prompts, max(a.features), seeds=1, by="presence", **call)
        found[concept] = ranked
    pipe.unload_rtsae()

    # how each edit steers: for every concept a label and its strength, and options
    edits: dict[str, tuple[Dictionary | None, list[dict] | None, dict]] = {"no edit": (None, None, {})}
    if all(concept in names for concept in concepts):
        edits["label at −1"] = dictionary, [{names[concept]: -1.0} for concept in concepts], {}
        erasing = [{names[concept]: 1.0} for concept in concepts]
        edits["erased where the label is seen"] = dictionary, erasing, {"operation": "erase"}
    for count, scale in counts_and_scales:
        labels = {value: {"features": entries(found[factor, value][:count])} for factor, value in concepts}
        few, scaling = (
            Dictionary(dictionary.sites, labels, dictionary.config),
            [{value: scale} for _, value in concepts],
        )
        scaled = {"operation": "scale", "apply_to": "all", "clip": False, "neutral": 1.0}
        edits[f"{count} latents × {scale:g}"] = few, scaling, scaled
    for edit, (steering, strengths, options) in edits.items():
        if results.has(edit=edit):
            continue
        if steering is not None:
            pipe.load_rtsae(steering)
            options = options | {"masks": False}
        sides = []
        for prompts in (named, None):
            images = run(pipe, others, strengths, a.steps, a.guidance, a.batch_size, prompts, **options)
            sides.append(score(world, scorer, images, others))
        pipe.unload_rtsae()
        rows = []
        for (factor, value), removed, kept, one in zip(concepts, *sides, others, strict=True):
            (other,), n = {*world.domains} - {factor}, len(removed)
            row = {
                "factor": factor,
                "concept": value,
                "edit": edit,
                "n": n,
                "unlearned": sum(r[factor] != value for r in removed) / n,
                "in_domain": right(kept, one, factor),
                "cross_domain": (right(kept, one, other) + right(removed, one, other)) / 2,
                "valid": sum(bool(r["valid"]) for r in removed) / n,
            }
            rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
        results.add(*rows)
    results.tell(markdown(results.rows))


if __name__ == "__main__":
    main()
