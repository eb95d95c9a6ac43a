"""The hard case: prompts that name another value than the one that is steered to (a green star, steered red).

    python -m training.experiments.hard --out training/results/hard.json

For each pair of labelled values of a factor, in both guidance branches and at all steps, these edits are compared:
`add`; the token-local `transfer` and `replace`, whose source is the feature of the value that the prompt names;
`swap`, which adds the target and subtracts that feature, both without clipping; `falling`, a swap whose strength falls
from twice its mean at the beginning to 0 at the end; and `local`, the latter only on tokens where one of the two is
active. Rows are added to the JSON as they are measured; the same command continues where it was stopped.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from diffusers_rtsae import load_dictionary

from ..commands import Adding
from ..worlds import Probe
from ..worlds.pictures import add_models, generate, load_models, new_parser, parse
from .results import Results, best, figures, table
from .steering import mean, measure, run, score

METHODS = ("add", "transfer", "replace", "swap", "falling", "local")


def falling(strength: float, progress: float) -> float:
    """A schedule that falls linearly to 0, with mean `strength`."""
    return 2 * strength * (1 - progress)


def steer(
    pipe, probes: list[Probe], targets: list[str], labels: dict, method: str, strength: float, a
) -> torch.Tensor:
    """Generate the pictures of all probes, each prompt steered from the value it names to its probe's target."""
    rows = []
    for one, target in zip(probes, targets, strict=True):
        for i, prompt in enumerate(one.prompts):
            rows.append((prompt, one.seeds[i], target, one.scenes[i][one.factor]))
    images = []
    for start in range(0, len(rows), a.batch_size):
        part = rows[start : start + a.batch_size]
        with ExitStack() as stack:
            for target, named in dict.fromkeys((r[2], r[3]) for r in part):
                chosen = torch.tensor([float((r[2], r[3]) == (target, named)) for r in part])
                options = {"mask": chosen[:, None, None].expand(-1, 8, 8), "apply_to": "contrast", "end": 1.0}
                features = {target: strength}
                if method in ("swap", "falling", "local"):
                    sides = {target: strength} | ({named: -strength} if named in labels else {})
                    options |= {"clip": False} | ({"where": list(sides)} if method == "local" else {})
                    features = {
                        name: side if method == "swap" else partial(falling, side) for name, side in sides.items()
                    }
                elif method != "add" and named in labels:
                    options |= {"operation": method, "source": named}
                stack.enter_context(pipe.rtsae_steering(features, **options))
            images.append(generate(pipe, [r[0] for r in part], [r[1] for r in part], a.steps, a.guidance))
    return torch.cat(images)


def markdown(rows: list[dict]) -> str:
    """Success / leakage / valid of each factor, at each method's best strength."""
    factors = list(dict.fromkeys(r["factor"] for r in rows))
    lines = []
    for method in dict.fromkeys(r["method"] for r in rows):
        found = [best(r for r in rows if (r["factor"], r["method"]) == (factor, method)) for factor in factors]
        lines.append([method] + [f"{figures(r)} @{r['strength']:g}" for r in found])
    return table(["edit", *factors], lines)


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "scorer", "dictionary")
    parser.add_argument("--out", type=Path, default=Path("runs/hard.json"))
    parser.add_argument("--prompts", type=int, default=8, help="for each label")
    parser.add_argument("--strengths", nargs="*", action=Adding, type=float, default=[1.0, 1.25, 1.5])
    parser.add_argument("--methods", nargs="*", action=Adding, choices=METHODS, default=list(METHODS))
    a, world = parse(parser)
    pipe, scorer = load_models(a)
    dictionary = load_dictionary(a.dictionary)
    pipe.load_rtsae(dictionary)
    labels = dictionary.labels
    results = Results(a, [a.pipeline, a.dictionary], said_by_rows=("strengths", "methods"))
    targets = list(labels)
    probes = [
        world.probe(labels[name]["factor"], labels[name]["value"], "contradicted", a.prompts, seed=400)
        for name in targets
    ]
    plain = score(world, scorer, run(pipe, probes, None, a.steps, a.guidance, a.batch_size), probes)
    trials = [(method, strength) for method in a.methods for strength in a.strengths]
    for method, strength in tqdm(trials, unit="setting"):
        if results.has(method=method, strength=strength):
            continue
        steered = score(world, scorer, steer(pipe, probes, targets, labels, method, strength, a), probes)
        rows = []
        for factor in dict.fromkeys(label["factor"] for label in labels.values()):
            cells = [
                measure(steered[i], plain[i], factor, labels[name]["value"])
                for i, name in enumerate(targets)
                if labels[name]["factor"] == factor
            ]
            row = {"factor": factor, "method": method, "strength": strength, "n": len(cells) * a.prompts} | mean(cells)
            rows.append(row)
            print(row, flush=True)
        results.add(*rows)
    results.tell(markdown(results.rows))


if __name__ == "__main__":
    main()
