"""The honest table: every labelled feature of a world against its baselines, read by a scorer or by the judge.

    python -m training.experiments.rivals --out runs/rivals
    python -m training.experiments.table --rivals runs/rivals --judge --out training/results/judged.json

Labels, each made of few latents or a linear map, act at the fixed strength 1. For the difference of means the best of
three strengths is shown, chosen on these same pictures. Constant directions get the object's place as a mask. Rows are
added to the JSON as they are measured; the same command continues where it was stopped, and measures again what
another dictionary changes.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from diffusers_rtsae import RTSAE, Dictionary, load_dictionary
from diffusers_rtsae.analysis.scorer import FactorScorer
from diffusers_rtsae.models import LinearMap

from ..commands import Adding
from ..worlds import KINDS, Probe, World
from ..worlds.pictures import add_models, load_models, new_parser, parse
from .results import Results, best, contents, figures, folded, table
from .rivals import CONSTANT, RIVALS
from .steering import difference_of_means, mean, measure, run, score

METHODS = {  # and the strengths at which each is measured
    "plain": (0.0,),
    "feature": (1.0,),
    "latents": (1.0,),
    "random latents": (1.0,),
    "free direction": (1.0,),
    "direction": (1.0,),
    "means": (1.0, 2.0, 0.5),
    "random": (1.0,),
    "prompt": (0.0,),
}
HEADS = {
    "plain": "no edit",
    "feature": "label",
    "latents": "latents, same fit",
    "random latents": "random latents, same fit",
    "free direction": "free direction, same pairs",
    "direction": "mean change, same pairs",
    "means": "difference of means",
    "random": "random map",
    "prompt": "edited prompt",
}
SUCCESS, LEAKAGE = 0.9, 0.1  # the goal of a label
MASKED = (*CONSTANT, "means")  # act inside the mask of the object, unclipped


def with_labels(sites: dict[str, RTSAE], labels: dict[str, dict], rows: list[int]) -> Dictionary:
    """Directions with the names and options of `labels`; `rows` are the indices of the labels' directions."""
    named = {}
    for row, (name, label) in zip(rows, labels.items(), strict=True):
        at = dict.fromkeys(entry["site"] for entry in label["features"])
        entries = [{"site": site, "latents": [row], "weights": [1.0]} for site in at]
        named[name] = {"factor": label["factor"], "edit": label.get("edit", {}), "features": entries}
    return Dictionary(sites, named)


def random_maps(dictionary: Dictionary, seed: int = 0) -> Dictionary:
    """The labels of a dictionary with maps that read the same and move as far, but in random directions."""
    generator = torch.Generator().manual_seed(seed)
    maps = {}
    for name, rows in dictionary.maps.items():
        linear_map = LinearMap(rows)
        directions = linear_map.directions.paths[:, 0]
        random = torch.linalg.qr(torch.randn(directions.T.shape, generator=generator)).Q.T
        maps[name] = linear_map.with_directions(directions.norm(dim=1, keepdim=True) * random)
    return replace(dictionary, maps=maps)


def markdown(rows: list[dict]) -> str:
    """The table as Markdown: medians, and one line a label, success / leakage / valid on open and contradicted
    prompts."""
    cells: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        cells.setdefault((row["kind"], row["method"], row["label"]), []).append(row)
    factors = {row["label"]: row["factor"] for row in rows}
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    text = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        shown = {key[1:]: best(found) for key, found in cells.items() if key[0] == kind}

        def medians(method: str, labels: list[str], shown=shown) -> str:
            own = [shown[method, label] for label in labels if (method, label) in shown]
            if not own:
                return "–"
            middle = {key: statistics.median(r[key] for r in own) for key in ("success", "leakage", "valid")}
            return figures(middle) + (f" ({len(own)} of {len(labels)})" if len(own) < len(labels) else "")

        groups = {
            factor: [la for la, f in factors.items() if f == factor] for factor in dict.fromkeys(factors.values())
        }
        groups["all"] = list(factors)
        lines = [[f"{len(own)} {name}", *(medians(m, own) for m in methods)] for name, own in groups.items()]
        text += [f"**{kind} prompts** (medians over labels of success / leakage / valid)", ""]
        text.append(table(["", *(HEADS[m] for m in methods)], lines))

        def cell(method: str, label: str, shown=shown) -> str:
            row = shown.get((method, label))
            if row is None:
                return "–"
            return figures(row) + (f" @{row['strength']:g}" if len(METHODS[method]) > 1 else "")

        own = {label: shown["feature", label] for label in factors if ("feature", label) in shown}
        misses = [f"{name} {row['success']:.2f}" for name, row in own.items() if row["success"] < SUCCESS]
        leaks = [f"{name} {row['leakage']:.2f}" for name, row in own.items() if row["leakage"] > LEAKAGE]
        fewest = min(row["n"] for row in rows if row["kind"] == kind)
        error = f"A label's standard error is at most {0.5 / fewest**0.5:.2f} ({fewest} pictures)."
        text += [f"- Labels below {SUCCESS} success: {', '.join(misses) or 'none'}."]
        text += [f"- Labels above {LEAKAGE} leakage: {', '.join(leaks) or 'none'}.", f"- {error}", ""]
        if all("changed" in row for row in own.values()):
            others = list(dict.fromkeys(f for row in own.values() for f in row["changed"]))
            lines = []
            for group, labels in groups.items():
                read = {f: [own[la]["changed"][f] for la in labels if f in own[la]["changed"]] for f in others}
                lines.append([group, *(f"{statistics.mean(of):.2f}" if of else "–" for of in read.values())])
            text += [
                "Which other factor a label changes, as a share of its pictures:",
                "",
                table(["", *others], lines),
            ]
        lines = [[label, *(cell(m, label) for m in methods)] for label in factors]
        text.append(folded(f"{kind} prompts, each label", table(["", *(HEADS[m] for m in methods)], lines)))
    return "\n".join(text)


