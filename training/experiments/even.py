"""What is drawn by default, and can it be evened out? Prompts that name one factor and nothing else.

    python -m training.experiments.even --out training/results/even.json

The same prompts and noise are drawn twice: without steering, and with each picture steered at strength 1 to one value
of another factor. All values are used equally often, assigned at random. The prompts are not changed. Rows are added
to the JSON as they are measured; the same command continues where it was stopped.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from diffusers_rtsae import Dictionary, load_dictionary

from ..worlds import Probe, World
from ..worlds.pictures import add_models, load_models, new_parser, parse
from .results import Results, table
from .steering import run, score

SEED = 83_000_000


def labels_of(dictionary: Dictionary, world: World, factor: str) -> dict[str, str]:
    """The label of each value of a factor; empty if any value has no label."""
    names = {label["value"]: name for name, label in dictionary.labels.items() if label["factor"] == factor}
    return {value: names[value] for value in world.factors[factor]} if {*world.factors[factor]} <= {*names} else {}


def shares(seen: list[dict], values: Sequence[str], factor: str) -> dict[str, float]:
    """The share of the valid pictures that show each value."""
    read = [one[factor] for one in seen if one["valid"]]
    return {value: round(read.count(value) / max(1, len(read)), 4) for value in values}


def ratio(shares: dict[str, float]) -> str:
    """The largest share over the smallest."""
    return f"{max(shares.values()) / min(shares.values()):.2f}" if min(shares.values()) else "∞"


def markdown(rows: list[dict]) -> str:
    """For each factor the shares, how uneven they are, and whether what the prompt names is still right."""
    lines = []
    for row in rows:
        for when in ("before", "evened"):
            own = row[when]
            text = ", ".join(f"{value} {share:.2f}" for value, share in own["shares"].items())
            figures = [ratio(own["shares"]), *(f"{own[name]:.2f}" for name in ("right", "valid"))]
            lines.append([row["factor"] if when == "before" else "", when, *figures, text])
    return table(["factor", "", "largest / smallest", "what is named is right", "valid", "shares"], lines)


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "scorer", "dictionary")
    parser.add_argument("--out", type=Path, default=Path("runs/even.json"))
    parser.add_argument("--prompts", type=int, default=16, help="that name each value")
    a, world = parse(parser)
    pipe, scorer = load_models(a)
    dictionary = load_dictionary(a.dictionary)
    results = Results(a, [a.pipeline, a.dictionary])
    named = world.domains[1]
    scenes = world.sample(a.prompts, seed=SEED, held_out=False)
    scenes = [scene | {named: value} for factor, value in world.targets if factor == named for scene in scenes]
    prompts = world.describe(scenes, 0, leave_open=[factor for factor in world.factors if factor != named])

    def group(chosen: Sequence[int], factor: str, value: str) -> Probe:
        some = [prompts[i] for i in chosen]
        everywhere = torch.ones(len(chosen), world.image_size, world.image_size)
        return Probe(factor, value, [scenes[i] for i in chosen], some, some, [SEED + i for i in chosen], everywhere)

    def drawn(groups: list[Probe], strengths: list[dict] | None) -> list[dict]:
        """The reading of each picture, and whether the value that its prompt names is right."""
        images = run(pipe, groups, strengths, a.steps, a.guidance, a.batch_size)
        seen = [one for some in score(world, scorer, images, groups) for one in some]
        targets = [scene[named] for one in groups for scene in one.scenes]
        return [s | {"right": s["valid"] and s[named] == value} for s, value in zip(seen, targets, strict=True)]

    plain = drawn([group(range(len(scenes)), named, "")], None)
    for factor in tqdm([one for one in world.factors if one != named], unit="factor"):
        names = labels_of(dictionary, world, factor)
        if not names or results.has(factor=factor):
            continue
        order = random.Random(SEED).sample(range(len(scenes)), len(scenes))
        groups = [group(order[i :: len(names)], factor, value) for i, value in enumerate(names)]
        pipe.load_rtsae(dictionary)
        evened = drawn(groups, [{name: 1.0} for name in names.values()])
        pipe.unload_rtsae()
        row = {"factor": factor, "n": len(scenes)}
        for when, seen in (("before", plain), ("evened", evened)):
            row[when] = {"shares": shares(seen, world.factors[factor], factor)}
            row[when] |= {name: round(statistics.mean(bool(s[name]) for s in seen), 4) for name in ("right", "valid")}
        results.add(row)
    results.tell(markdown(results.rows))


if __name__ == "__main__":
    main()
