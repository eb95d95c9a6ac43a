"""Can this model be steered at all, and where? Difference-of-means directions at every site, judged by the scorer.

    python -m training.experiments.capacity --pipeline examples/shapes-sd --out training/results/capacity.json

Rows are added to the JSON as they are measured. The same command, also with more sites or strengths, adds those that
are missing.
"""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from diffusers_rtsae import list_sites
from diffusers_rtsae.denoiser import get_denoiser

from ..commands import Adding
from ..worlds import KINDS
from ..worlds.pictures import add_models, load_models, new_parser, parse
from .results import Results, table
from .steering import difference_of_means, mean, measure, run, score


def is_block(site: str) -> bool:
    """Whether a site is a whole attention block of a U-Net, or a block of a transformer."""
    folder = site.rpartition(".")[0]
    return folder.endswith("attentions") or folder == "transformer_blocks"


def markdown(rows: list[dict]) -> str:
    """Success / mean leakage of each factor at each site, at the best of the strengths and guidance branches."""
    factors = [key for key, value in rows[0].items() if isinstance(value, dict)]

    def best(site: str, kind: str, factor: str) -> str:
        cells = [r[factor] for r in rows if (r["sites"], r["prompts"]) == (site, kind)]
        if not cells:
            return "–"
        top = max(cells, key=lambda cell: cell["success"] - cell["leakage_mean"])
        return f"{top['success']:.2f} / {top['leakage_mean']:.2f}"

    lines = []
    for site in dict.fromkeys(r["sites"] for r in rows):
        for kind in dict.fromkeys(r["prompts"] for r in rows if r["sites"] == site):
            lines.append([site, kind, *(best(site, kind, factor) for factor in factors)])
    return table(["site", "prompts", *factors], lines)


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "scorer")
    parser.add_argument("--out", type=Path, default=Path("runs/capacity.json"))
    parser.add_argument(
        "--sites",
        nargs="*",
        action=Adding,
        help="sites, or sets of sites joined by +; every attention block by default",
    )
    parser.add_argument("--strengths", nargs="*", action=Adding, type=float, default=[1.0, 2.0, 4.0])
    parser.add_argument("--apply-to", nargs="*", action=Adding, default=["cond", "contrast"])
    parser.add_argument("--kinds", nargs="*", action=Adding, choices=KINDS, default=list(KINDS))
    parser.add_argument("--images", type=int, default=16, help="prompts for each target value")
    parser.add_argument("--samples", type=int, default=512, help="pictures behind the means")
    a, world = parse(parser)
    pipe, scorer = load_models(a)
    sets = a.sites or [site for site in list_sites(get_denoiser(pipe)) if is_block(site)]
    sites = list(dict.fromkeys(site for group in sets for site in group.split("+")))
    pipe.load_rtsae(difference_of_means(world, pipe, sites, a.samples, a.steps, a.guidance, a.batch_size))
    results = Results(a, [a.pipeline], said_by_rows=("sites", "strengths", "apply_to", "kinds"))
    trials = [("none", 0.0, "")]
    trials += [(group, strength, apply_to) for group in sets for strength in a.strengths for apply_to in a.apply_to]
    for kind in a.kinds:
        probes = [world.probe(factor, value, kind, a.images, seed=0) for factor, value in world.targets]
        plain = score(world, scorer, run(pipe, probes, None, a.steps, a.guidance, a.batch_size), probes)
        for group, strength, apply_to in tqdm(trials, desc=kind, unit="setting"):
            row = {"prompts": kind, "sites": group, "strength": strength, "apply_to": apply_to}
            if results.has(**row):
                continue
            steered = plain
            if group != "none":
                strengths = [{(site, t): strength for site in group.split("+")} for t in range(len(world.targets))]
                images = run(pipe, probes, strengths, a.steps, a.guidance, a.batch_size, apply_to=apply_to, clip=False)
                steered = score(world, scorer, images, probes)
            for factor in world.steered:
                pairs = zip(steered, plain, world.targets, strict=True)
                row[factor] = mean([measure(s, p, f, value) for s, p, (f, value) in pairs if f == factor])
            results.add(row)
            found = [f"{f} {row[f]['success']:.2f}/{row[f]['leakage_mean']:.2f}" for f in world.steered]
            print(kind, group, strength, apply_to, *found, flush=True)
    results.tell(markdown(results.rows))


if __name__ == "__main__":
    main()
