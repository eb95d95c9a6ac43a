"""Name the features of a world's dictionary: found by selectivity in the collected trajectories, kept if they act.

    python -m training.experiments.label training/recipes/shapes.yaml --dictionary examples/shapes-rtsae

Every latent is scored against every factor value; for each value small sets of the most selective latents are steered
on prompts that leave the factor open, with several strengths and options. The best few are tried again on other
prompts, and the best of these is labelled, with its options. What does not pass gets no label; a label that is there
already stays unless a better one is found.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from scipy.optimize import nnls
from tqdm import tqdm

from diffusers_rtsae import RTSAE, Dictionary, load_dictionary
from diffusers_rtsae.analysis.scorer import FactorScorer

from ..collect import anchor_timesteps, read_samples
from ..recipe import load_recipe
from ..store import TrajectoryStore
from ..train import open_store
from ..worlds import Probe, World
from ..worlds.pictures import add_models, load_pipeline, new_parser, parse
from .steering import measure, run, score

EDITS = tuple({"end": end, "apply_to": "cond"} for end in (0.7, 0.85, 1.0))  # options that are tried
LATENT_COST = 0.01  # what each further latent of a set must earn, in success minus leakage


@torch.no_grad()
def selectivity(
    world: World, rtsae: RTSAE, store: TrajectoryStore, batch: int = 4096
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    Mean activation of every latent given each value: `{factor: (values, m)}`, over all tokens for global factors and
    over the object's tokens for its own; and the share of each latent's activations that lie on an object, `(m,)`.
    """
    count = rtsae.config.num_latents
    factors = {f: world.factors[f] for f in world.steered}
    sums = {f: torch.zeros(len(values), count) for f, values in factors.items()}
    seen = {f: torch.zeros(len(values)) for f, values in factors.items()}
    fired, fired_on_object = torch.zeros(count), torch.zeros(count)
    for path in tqdm(store.shards(), desc="selectivity", unit="shard"):
        image, token, readings = store.load_origin(path, rtsae.config.site)
        trajectories, first = store.load(path, rtsae.config.site), int(image[0])
        side = int((int(token.max()) + 1) ** 0.5)
        codes = {f: torch.full((len(image),), -1) for f in factors}
        on_object = torch.zeros(len(image), dtype=torch.bool)
        for i, reading in enumerate(readings):
            if reading["valid"] != "yes":
                continue
            here = (image == first + i).nonzero()[:, 0]
            for f in factors.keys() - {*world.local}:
                codes[f][here] = factors[f].index(reading[f])
            for one in world.objects(reading):
                covered = here[world.masks([one], side).flatten().bool()[token[here].long()]]
                on_object[covered] = True
                for f in factors.keys() & {*world.local}:
                    codes[f][covered] = factors[f].index(one[f])
        for part in torch.arange(len(image)).split(batch):
            latents = rtsae.encode(trajectories[part].float())
            active = (latents > 0).float()
            fired += active.sum(0)
            fired_on_object += active[on_object[part]].sum(0)
            for f in factors:
                known = codes[f][part] >= 0
                sums[f].index_add_(0, codes[f][part][known], latents[known])
                seen[f] += torch.bincount(codes[f][part][known], minlength=len(seen[f]))
    means = {f: sums[f] / seen[f].clamp(min=1)[:, None] for f in factors}
    return means, fired_on_object / fired.clamp(min=1)


def object_latents(rtsae: RTSAE, on_object: torch.Tensor, precision: float = 0.97) -> list[int]:
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


def judge(
    world: World,
    pipe: DiffusionPipeline,
    scorer: FactorScorer,
    dictionary: Dictionary,
    trials: list[dict | None],
    probes: list[Probe],
    plain: list[list[dict]],
    a: argparse.Namespace,
) -> list[dict[str, float]]:
    """
    What one trial label for each probe does at strength 1 on its prompts, as `measure` says; with `unsteered`, how
    often the value is there anyway.
    """
    names = [f"{one.factor}={one.value}" for one in probes]
    labels = {name: label for name, label in zip(names, trials, strict=True) if label}
    pipe.load_rtsae(Dictionary(dictionary.sites, labels, dictionary.config))
    strengths = [{name: 1.0} if name in labels else {} for name in names]
    images = run(pipe, probes, strengths, a.steps, a.guidance, a.batch_size, masks=False)
    pipe.unload_rtsae()
    return [
        measure(now, was, one.factor, one.value) | {"unsteered": measure(was, was, one.factor, one.value)["success"]}
        for now, was, one in zip(score(world, scorer, images, probes), plain, probes, strict=True)
    ]


