"""Where can a denoiser be steered? The effect of the other prompt's activation at a block, and of a map fitted to it.

    python -m training.experiments.ceiling --world people --out training/results/people/ceiling.json

At each block (or at several modules at once, joined by +) and for each value, on held-out pairs of prompts: the
*ceiling*, which is the effect of putting the other prompt's activation itself there, and the effect of a linear map
as labels have it. No dictionary, no scorer and no picture is used. Rows are added to the JSON as they
are measured; the same command continues where it was stopped.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from tqdm import tqdm

from diffusers_rtsae import RTSAE, Dictionary, list_sites
from diffusers_rtsae.analysis.fit import fit_feature
from diffusers_rtsae.analysis.record import Recorder
from diffusers_rtsae.denoiser import get_denoiser

from ..commands import Adding
from ..worlds.pictures import add_models, calling, generate, load_pipeline, new_parser, parse
from .capacity import is_block
from .results import Results, table
from .steering import pairs


def markdown(rows: list[dict]) -> str:
    """Mean effect of the map / ceiling of each factor at each block."""
    factors = list(dict.fromkeys(row["factor"] for row in rows))
    lines = []
    for site in dict.fromkeys(row["site"] for row in rows):
        own = [row for row in rows if row["site"] == site]
        cells = []
        for factor in (*factors, None):
            of = [row for row in own if factor in (None, row["factor"])]
            means = [f"{statistics.mean(row[name] for row in of):.2f}" for name in ("map", "ceiling") if of]
            cells.append(" / ".join(means) or "–")
        lines.append([site.replace("+", " + "), *cells])
    return table(["where", *factors, "all"], lines)


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline")
    parser.add_argument("--out", type=Path, default=Path("runs/ceiling.json"))
    parser.add_argument(
        "--sites", nargs="*", action=Adding, help="every attention block by default; of several at once: a+b"
    )
    parser.add_argument("--values", type=int, default=2, help="how many of each factor, the first ones")
    parser.add_argument("--pairs", type=int, default=16, help="of prompts; a quarter of them leave the factor open")
    parser.add_argument("--rank", type=int, default=8, help="of the map")
    parser.add_argument("--anchors", type=int, default=3)
    a, world = parse(parser)
    pipe = load_pipeline(a.pipeline, a.device, a.dtype)
    places = a.sites or [site for site in list_sites(get_denoiser(pipe)) if is_block(site)]
    with Recorder(pipe, [site for place in places for site in place.split("+")]) as recorder:
        generate(pipe, [""], [0], a.steps, a.guidance)
    timesteps = [round(t) for t in recorder.timesteps]
    anchors = [timesteps[round(i * (len(timesteps) - 1) / (a.anchors - 1))] for i in range(a.anchors)]
    results = Results(a, [a.pipeline], said_by_rows=("sites", "values"))
    targets = [t for f in world.steered for t in [one for one in world.targets if one[0] == f][: a.values]]
    call = calling(pipe, a) | {"progress": False}
    for place in tqdm(places, unit="place"):
        widths = {site: recorder.trajectories(site).shape[-1] for site in place.split("+")}
        # untrained dictionaries: a map is fitted, which uses no latents
        pipe.load_rtsae(Dictionary({s: RTSAE(s, width, anchors, num_latents=8, k=1) for s, width in widths.items()}))
        for factor, value in targets:
            if results.has(site=place, value=value):
                continue
            some, same = pairs(world, factor, value, a.pairs - a.pairs // 4, a.pairs // 4, already=4, seed=3)
            measured = fit_feature(pipe, some, 1, same, a.rank, batch_size=a.batch_size, **call).measured
            row = {"site": place, "factor": factor, "value": value, "map": measured["effect"]}
            results.add(row | {name: measured[name] for name in ("ceiling", "lowest", "harm")})
        pipe.unload_rtsae()
    results.tell(markdown(results.rows))


if __name__ == "__main__":
    main()
