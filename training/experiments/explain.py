"""Does the ledger of a word say what is measured? Features are taken away, and the prediction is asked.

    python -m training.experiments.explain --out training/results/explain.json

For one value of each factor and seed, the first values first, `explain` splits what naming the value does to a
picture's predictions over features: against a prompt that leaves the factor open, and against one that names another
value. Then sets of latents are taken away, each at all steps and sites at once: the first of the ledger, those that it
says lose most by ablation, the most active of the picture, and active ones at random. They are either *undone*, set to
what they are without the word, which is what shares are about; or *ablated*, set to zero, by the edits that steer, for
which the ledger has a figure of its own. What goes of the word's change of the prediction is measured in the picture
that the ledger is of; and, of ablated latents, in another one of the same prompt, which had no part in the ledger.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from diffusers_rtsae import load_dictionary
from diffusers_rtsae.analysis.explain import ERROR, PATHS, REST, Entry, Ledger, ledger_of
from diffusers_rtsae.analysis.word import WordStates

from ..worlds import KINDS, World
from ..worlds.pictures import add_models, calling, load_pipeline, new_parser, parse
from .results import Results, spread, table

COUNTS = (1, 4, 16)  # latents that are taken away together
WAYS = {
    "first": "first of the ledger",
    "ablation": "most by ablation",
    "active": "most active",
    "random": "random active ones",
}
AGAINST = {"open": "the factor left open", "contradicted": "another value"}
STEPS = 8  # of each generation
_APART = 500_000  # between the seeds of a picture and of another one of the same prompt


def value_of(world: World, factor: str, number: int) -> str:
    """One of the values of a factor: the first for the first seed, and so on, and then from the first on again."""
    values = [value for own, value in world.targets if own == factor]
    return values[number % len(values)]


def chosen(ledger: Ledger, way: str, count: int, seed: int) -> list[Entry]:
    """The features of a ledger to take away."""
    if way == "random":
        active = [entry for entry in ledger.features if entry.present > 0]
        return random.Random(seed).sample(active, min(count, len(active)))
    orders = {"ablation": lambda entry: -entry.ablated, "active": lambda entry: -entry.present}
    return (sorted(ledger.features, key=orders[way]) if way in orders else ledger.features)[:count]


def measured(pipe, world: World, factor: str, value: str, kind: str, seed: int, call: dict) -> dict:
    """The row of one ledger: what it says, and what taking each set of its features away does."""
    probe = world.probe(factor, value, kind, 1, seed=800 + seed)
    prompt, without, noise = probe.prompted[0], probe.prompts[0], probe.seeds[0]
    states, other = (WordStates(pipe, prompt, without, None, s, STEPS, **call) for s in (noise, noise + _APART))
    ledger = ledger_of(states, prompt, without, value, features=None)
    sets = [(way, count, chosen(ledger, way, count, noise)) for way in WAYS for count in COUNTS]
    latents = [[(entry.site, entry.index) for entry in entries] for *_, entries in sets]
    found = zip(states.undone(latents), states.ablated(latents), other.ablated(latents), strict=True)
    rows = [
        {
            "way": way, "count": count, "share": sum(e.share for e in entries), "undone": undone,
            "said": sum(e.ablated for e in entries), "ablated": ablated, "elsewhere": elsewhere,
        }
        for (way, count, entries), (undone, ablated, elsewhere) in zip(sets, found, strict=True)
    ]  # fmt: skip
    rows = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    told = {name: round(ledger.share(what), 4) for name, what in (("rest", REST), ("paths", PATHS), ("error", ERROR))}
    active = sum(entry.present > 0 for entry in ledger.features)
    return {"prompt": prompt, "without": without, "active": active, **told, "sets": rows}


def correlation(
    rows: Sequence[dict], said: str, found: str, which: Callable[[dict], bool] = lambda one: True
) -> float:
    """Pearson's correlation of two figures over the sets of some ledgers."""
    pairs = [(one[said], one[found]) for row in rows for one in row["sets"] if which(one)]
    return statistics.correlation(*zip(*pairs, strict=True))


