"""The paper's comparison on a world: which kind of dictionary reconstructs best, is stable over seeds, and steers?

    python -m training.train training/recipes/arms.yaml --out runs/arms
    python -m training.experiments.arms --dictionaries runs/arms --out training/results/arms.json

Steering follows RIEBench's protocol: features are chosen on pairs of prompts that differ in one value, and used on
other prompts that name the first value. They are chosen in two ways. `activation`: the latents whose mean activation
differs most between the two pictures, moved by that difference. `effect`: the latents with the largest first-order
effect on the prediction for the length of what they add, weighed in proportion to it; together they are as long as the
change of the activation with the prompt, the same for all dictionaries. *Gain* is the share of pictures that show the
second value only with steering, *distance* how far the pictures moved relative to the edited prompt's, *efficiency*
gain over distance. All is repeated with a sampler and a number of steps that no dictionary was trained on. Rows are
added to the JSON as they are measured; the same command continues where it was stopped.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from diffusers_rtsae import Dictionary, SparseDictionary, load_dictionary
from diffusers_rtsae.analysis.effect import Intervention, States, frozen
from diffusers_rtsae.analysis.record import Recorder
from diffusers_rtsae.analysis.scorer import FactorScorer

from ..commands import Adding
from ..evaluation.replacement import recovered
from ..worlds import Probe, World
from ..worlds.pictures import add_models, calling, generate, load_models, new_parser, parse
from .constants import Slope, as_label, axes, effect_features
from .results import Results, add_stability, dictionaries_in, spread, table
from .samplers import samplers_of, scheduler
from .steering import mean, measure, run, score, tokens_on

FIGURES = {
    "fvu_teacher_forced": "FVU teacher-forced",
    "fvu_online": "FVU rolled out",
    "l0_threshold": "active latents",
    "dead": "dead",
    "recovered_teacher_forced": "noise prediction recovered",
    "recovered_online": "the same, rolled out",
}
STEERING = ("success", "leakage", "valid", "gain", "distance", "efficiency")
CHOICES = ("activation", "effect")  # how features are chosen


@torch.no_grad()
def pair_trajectories(pipe, site: str, anchors: list[int], probes: list[Probe], a) -> list[torch.Tensor]:
    """For each probe the trajectories of its own prompts and of the edited ones, `(2, prompts, tokens, G, d)`."""
    texts = [t for one in probes for t in one.prompts], [t for one in probes for t in one.prompted]
    seeds, recorded = [s for one in probes for s in one.seeds], ([], [])
    for side, prompts in enumerate(texts):
        for start in range(0, len(seeds), a.batch_size):
            part = slice(start, start + a.batch_size)
            with Recorder(pipe, [site], anchors) as recorder:
                generate(pipe, prompts[part], seeds[part], a.steps, a.guidance)
            recorded[side].append(recorder.trajectories(site).float())
    both = torch.stack([torch.cat(side) for side in recorded])
    return list(both.split([len(one.prompts) for one in probes], dim=1))


@torch.no_grad()
def pair_features(
    sae: SparseDictionary, pairs: list[torch.Tensor], probes: list[Probe], count: int
) -> dict[str, dict]:
    """Labels: for each target the `count` latents that differ most between its pairs of pictures, and by how much."""
    length = (sae.feature_trajectories() / sae.spread[:, None]).flatten(1).norm(dim=1)
    labels = {}
    for one, both in zip(probes, pairs, strict=True):
        where = tokens_on(one.mask, int(both.shape[2] ** 0.5))
        before, after = (sae.encode(side[where]).mean(0) for side in both)
        difference = after - before
        chosen = (difference.abs() * length).topk(count).indices
        weights = difference[chosen] / sae.typical_activation[chosen]
        labels[f"{one.factor}={one.value}"] = as_label(sae, one.factor, one.value, chosen, weights)
    return labels


def slopes(pipe, like: SparseDictionary, probes: list[Probe], a) -> list[Slope]:
    """The slope of each probe, for additions to all tokens."""
    pipe.load_rtsae(axes(like))
    found = []
    for one in tqdm(probes, desc="effect", unit="target"):
        pairs = list(zip(one.prompts, one.prompted, strict=True))
        states = States(pipe, pairs, **calling(pipe, a))
        with frozen(pipe):
            found.append(Slope.of(Intervention({}, states)))
    pipe.unload_rtsae()
    return found


class Trial:
    """The same prompts drawn with one sampler: plainly, with the edited prompts, and with steering."""

    def __init__(self, world: World, pipe, scorer: FactorScorer, probes: list[Probe], scheduler, steps: int, a):
        self.world, self.pipe, self.scorer, self.probes, self.scheduler, self.steps, self.a = (
            world, pipe, scorer, probes, scheduler, steps, a,
        )  # fmt: skip
        self.plain_images = self._run(None)
        edited = self._run(None, [one.prompted for one in probes])
        self.plain = score(world, scorer, self.plain_images, probes)
        self.reach = self._distance(edited)

    def _run(self, strengths, prompts=None) -> torch.Tensor:
        before, self.pipe.scheduler = self.pipe.scheduler, self.scheduler
        options = {} if strengths is None else {"clip": False}
        try:
            return run(
                self.pipe, self.probes, strengths, self.steps, self.a.guidance, self.a.batch_size, prompts, **options
            )
        finally:
            self.pipe.scheduler = before

    def _distance(self, images: torch.Tensor) -> float:
        return (images - self.plain_images).square().mean((1, 2, 3)).sqrt().mean().item()

    def figures(self, labels: dict[str, dict], strength: float) -> dict[str, float]:
        """Figures at one strength, averaged over all targets."""
        images = self._run([{name: strength} for name in labels])
        steered = score(self.world, self.scorer, images, self.probes)
        trios = list(zip(steered, self.plain, self.probes, strict=True))
        cells = [measure(now, was, one.factor, one.value) for now, was, one in trios]
        before = [measure(was, was, one.factor, one.value)["success"] for _, was, one in trios]
        gain = sum(cell["success"] for cell in cells) / len(cells) - sum(before) / len(before)
        distance = self._distance(images) / self.reach
        found = {"gain": gain, "distance": distance, "efficiency": gain / distance}
        return {"strength": strength} | mean(cells) | {key: round(value, 4) for key, value in found.items()}


def markdown(rows: list[dict]) -> str:
    """Mean ± standard deviation over the seeds of each kind: how well it reconstructs, and for each choice of features
    how it steers at its most efficient strength. The last two columns are with another sampler, where each seed has
    its own strength."""
    described, steered = [], []
    for kind in dict.fromkeys(r["kind"] for r in rows):
        own = list({r["dictionary"]: r for r in rows if r["kind"] == kind}.values())
        stable = f"{own[0]['stability']:.3f}" if "stability" in own[0] else "–"
        described.append([kind, str(len(own)), *(spread([r[key] for r in own]) for key in FIGURES), stable])
    for kind, choice in dict.fromkeys((r["kind"], r["choice"]) for r in rows):
        own = [r for r in rows if (r["kind"], r["choice"]) == (kind, choice)]
        strengths = dict.fromkeys(s["strength"] for r in own for s in r["steering"])

        def at(strength, key, own=own):
            return [s[key] for r in own for s in r["steering"] if s["strength"] == strength]

        best = max(strengths, key=lambda s: statistics.mean(at(s, "efficiency")))
        cells = [at(best, key) for key in STEERING]
        cells += [[r["elsewhere"][key] for r in own] for key in ("success", "efficiency")]
        steered.append([kind, choice, f"{best:g}", *map(spread, cells)])
    heads = ["dictionary", "by", "strength", *STEERING, "success elsewhere", "efficiency elsewhere"]
    describing = table(["dictionary", "seeds", *FIGURES.values(), "same in another seed"], described)
    return describing + "\n" + table(heads, steered)


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "scorer")
    parser.add_argument(
        "--dictionaries", type=Path, default=Path("runs/arms"), help="folder of `<kind>-<seed>` folders"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/arms.json"))
    parser.add_argument("--pairs", type=int, default=4, help="that choose the features of a target, and to steer")
    parser.add_argument("--features", type=int, default=8)
    parser.add_argument("--strengths", nargs="*", action=Adding, type=float, default=[0.5, 1.0, 2.0, 3.0])
    a, world = parse(parser)
    pipe, scorer = load_models(a)
    folders = dictionaries_in(a.dictionaries, "arms")
    results = Results(a, [a.pipeline, *folders], elsewhere=str(samplers_of(pipe).elsewhere))
    rows = results.rows
    choose = [world.probe(*target, "contradicted", a.pairs, seed=500) for target in world.many_valued]
    steer = [world.probe(*target, "contradicted", a.pairs, seed=501) for target in world.many_valued]
    sampler, steps = samplers_of(pipe).elsewhere
    here = Trial(world, pipe, scorer, steer, pipe.scheduler, a.steps, a)
    elsewhere = Trial(world, pipe, scorer, steer, scheduler(pipe, sampler), steps, a)
    pairs, gradients, saes = {}, {}, {}  # trajectories and slopes by anchors, dictionaries by name
    for folder in tqdm(folders, unit="dictionary"):
        dictionary = load_dictionary(folder, dtype=torch.float32)
        ((site, sae),) = dictionary.sites.items()
        saes[folder.name] = sae
        missing = [choice for choice in CHOICES if not results.has(dictionary=folder.name, choice=choice)]
        if not missing:
            continue
        anchors = tuple(sae.config.anchors)
        if anchors not in pairs:
            pairs[anchors] = pair_trajectories(pipe, site, list(anchors), choose, a)
            gradients[anchors] = slopes(pipe, sae, choose, a)
        row = {"dictionary": folder.name, "kind": folder.name.rpartition("-")[0]} | dictionary.config["metrics"][site]
        prompts = world.describe(choose[0].scenes, 0)
        generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
        row |= recovered(pipe, sae, prompts, generators, **calling(pipe, a))
        for choice in missing:
            if choice == "activation":
                labels = pair_features(sae, pairs[anchors], choose, a.features)
            else:
                labels = effect_features(sae, gradients[anchors], world.many_valued, a.features)
            pipe.load_rtsae(Dictionary({site: sae}, labels, dictionary.config))
            steering = [here.figures(labels, strength) for strength in a.strengths]
            best = max(steering, key=lambda figures: figures["efficiency"])["strength"]
            measured = {"choice": choice, "steering": steering, "elsewhere": elsewhere.figures(labels, best)}
            pipe.unload_rtsae()
            results.add(row | measured)
            print(folder.name, choice, steering, flush=True)
    add_stability(rows, saes)
    results.write()
    results.tell(markdown(rows))


if __name__ == "__main__":
    main()
