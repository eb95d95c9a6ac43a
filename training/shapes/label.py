"""Name the features of the bundled dictionary: found by selectivity in the collected trajectories, kept if they act.

    python -m training.shapes.label training/recipes/shapes.yaml --dictionary examples/shapes-rtsae

Every latent is scored against every factor value; for each value small sets of the most selective latents are steered
on prompts that leave the factor open, and the set that works is labelled. What does not pass gets no label.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from scipy.optimize import nnls
from tqdm import tqdm

from diffusers_rtsae import RTSAE, Dictionary, load_dictionary
from diffusers_rtsae.analysis.scorer import FactorScorer

from ..collect import anchor_timesteps, read_samples
from ..recipe import load_recipe
from ..store import TrajectoryStore
from ..train import open_store
from .evaluate import load_pipeline, read_objects
from .scenes import FACTORS, GLOBAL_FACTORS, PLACES, SIZES
from .steering import STEERED, TARGETS, measure, probe, run, score

SET_SIZES = (1, 2, 4, 8, 16)


def token_discs(side: int) -> dict[tuple[str, str], torch.Tensor]:
    """For each place and size the tokens `(side * side,)` bool that such an object covers."""
    axis = (torch.arange(side) + 0.5) * 64 / side
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return {
        (place, size): (((x - px) ** 2 + (y - py) ** 2).sqrt() < 1.1 * radius).flatten()
        for place, (px, py) in PLACES.items()
        for size, radius in SIZES.items()
    }


@torch.no_grad()
def selectivity(
    rtsae: RTSAE, store: TrajectoryStore, batch: int = 4096
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    Mean activation of every latent given each value: `{factor: (values, m)}`, over all tokens for global factors and
    over the object's tokens for its own; and the share of each latent's activations that lie on an object, `(m,)`.
    """
    count = rtsae.config.num_latents
    sums = {f: torch.zeros(len(FACTORS[f]), count) for f in STEERED}
    seen = {f: torch.zeros(len(FACTORS[f])) for f in STEERED}
    fired, fired_on_object = torch.zeros(count), torch.zeros(count)
    for path in tqdm(store.shards(), desc="selectivity", unit="shard"):
        image, token, readings = store.load_origin(path, rtsae.config.site)
        trajectories, first = store.load(path, rtsae.config.site), int(image[0])
        discs = token_discs(int((int(token.max()) + 1) ** 0.5))
        codes = {f: torch.full((len(image),), -1) for f in STEERED}
        on_object = torch.zeros(len(image), dtype=torch.bool)
        for i, reading in enumerate(readings):
            if reading["valid"] != "yes":
                continue
            here = (image == first + i).nonzero()[:, 0]
            for f in GLOBAL_FACTORS:
                codes[f][here] = FACTORS[f].index(reading[f])
            for seen_object in read_objects(reading):
                covered = here[discs[seen_object["place"], seen_object["size"]][token[here].long()]]
                on_object[covered] = True
                for f in ("colour", "shape", "size"):
                    codes[f][covered] = FACTORS[f].index(seen_object[f])
        for part in torch.arange(len(image)).split(batch):
            latents = rtsae.encode(trajectories[part].float())
            active = (latents > 0).float()
            fired += active.sum(0)
            fired_on_object += active[on_object[part]].sum(0)
            for f in STEERED:
                known = codes[f][part] >= 0
                sums[f].index_add_(0, codes[f][part][known], latents[known])
                seen[f] += torch.bincount(codes[f][part][known], minlength=len(seen[f]))
    means = {f: sums[f] / seen[f].clamp(min=1)[:, None] for f in STEERED}
    return means, fired_on_object / fired.clamp(min=1)


def object_latents(rtsae: RTSAE, on_object: torch.Tensor, precision: float = 0.9) -> list[int]:
    """Latents that fire on objects and hardly elsewhere: together they say where an object is."""
    good = (on_object >= precision) & (rtsae.density > 1e-4)
    return good.nonzero()[:, 0].tolist()