def _agreement(rows: list[dict]) -> str:
    """How well what is said goes with what is measured; the spread is that of the seeds."""
    compared = {
        "share, latents undone": ("share", "undone"),
        "share, latents ablated": ("share", "ablated"),
        "figure for ablation, latents ablated": ("said", "ablated"),
        "the same, in another picture of the prompt": ("said", "elsewhere"),
    }
    seeds = sorted({row["seed"] for row in rows})
    lines = []
    for name, (said, found) in compared.items():
        cells = [name]
        for which in (lambda one: True, lambda one: one["way"] in ("first", "ablation")):
            each = [correlation([r for r in rows if r["seed"] == seed], said, found, which) for seed in seeds]
            cells.append(f"{correlation(rows, said, found, which):.3f} ({min(each):.2f} to {max(each):.2f})")
        lines.append(cells)
    count = len(rows) * len(rows[0]["sets"])
    heads = ["said and measured", f"correlation over all {count} sets (of single seeds)", "over chosen sets alone"]
    return table(heads, lines)


def _sets(rows: list[dict]) -> str:
    """What taking each kind of set away does, by what the prompt is compared with."""
    lines = []
    for way, name in WAYS.items():
        for count in COUNTS:
            cells = [name, str(count)]
            for kind in KINDS:
                own = [
                    one
                    for row in rows
                    if row["kind"] == kind
                    for one in row["sets"]
                    if (one["way"], one["count"]) == (way, count)
                ]
                for said, found in (("share", "undone"), ("said", "ablated")):
                    means = (statistics.mean(one[key] for one in own) for key in (said, found))
                    cells.append(" → ".join(f"{mean:.2f}" for mean in means))
            lines.append(cells)
    heads = [f"{op}, against {AGAINST[kind]}" for kind in KINDS for op in ("undone", "ablated")]
    return table(["latents", "how many", *heads], lines)


def _missed(rows: list[dict]) -> str:
    """What sixteen features carry of each factor, and what the dictionary misses."""
    lines = []
    for factor in dict.fromkeys(row["factor"] for row in rows):
        for kind in KINDS:
            own = [row for row in rows if row["factor"] == factor and row["kind"] == kind]
            most = [one for row in own for one in row["sets"] if one["way"] == "first" and one["count"] == COUNTS[-1]]
            cells = [spread([one[key] for one in most]) for key in ("share", "undone")]
            cells += [spread([row[key] for row in own]) for key in ("rest", "paths", "error")]
            active = round(statistics.mean(row["active"] for row in own))
            lines.append([factor, AGAINST[kind], str(len(own)), *cells, str(active)])
    heads = ["factor", "against", "n", "share of 16", "16 undone", "rest", "other paths", "error", "active latents"]
    return table(heads, lines)


def markdown(rows: list[dict]) -> str:
    """How well the ledger says what is measured; each kind of set; and each factor."""
    return "\n".join([_agreement(rows), "Said → measured, means:\n", _sets(rows), _missed(rows)])


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "dictionary")
    parser.add_argument("--out", type=Path, default=Path("runs/explain.json"))
    parser.add_argument("--seeds", type=int, default=3, help="from the first on; each has another value of a factor")
    a, world = parse(parser)
    pipe = load_pipeline(a.pipeline, a.device, a.dtype)
    pipe.load_rtsae(load_dictionary(a.dictionary, dtype=torch.float32))
    results, call = Results(a, [a.pipeline, a.dictionary]), calling(pipe, a)
    cases = [
        (factor, value_of(world, factor, seed), kind, seed)
        for seed in range(a.seeds)
        for factor in world.steered
        for kind in KINDS
    ]
    for factor, value, kind, seed in tqdm(cases, unit="ledger"):
        case = {"factor": factor, "value": value, "kind": kind, "seed": seed}
        if not results.has(**case):
            results.add(case | measured(pipe, world, factor, value, kind, seed, call))
    results.tell(markdown(results.rows))


if __name__ == "__main__":
    main()
