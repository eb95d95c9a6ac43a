"""Does ranking by effect put the latent with the largest effect first? All values of a world, by effect and by
presence.

    python -m training.experiments.ranking --out training/results/ranking.json

For each value `find_features` ranks all latents on pairs of prompts, by effect and by presence. The first ten of each
are then steered at strength 1 on other pairs and other noise, which gives their true effect. *Place* is the rank of
the latent with the largest true effect. Rows are added to the JSON as they are measured; the same command continues.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from tqdm import tqdm

from diffusers_rtsae import load_dictionary
from diffusers_rtsae.analysis.effect import States, adding
from diffusers_rtsae.analysis.find import find_features

from ..worlds.pictures import add_models, calling, load_pipeline, new_parser, parse
from .results import Results, table
from .steering import pairs

RANKINGS = ("effect", "presence")


def markdown(rows: list[dict]) -> str:
    """The latent with the largest effect for each value, and its place in both rankings."""
    lines = []
    for row in rows:
        places = [str(row["place"][by] or "–") for by in RANKINGS]
        lines.append([row["value"], str(row["best"]), f"{row['verified']:.3f}", *places, f"{row['seconds']:.0f}"])
    first = {by: sum(0 < row["place"][by] <= 3 for row in rows) for by in RANKINGS}
    summary = f"Of {len(rows)}: among the first three by effect {first['effect']}, by presence {first['presence']}.\n"
    heads = ["value", "latent", "its effect", "place by effect", "place by presence", "CPU seconds to rank by effect"]
    return table(heads, lines) + "\n" + summary


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "dictionary")
    parser.add_argument("--out", type=Path, default=Path("runs/ranking.json"))
    parser.add_argument("--pairs", type=int, default=12, help="to rank on; a third of them leave the factor open")
    parser.add_argument("--others", type=int, default=6, help="pairs to verify on")
    a, world = parse(parser)
    pipe = load_pipeline(a.pipeline, a.device, a.dtype)
    dictionary = load_dictionary(a.dictionary, dtype=torch.float32)
    pipe.load_rtsae(dictionary)
    results = Results(a, [a.pipeline, a.dictionary])
    call = calling(pipe, a)
    for factor, value in tqdm(world.targets, unit="value"):
        if results.has(value=value):
            continue
        count = a.pairs + a.others
        found, _ = pairs(
            world, factor, value, contradicted=count - count // 3, leave_open=count // 3, already=0, seed=7
        )
        negative, positive = zip(*found[: a.pairs], strict=True)
        ranked, seconds = {}, {}
        for by in RANKINGS:
            begun = time.process_time()
            ranked[by] = [(f.site, f.index) for f in find_features(pipe, positive, negative, by=by, seeds=1, **call)]
            seconds[by] = time.process_time() - begun
        states = States(pipe, found[a.pairs :], seed=1_000_000, **call)
        both = list(dict.fromkeys(ranked["effect"] + ranked["presence"]))
        measured = states.measure([adding(site, latent, states) for site, latent in both])
        effects = {found: float(one.effects.mean()) for found, one in zip(both, measured, strict=True)}
        best = max(effects, key=effects.get)
        place = {by: ranked[by].index(best) + 1 if best in ranked[by] else 0 for by in RANKINGS}
        row = {"factor": factor, "value": value, "best": best[1], "verified": round(effects[best], 4), "place": place}
        results.add(row | {"verified_all": len(effects), "seconds": round(seconds["effect"], 1)})
    results.tell(markdown(results.rows))


if __name__ == "__main__":
    main()