def candidates(rtsae: RTSAE, means: torch.Tensor, value: int, size: int) -> dict | None:
    """
    At most `size` latents, each at least three times as active where the value is as elsewhere, whose trajectories
    together come closest to the mean difference between the two: non-negative matching pursuit.
    """
    others = (means.sum(0) - means[value]) / (len(means) - 1)
    excess = means[value] - others
    selectivity = excess / (means[value] + others).clamp(min=1e-9)
    paths = (rtsae.feature_trajectories().detach() / rtsae.dynamics.scale[:, None]).flatten(1)
    difference, allowed = excess @ paths, selectivity >= 0.5
    chosen, amounts, left = [], torch.zeros(0), difference
    for _ in range(min(size, int(allowed.sum()))):
        gain = paths @ left / paths.norm(dim=1)
        gain[~allowed], gain[chosen] = -torch.inf, -torch.inf
        if gain.max() <= 0:
            break
        chosen.append(int(gain.argmax()))
        amounts, _ = nnls(paths[chosen].T.double().numpy(), difference.double().numpy())
        amounts = torch.from_numpy(amounts).float()
        left = difference - amounts @ paths[chosen]
    kept = [i for i, amount in enumerate(amounts) if amount > 0]
    if not kept:
        return None
    latents = [chosen[i] for i in kept]
    return {
        "site": rtsae.config.site,
        "latents": latents,
        "weights": [round(w, 4) for w in (amounts[kept] / rtsae.typical_activation[latents]).tolist()],
        "selectivity": round(selectivity[latents[0]].item(), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--dictionary", type=Path, default=Path("examples/shapes-rtsae"))
    parser.add_argument("--work", type=Path, default=Path("runs/shapes"))
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes the recipe was trained with"
    )
    parser.add_argument("--images", type=int, default=16, help="prompts a value is verified on")
    parser.add_argument("--strengths", nargs="*", type=float, default=[0.5, 1.0, 2.0])
    parser.add_argument("--set-sizes", nargs="*", type=int, default=list(SET_SIZES))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the pipeline")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    recipe = load_recipe(a.recipe, a.set)
    guidance = recipe.collect.guidance_scale
    pipe = load_pipeline(recipe.pipeline, a.device, recipe.dtype)
    scorer = FactorScorer.from_pretrained(recipe.scorer).to(a.device)
    samples, anchors = (
        read_samples(recipe.collect, recipe.seed),
        anchor_timesteps(pipe, recipe.collect, recipe.anchors),
    )
    store = open_store(recipe, a.work, samples, anchors, pipe)
    pipe.to(getattr(torch, a.dtype))
    dictionary = load_dictionary(a.dictionary, dtype=torch.float32)
    probes = [probe(factor, value, "open", a.images, seed=50) for factor, value in TARGETS]
    plain = score(scorer, run(pipe, probes, None, a.steps, guidance, a.batch_size), probes)
    base = {t: measure(p, p, *t) for p, t in zip(plain, TARGETS, strict=True)}

    best: dict[str, dict] = {}
    for site, rtsae in dictionary.sites.items():
        means, on_object = selectivity(rtsae, store)
        gate = object_latents(rtsae, on_object)
        print(f"{site}: {len(gate)} latents mark objects")
        for size in a.set_sizes:
            labels = {}
            for factor, value in TARGETS:
                entry = candidates(rtsae, means[factor], FACTORS[factor].index(value), size)
                if entry is None:
                    continue
                entry["where"] = None if factor in GLOBAL_FACTORS else gate
                labels[f"{factor}={value}"] = {"factor": factor, "value": value, "features": [entry], "edit": {}}
            pipe.load_rtsae(Dictionary({site: rtsae}, labels, dictionary.config))
            for strength in a.strengths:
                names = [f"{factor}={value}" for factor, value in TARGETS]
                strengths = [{name: strength} if name in labels else {} for name in names]
                images = run(pipe, probes, strengths, a.steps, guidance, a.batch_size, masks=False)
                for steered, was, (factor, value) in zip(score(scorer, images, probes), plain, TARGETS, strict=True):
                    measured = measure(steered, was, factor, value)
                    worth = measured["success"] - measured["leakage"]
                    if f"{factor}={value}" not in labels:
                        continue
                    if value not in best or worth > best[value]["worth"] + 0.03:  # a larger set must earn its place
                        label = labels[f"{factor}={value}"]
                        measured |= {
                            "strength": strength,
                            "unsteered": base[factor, value]["success"],
                            "prompts": a.images,
                        }
                        best[value] = label | {"measured": measured, "worth": worth}
                mean = {f: [best[v]["measured"]["success"] for v in FACTORS[f] if v in best] for f in STEERED}
                print(site, size, strength, {f: round(sum(v) / len(v), 3) for f, v in mean.items() if v}, flush=True)
            pipe.unload_rtsae()

    kept = {}
    for value, label in best.items():
        worth = label.pop("worth")
        passed = label["measured"]["success"] >= 0.5 and worth > label["measured"]["unsteered"] + 0.2
        print(f"{value:>10} {'labelled' if passed else 'not labelled'} {json.dumps(label['measured'])}")
        if passed:
            for entry in label["features"]:
                # strength 1 is where it was verified to work
                entry["weights"] = [round(w * label["measured"]["strength"], 4) for w in entry["weights"]]
            kept[value] = label
    stored = load_dictionary(a.dictionary)
    stored.labels = kept
    stored.save(a.dictionary)


if __name__ == "__main__":
    main()
