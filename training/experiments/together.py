"""Several labels of different factors at once, and a label painted on one of two objects, or on half of a picture.

    python -m training.experiments.together --out training/results/together.json

Two or three labels, on prompts that leave their factors open, that name one other factor and nothing else (terse), or
that name other values of them; beside prompts that name all. Each is drawn with the labels' maps added up in several
ways (`WAYS`), of which the package has one. A painted label acts in a disc at the first object's place; the other
object is left alone if everything that is read of it is as without steering. In a world of one object the left half is
painted, and the figures are how far the pixels of each half move, relative to the unpainted label. Rows are added to
the JSON as they are measured; the same command continues where it was stopped.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import torch
from tqdm import tqdm

from diffusers_rtsae import load_dictionary
from diffusers_rtsae.steering import Fold

from ..commands import Adding
from ..worlds import World
from ..worlds.pictures import add_models, generate, load_models, new_parser, parse
from .results import Results, folded, table

COLUMNS = {"painted": ("reached", "other alone"), "half painted": ("inside", "outside", "valid")}
PROMPTS = ("open", "terse", "contradicting")
NAMES = {2: "two at once", 3: "three at once"}

Move = Callable[[torch.Tensor], torch.Tensor]  # what a label's map adds to an activation


def _all_alone(maps: Sequence[Move], tokens: torch.Tensor) -> torch.Tensor:
    return sum(one(tokens) for one in maps)


def _in_turn(maps: Sequence[Move], tokens: torch.Tensor) -> torch.Tensor:
    moved = tokens
    for one in maps:
        moved = moved + one(moved)
    return moved - tokens


def _again(maps: Sequence[Move], tokens: torch.Tensor) -> torch.Tensor:
    change = _all_alone(maps, tokens)
    return change + 0.5 * _all_alone(maps, tokens + change)


def _shortened(maps: Sequence[Move], tokens: torch.Tensor) -> torch.Tensor:
    each = torch.stack([one(tokens) for one in maps])
    length, whole = each.norm(dim=-1, keepdim=True).square().sum(0).sqrt(), each.sum(0)
    return whole * (length / whole.norm(dim=-1, keepdim=True).clamp(min=1e-9)).clamp(max=1)


def _all_others(maps: Sequence[Move], tokens: torch.Tensor) -> torch.Tensor:
    alone = [one(tokens) for one in maps]
    return sum(one(tokens + sum(alone) - own) for one, own in zip(maps, alone, strict=True))


#: how maps may be added up; `None` is the package's own way: each reads the activation as it is without edits
WAYS: dict[str, Callable[[Sequence[Move], torch.Tensor], torch.Tensor] | None] = {
    "what is there": None,
    "what the others move": _all_others,
    "in turn": _in_turn,
    "again": _again,
    "shortened": _shortened,
}


@contextlib.contextmanager
def adding(way: str):
    """Inside the `with` block the maps of several labels with the same options are added up in this way."""
    own, add_up = Fold.change, WAYS[way]

    def change(fold: Fold, tokens: torch.Tensor, latents, step, counts=None, *arguments, **options):
        done = own(fold, tokens, latents, step, counts, *arguments, **options)
        if fold.options.map is None or len(fold.edits) == 1:
            return done

        def move(activation: torch.Tensor, edit: int) -> torch.Tensor:
            amounts, vectors = own(fold, activation, latents, step, None, *arguments, **options)
            return amounts[..., fold.owners == edit] @ vectors[:, fold.owners == edit]

        whole = add_up([functools.partial(move, edit=i) for i in range(len(fold.edits))], tokens.float())
        return whole, torch.eye(whole.shape[2]).to(whole).expand(len(whole), -1, -1)

    try:
        Fold.change = own if add_up is None else change
        yield
    finally:
        Fold.change = own


def _means(rows: list[dict], *heads: str) -> list[str]:
    count = sum(row["n"] for row in rows)
    return [f"{sum(row[head] * row['n'] for row in rows) / count:.2f}" if count else "–" for head in heads]


def markdown(rows: list[dict]) -> str:
    """Tables: of each way and kind of prompts, of each set of labels, and of painted ones."""
    text = []
    for count, name in NAMES.items():
        own = [row for row in rows if row["what"] == name]
        if not own:
            continue
        cells = {(r["way"], r["prompts"]): [] for r in own}
        for row in own:
            cells[row["way"], row["prompts"]].append(row)
        kinds = [kind for kind in (*PROMPTS, "named") if any(at == kind for _, at in cells)]
        lines = []
        for way in (way for way in ("prompt", *WAYS) if any(row["way"] == way for row in own)):
            told = [" / ".join(_means(cells[way, k], "all", "valid")) if (way, k) in cells else "" for k in kinds]
            at = [row for row in own if row["way"] == way]
            lines.append([way, *told, " / ".join(_means(at, "all", "valid")), str(sum(row["n"] for row in at))])
        text.append(table([f"{name}: all {count} / valid", *kinds, "**mean**", "pictures"], lines))
    at_once = [row for row in rows if row["what"] in NAMES.values()]
    ways = [
        way for way in ("what is there", "what the others move", "prompt") if any(r["way"] == way for r in at_once)
    ]
    lines = []
    for labels in dict.fromkeys(tuple(row["labels"]) for row in at_once):
        own = [[row for row in at_once if tuple(row["labels"]) == labels and row["way"] == way] for way in ways]
        lines.append([" + ".join(labels), *(" / ".join(_means(mine, "all", "valid")) for mine in own)])
    if lines:
        text.append(folded("Each set of labels", table(["all / valid, all kinds of prompts", *ways], lines)))
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
    scenes = world.sample(64 * count, seed, held_out=True)
    return [scene for scene in scenes if all(scene[f] != v for f, v in wanted.items())][:count]


def moved(images: torch.Tensor, plain: torch.Tensor) -> tuple[float, float]:
    """The mean distance of pixels of the left and of the right half of pictures `(n, 3, height, width)`."""
    left, right = (images - plain).abs().mean((0, 1, 2)).chunk(2)
    return float(left.mean()), float(right.mean())


def described(world: World, scenes: list[dict], wanted: dict[str, str], kind: str, seed: int) -> list[str]:
    """Prompts of one of `PROMPTS` for scenes without the values in `wanted`."""
    kept = [factor for factor in (*reversed(world.domains), *world.steered) if factor not in wanted]
    left_open = {"open": [*wanted], "terse": [f for f in world.factors if f != kept[0]], "contradicting": []}
    return world.describe(scenes, seed, leave_open=left_open[kind])


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "scorer", "dictionary")
    parser.add_argument("--out", type=Path, default=Path("runs/together.json"))
    parser.add_argument("--prompts", type=int, default=20, help="for each painted label")
    parser.add_argument("--each", type=int, default=4, help="prompts of each kind for each set of labels at once")
    parser.add_argument("--sets", type=int, default=1, help="of labels for each set of factors, at random")
    parser.add_argument("--painted", type=int, default=4, help="labels of each local factor, at random")
    parser.add_argument("--ways", nargs="*", action=Adding, choices=WAYS, default=list(WAYS), help="to add maps up")
    a, world = parse(parser)
    pipe, scorer = load_models(a)
    dictionary = load_dictionary(a.dictionary)
    pipe.load_rtsae(dictionary)
    results, rng = Results(a, [a.pipeline, a.dictionary], ("ways",)), random.Random(0)
    named = {f: [v for g, v in world.targets if g == f and v in dictionary.labels] for f in world.steered}
    chosen = [
        {factor: rng.choice(named[factor]) for factor in factors}
        for count in NAMES
        for factors in combinations(named, count)
        for _ in range(a.sets)
    ]
    call = (range(800_000, 800_000 + a.each), a.steps, a.guidance)

    def measure(images: torch.Tensor, wanted: dict[str, str], way: str, kind: str) -> None:
        seen = [world.seen(reading) for reading in scorer.read(images)]
        reached = sum(r["valid"] and all(r[f] == v for f, v in wanted.items()) for r in seen) / len(seen)
        row = {"what": NAMES[len(wanted)], "labels": list(wanted.values()), "way": way, "prompts": kind}
        results.add(row | {"all": reached, "valid": sum(r["valid"] for r in seen) / len(seen), "n": len(seen)})

    for i, wanted in enumerate(tqdm(chosen, desc="at once")):
        labels, scenes = list(wanted.values()), others(world, wanted, a.each, 70_000 + i)
        if not results.has(labels=labels, way="prompt"):
            texts = world.describe([scene | wanted for scene in scenes], i)
            measure(generate(pipe, texts, *call), wanted, "prompt", "named")
        for way in a.ways:
            for kind in PROMPTS:
                if results.has(labels=labels, way=way, prompts=kind):
                    continue
                with pipe.rtsae_steering(dict.fromkeys(labels, 1.0)), adding(way):
                    images = generate(pipe, described(world, scenes, wanted, kind, i), *call)
                measure(images, wanted, way, kind)

    call = (range(800_000, 800_000 + a.prompts), a.steps, a.guidance)
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
