"""Dose and response: each label at each strength on prompts that leave it open, and at −1 where they name it.

Beside the share of pictures that show a value it measures the *margin*, by which the scorer's logit of the value
exceeds the largest logit of another value, at the object's place; and the *jump*, the largest part of a picture's way
from strength 0 to strength 1 that lies between two neighbouring strengths. Four equal steps have a quarter each.

    python -m training.experiments.dose --out training/results/dose.json

`--strip` draws labels between 0 and 1 as well, on the first of their prompts that name another value.
Rows are added to the JSON as they are measured; the same command continues where it was stopped.
"""

from __future__ import annotations

from pathlib import Path

import torch
from scipy.stats import spearmanr
from tqdm import tqdm

from diffusers_rtsae import load_dictionary
from diffusers_rtsae.analysis.plots import plot_strengths
from diffusers_rtsae.analysis.scorer import FactorScorer

from ..commands import Adding
from ..worlds import Probe, World
from ..worlds.pictures import add_models, load_models, new_parser, parse
from .results import Results, table
from .steering import measure, run, score

STRENGTHS = (-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
BETWEEN = [s for s in STRENGTHS if 0 <= s <= 1]
ON = 3  # prompts of a strip


@torch.no_grad()
def margin(world: World, scorer: FactorScorer, images: torch.Tensor, probe: Probe) -> float:
    """The mean margin of a probe's value in the pictures of its prompts."""
    logits, margins = scorer(images.to(scorer.device)), []
    for i, scene in enumerate(probe.scenes):
        name = world.read_as(probe.factor, scene)
        code = scorer.factors[name].index(probe.value)
        of_values = logits[name][i]
        margins.append(float(of_values[code] - torch.cat([of_values[:code], of_values[code + 1 :]]).max()))
    return sum(margins) / len(margins)


def jump(images: list[torch.Tensor]) -> float | None:
    """The median over pictures of the largest part of the way from the first to the last of `images`, each `(n, 3,
    height, width)`, that lies between two neighbours; `None` if there are no pictures."""
    if not len(images[0]):
        return None
    whole = (images[-1] - images[0]).flatten(1)
    way = torch.stack([((one - images[0]).flatten(1) * whole).sum(1) for one in images]) / whole.square().sum(1)
    return round(float(way.diff(dim=0).abs().amax(0).median()), 4)


def markdown(rows: list[dict]) -> str:
    """The share of pictures that show a value at each strength, how monotone that share and the margin are, and how
    often strength −1 removes the value."""
    lines, rising, gone, valid = [], 0, 0, 0
    jumps = any("jump" in row for row in rows)
    for label in dict.fromkeys(row["label"] for row in rows):
        own = {row["strength"]: row for row in rows if row["label"] == label and not row["named"]}
        named = next(row for row in rows if row["label"] == label and row["named"])
        shares = [own[s]["success"] for s in STRENGTHS]
        orders = [float(spearmanr(STRENGTHS, v).statistic) for v in (shares, [own[s]["margin"] for s in STRENGTHS])]
        rising, gone, valid = (
            rising + (orders[1] >= 0.9),
            gone + (named["gone"] >= 0.8),
            valid + (own[2.0]["valid"] >= 0.95),
        )
        away = f"{named['gone']:.2f} / {named['valid']:.2f}"
        cells = [f"{own[2.0]['valid']:.2f}", away]
        if jumps:
            cells.append("–" if named["jump"] is None else f"{named['jump']:.2f}")
        lines.append([label, *(f"{v:.2f}" for v in (*shares, *orders)), *cells])
    heads = [
        "label",
        *(f"{s:g}" for s in STRENGTHS),
        "Spearman",
        "of the margin",
        "valid at 2",
        "named, −1: gone / valid",
        *(["jump"] if jumps else []),
    ]
    count = len(lines)
    summary = f"Of {count}: Spearman of the margin ≥ 0.9 for {rising}, valid at 2 ≥ 0.95 for {valid}, "
    summary += f"gone at −1 ≥ 0.8 for {gone}.\n"
    return table(heads, lines) + "\n" + summary


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "scorer", "dictionary")
    parser.add_argument("--out", type=Path, default=Path("runs/dose.json"))
    parser.add_argument("--prompts", type=int, default=16, help="for each label")
    parser.add_argument(
        "--strip", nargs="+", action=Adding, default=[], metavar="LABEL", help="to draw to a PNG beside the JSON"
    )
    a, world = parse(parser)
    pipe, scorer = load_models(a)
    dictionary = load_dictionary(a.dictionary, dtype=torch.float32)
    pipe.load_rtsae(dictionary)
    results = Results(a, [a.pipeline, a.dictionary], said_by_rows=("strip",))
    for name, label in tqdm(dictionary.labels.items(), unit="label"):
        if results.has(label=name):
            continue
        factor, value = label["factor"], label["value"]
        probe = world.probe(factor, value, "open", a.prompts, seed=600)

        def seen(strength: float, prompts=None, probe=probe, name=name) -> tuple[list[dict], float, torch.Tensor]:
            strengths = [{name: strength}] if strength else None
            how = {"masks": False, "prompts": prompts}
            images = run(pipe, [probe], strengths, a.steps, a.guidance, a.batch_size, **how)
            return score(world, scorer, images, [probe])[0], margin(world, scorer, images, probe), images

        found = {strength: seen(strength) for strength in STRENGTHS}
        plain, rows = found[0.0][0], []
        for strength, (now, above, _) in found.items():
            row = {"label": name, "named": False, "strength": strength, "margin": round(above, 3)}
            rows.append(row | measure(now, plain, factor, value))
        (named, *_), (away, *_) = seen(0.0, [probe.prompted]), seen(-1.0, [probe.prompted])
        turned = [i for i, one in enumerate(plain) if one[factor] != value == found[1.0][0][i][factor]]
        showed = [i for i, one in enumerate(named) if one[factor] == value]
        rows.append(
            {"label": name, "named": True, "strength": -1.0}
            | measure(away, named, factor, value)
            | {"gone": sum(away[i][factor] != value for i in showed) / max(1, len(showed))}
            | {"jump": jump([found[s][2][turned] for s in BETWEEN])}
        )
        results.add(*rows)
    results.tell(markdown(results.rows))
    rows = []
    for name in a.strip:
        probe = world.probe(dictionary.labels[name]["factor"], dictionary.labels[name]["value"], "contradicted", ON, 0)
        draw = [run(pipe, [probe], [{name: s}], a.steps, a.guidance, a.batch_size, masks=False) for s in BETWEEN]
        images = torch.stack(draw, 1).permute(0, 1, 3, 4, 2).numpy()
        rows += [(name, prompt, own) for prompt, own in zip(probe.prompts, images, strict=True)]
    if rows:
        plot_strengths(rows, BETWEEN, "From nothing to all there").savefig(a.out.with_suffix(".png"), dpi=90)


if __name__ == "__main__":
    main()