def worth(label: dict, measured: dict[str, float]) -> float:
    latents = sum(len(entry["latents"]) for entry in label["features"])
    return measured["success"] - measured["leakage"] - LATENT_COST * latents


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "dictionary", "scorer")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--work", type=Path, help="of the training; runs/<world> by default")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes the recipe was trained with"
    )
    parser.add_argument("--values", nargs="*", help="that are to be labelled; all by default")
    parser.add_argument("--set-sizes", nargs="*", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--strengths", nargs="*", type=float, default=[1.0, 1.5, 2.0])
    parser.add_argument("--images", type=int, default=8, help="prompts on which each trial is made")
    parser.add_argument("--finalists", type=int, default=4, help="trials of a value that are made again")
    parser.add_argument("--final-images", type=int, default=32, help="other prompts, which decide between those")
    a, world = parse(parser)
    recipe = load_recipe(a.recipe, a.set)
    pipe = load_pipeline(recipe.pipeline, a.device, recipe.dtype)
    scorer = FactorScorer.from_pretrained(a.scorer).to(a.device)
    samples = read_samples(recipe.collect, recipe.seed)
    anchors = anchor_timesteps(pipe, recipe.collect, recipe.anchors)
    store = open_store(recipe, a.work or Path("runs") / a.world, samples, anchors, pipe)
    pipe.to(getattr(torch, a.dtype))
    dictionary = load_dictionary(a.dictionary, dtype=torch.float32)

    targets = [target for target in world.targets if a.values is None or target[1] in a.values]

    def open_prompts(count: int, seed: int) -> tuple[list[Probe], list[list[dict]]]:
        probes = [world.probe(factor, value, "open", count, seed) for factor, value in targets]
        return probes, score(world, scorer, run(pipe, probes, None, a.steps, a.guidance, a.batch_size), probes)

    prompts = open_prompts(a.images, seed=50)
    tried: list[list[tuple[float, dict]]] = [[] for _ in targets]  # for each target worth and label of each trial
    for site, rtsae in dictionary.sites.items():
        means, on_object = selectivity(world, rtsae, store)
        gate = object_latents(rtsae, on_object)
        print(f"{site}: {len(gate)} latents mark objects")
        for size, edit, strength in itertools.product(a.set_sizes, EDITS, a.strengths):
            trials = []
            for factor, value in targets:
                entry = candidates(rtsae, means[factor], world.factors[factor].index(value), size)
                if entry:
                    entry["weights"] = [round(w * strength, 4) for w in entry["weights"]]
                    entry["where"] = gate if factor in world.local else None
                trials.append(entry and {"factor": factor, "value": value, "features": [entry], "edit": edit})
            told: dict[str, list[float]] = {}
            results = judge(world, pipe, scorer, dictionary, trials, *prompts, a)
            for found, label, measured in zip(tried, trials, results, strict=True):
                if label:
                    found.append((worth(label, measured), label))
                    told.setdefault(label["factor"], []).append(found[-1][0])
            mean = {factor: round(sum(v) / len(v), 3) for factor, v in told.items()}
            print(f"{site}, at most {size} latents, {edit}, strength {strength}: {mean}", flush=True)

    prompts = open_prompts(a.final_images, seed=51)
    best: list[tuple[float, dict] | None] = [None] * len(targets)
    ranked = [[label for _, label in sorted(found, key=lambda t: -t[0])] for found in tried]
    for rank in range(a.finalists):
        trials = [labels[rank] if rank < len(labels) else None for labels in ranked]
        results = judge(world, pipe, scorer, dictionary, trials, *prompts, a)
        for i, (label, measured) in enumerate(zip(trials, results, strict=True)):
            if label and (best[i] is None or worth(label, measured) > best[i][0]):
                best[i] = worth(label, measured), label | {"measured": measured | {"prompts": a.final_images}}

    stored = load_dictionary(a.dictionary)
    for found_worth, label in (found for found in best if found):
        measured, old = label["measured"], stored.labels.get(label["value"])
        if old and worth(old, old["measured"]) >= found_worth:
            continue
        gain = measured["success"] - measured["leakage"] - measured["unsteered"]
        passed = measured["success"] >= 0.5 and gain > 0.2
        print(
            f"{label['value']:>10} {'labelled' if passed else 'not labelled'} {label['edit']} {json.dumps(measured)}"
        )
        if passed:
            stored.labels[label["value"]] = label
    stored.labels = {value: stored.labels[value] for _, value in world.targets if value in stored.labels}
    stored.save(a.dictionary)


if __name__ == "__main__":
    main()