def changed(steered: list[list[dict]], plain: list[list[dict]], factor: str) -> dict[str, float]:
    """The share of pictures in which each factor but the steered one reads differently."""
    both = [one for pair in zip(steered, plain, strict=True) for one in zip(*pair, strict=True)]
    others = [name for name in both[0][0] if name not in (factor, "valid")]
    return {name: round(statistics.mean(now[name] != was[name] for now, was in both), 4) for name in others}


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
    """The pictures of each label's prompts, made with a method."""
    probes = [one for group in groups.values() for one in group]
    if not probes:
        return {}
    prompts = strengths = None
    options = {}
    if method == "prompt":
        prompts = [one.prompted for one in probes]
    elif method != "plain":
        strengths = [{name: strength} for name, group in groups.items() for _ in group]
        options = {"adapter_name": method, "clip": method not in MASKED, "masks": method in MASKED}
    images = run(pipe, probes, strengths, a.steps, a.guidance, a.batch_size, prompts, **options)
    readings = iter(score(world, scorer, images, probes))
    parts = iter(images.split([sum(len(one.prompts) for one in group) for group in groups.values()]))
    return {name: (next(parts), [next(readings) for _ in group]) for name, group in groups.items()}


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "scorer", "dictionary")
    parser.add_argument("--judge", action="store_true", help="read pictures with the judge")
    parser.add_argument("--rivals", type=Path, help="output folder of `rivals`")
    parser.add_argument("--out", type=Path, default=Path("runs/labels.json"))
    parser.add_argument("--kinds", nargs="*", action=Adding, choices=KINDS, default=list(KINDS))
    parser.add_argument("--methods", nargs="*", action=Adding, choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--prompts", type=int, default=16, help="for each label, kind and seed")
    parser.add_argument("--seeds", nargs="*", action=Adding, type=int, default=[0])
    parser.add_argument("--samples", type=int, default=192, help="pictures behind the difference of means")
    a, world = parse(parser)
    if a.judge:
        a.scorer = world.judge
    pipe, scorer = load_models(a)
    dictionary = load_dictionary(a.dictionary, dtype=torch.float32)
    labels = dictionary.labels
    results = Results(a, [a.pipeline], said_by_rows=("dictionary", "kinds", "methods", "rivals"))
    loaded, digests = {"feature": dictionary, "random": random_maps(dictionary)}, {}
    if "means" in a.methods:
        means = difference_of_means(world, pipe, list(dictionary.sites), a.samples, a.steps, a.guidance, a.batch_size)
        rows = [world.targets.index((label["factor"], label["value"])) for label in labels.values()]
        loaded["means"] = with_labels(means.sites, labels, rows)
    for method in RIVALS if a.rivals else ():
        if method in a.methods and (a.rivals / method).is_dir():
            loaded[method], digests[method] = load_dictionary(a.rivals / method), contents(a.rivals / method)
    for method, one in loaded.items():
        pipe.load_rtsae(one, method)
    digests |= dict.fromkeys(("feature", "random"), contents(a.dictionary))
    results.rows = [r for r in results.rows if r.get("dictionary") == digests.get(r["method"], r.get("dictionary"))]

    for kind in a.kinds:
        groups = {  # for each label the prompts of each seed
            name: [world.probe(label["factor"], label["value"], kind, a.prompts, seed=100 + s) for s in a.seeds]
            for name, label in labels.items()
        }
        plain: dict[str, Pictures] = {}
        of_all = [method for method in a.methods if method in ("plain", "prompt", *loaded)]
        trials = [(method, strength) for method in of_all for strength in METHODS[method]]
        for method, strength in tqdm(trials, desc=kind, unit="setting"):
            setting = {"kind": kind, "method": method, "strength": strength}
            known = loaded[method].labels if method in loaded else labels
            missing = {
                name: group
                for name, group in groups.items()
                if name in known and not results.has(label=name, **setting)
            }
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
                row |= {"dictionary": digests[method]} if method in digests else {}
                row |= mean(cells) | {"changed": changed(readings, was, label["factor"])}
                row |= {"success_per_seed": [round(c["success"], 4) for c in cells], "n": len(images)}
                row["image_distance"] = round((images - before).square().mean((1, 2, 3)).sqrt().mean().item(), 4)
                rows.append(row)
            results.add(*rows)
    results.tell(markdown([r for r in results.rows if r["label"] in labels]))


if __name__ == "__main__":
    main()
