"""Two labels of different factors at once, and a label painted on one of two objects, or on half of a picture of one.

    python -m training.experiments.together --out training/results/together.json

The prompts name all factors, with other values than those steered to. A painted label acts in a disc at the first
object's place; the other object is left alone if everything that is read of it is as without steering. In a world of
one object the left half is painted, and the figures are how far the pixels of each half move, relative to the
unpainted label. Rows are added to the JSON as they are measured; the same command continues where it was stopped.
"""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path

import torch
from tqdm import tqdm

from diffusers_rtsae import load_dictionary

from ..worlds import World
from ..worlds.pictures import add_models, generate, load_models, new_parser, parse
from .results import Results, table

COLUMNS = {
    "two at once": ("both", "both by prompt", "valid"),
    "painted": ("reached", "other alone"),
    "half painted": ("inside", "outside", "valid"),
}


def markdown(rows: list[dict]) -> str:
    """A row for each pair and each painted label, and their means."""
    text = []
    for what, heads in COLUMNS.items():
        own = [row for row in rows if row["what"] == what]
        if own:
            lines = [
                [" + ".join(row["labels"]), *(f"{row[head]:.2f}" for head in heads), str(row["n"])] for row in own
            ]
            means = ["**mean**", *(f"{sum(row[head] for row in own) / len(own):.2f}" for head in heads)]
            text.append(table([what, *heads, "pictures"], [*lines, [*means, str(sum(row["n"] for row in own))]]))
    return "\n".join(text)


def others(world: World, wanted: dict[str, str], count: int, seed: int) -> list[dict]:
    """Held-out scenes with other values than `wanted`."""
    scenes = world.sample(16 * count, seed, held_out=True)
    return [scene for scene in scenes if all(scene[f] != v for f, v in wanted.items())][:count]


def moved(images: torch.Tensor, plain: torch.Tensor) -> tuple[float, float]:
    """The mean distance of pixels of the left and of the right half of pictures `(n, 3, height, width)`."""
    left, right = (images - plain).abs().mean((0, 1, 2)).chunk(2)
    return float(left.mean()), float(right.mean())


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "scorer", "dictionary")
    parser.add_argument("--out", type=Path, default=Path("runs/together.json"))
    parser.add_argument("--prompts", type=int, default=20, help="for each pair of labels, and each painted one")
    parser.add_argument("--pairs", type=int, default=2, help="of labels for each pair of factors, at random")
    parser.add_argument("--painted", type=int, default=4, help="labels of each local factor, at random")
    a, world = parse(parser)
    pipe, scorer = load_models(a)
    dictionary = load_dictionary(a.dictionary)
    pipe.load_rtsae(dictionary)
    results, rng = Results(a, [a.pipeline, a.dictionary]), random.Random(0)
    call = (range(800_000, 800_000 + a.prompts), a.steps, a.guidance)
    named = {f: [v for g, v in world.targets if g == f and v in dictionary.labels] for f in world.steered}
    chosen = [
        {one: rng.choice(named[one]), other: rng.choice(named[other])}
        for one, other in combinations(named, 2)
        for _ in range(a.pairs)
    ]
    for i, wanted in enumerate(tqdm(chosen, desc="two at once")):
        labels = list(wanted.values())
        if results.has(what="two at once", labels=labels):
            continue
        scenes = others(world, wanted, a.prompts, 70_000 + i)
        with pipe.rtsae_steering(dict.fromkeys(labels, 1.0)):
            steered = scorer.read(generate(pipe, world.describe(scenes, i), *call))
        prompted = scorer.read(generate(pipe, world.describe([scene | wanted for scene in scenes], i), *call))
        seen, by_prompt = ([world.seen(reading) for reading in readings] for readings in (steered, prompted))

        def both(readings: list[dict], wanted=wanted) -> float:
            return sum(r["valid"] and all(r[f] == v for f, v in wanted.items()) for r in readings) / len(readings)

        row = {"what": "two at once", "labels": labels, "both": both(seen), "both by prompt": both(by_prompt)}
        results.add(row | {"valid": sum(r["valid"] for r in seen) / len(seen), "n": len(seen)})

    pairs, prompts = world.two(16 * a.prompts, 71_000)
    local = [(f, v) for f in named if f in world.local for v in rng.sample(named[f], min(a.painted, len(named[f])))]
    for factor, value in tqdm(local if pairs else [], desc="painted"):
        if results.has(what="painted", labels=[value]):
            continue
        kept = [i for i, two in enumerate(pairs) if value not in (two[0][factor], two[1][factor])][: a.prompts]
        texts, painted = [prompts[i] for i in kept], world.masks([pairs[i][0] for i in kept], world.image_size)
        plain = scorer.read(generate(pipe, texts, *call))
        with pipe.rtsae_steering({value: 1.0}, mask=painted):
            steered = scorer.read(generate(pipe, texts, *call))
        reached, alone = [], []
        for i, was, now in zip(kept, plain, steered, strict=True):
            before, after = ({o["place"]: o for o in world.objects(reading)} for reading in (was, now))
            first, second = (scene["place"] for scene in pairs[i])
            if first in before and second in before:  # both were drawn
                reached.append(after.get(first, {}).get(factor) == value)
                alone.append(after.get(second) == before[second])
        row = {"what": "painted", "labels": [value], "n": len(reached)}
        results.add(row | {"reached": sum(reached) / len(reached), "other alone": sum(alone) / len(alone)})
    half = torch.zeros(1, world.image_size, world.image_size)
    half[..., : world.image_size // 2] = 1
    singles = [(f, v) for f in named for v in rng.sample(named[f], min(a.painted, len(named[f])))]
    for factor, value in tqdm([] if pairs else singles, desc="half painted"):
        if results.has(what="half painted", labels=[value]):
            continue
        scenes = others(world, {factor: value}, a.prompts, 72_000)
        texts = world.describe(scenes, 0)
        plain = generate(pipe, texts, *call)
        with pipe.rtsae_steering({value: 1.0}):
            whole = moved(generate(pipe, texts, *call), plain)
        with pipe.rtsae_steering({value: 1.0}, mask=half):
            painted = generate(pipe, texts, *call)
        inside, outside = (now / then for now, then in zip(moved(painted, plain), whole, strict=True))
        valid = sum(world.seen(reading)["valid"] for reading in scorer.read(painted)) / len(scenes)
        results.add(
            {"what": "half painted", "labels": [value], "n": len(scenes)}
            | {"inside": inside, "outside": outside, "valid": valid}
        )
    results.tell(markdown(results.rows))


if __name__ == "__main__":
    main()
