"""One table of kinds: how well does each reconstruct, recur over seeds, separate factors and steer, and what does it
cost?

    python -m training.train training/recipes/kinds.yaml --out runs/kinds
    python -m training.experiments.kinds --dictionaries runs/kinds --out training/results/kinds.json

Every dictionary is measured on the same pictures: what the denoiser predicts and draws from reconstructions
(`replaced`), absorption, probes, steering with the 16 latents of largest effect, and time. Figures are added to the
JSON as they are measured; the same command continues where it was stopped.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from tqdm import tqdm

from diffusers_rtsae import Dictionary, MixtureSAE, SparseDictionary, load_dictionary
from diffusers_rtsae.analysis.effect import State, States, frozen
from diffusers_rtsae.analysis.names import LEAST_CONFIDENCE, name_features
from diffusers_rtsae.analysis.scorer import FactorScorer
from diffusers_rtsae.files import read_lines
from diffusers_rtsae.models import LinearDynamics, interpolate
from diffusers_rtsae.worlds import WORLDS, bundled

from ..commands import Adding
from ..evaluation.replacement import Reconstructing, recovered
from ..loop.trainer import DictionaryTrainer, new_dictionary
from ..recipe import Recipe
from ..worlds import KINDS, Probe, World
from ..worlds.pictures import add_models, calling, generate, load_models, new_parser, parse
from .absorption import mean_absorption
from .constants import Slope, axes, concern, concerned, effect_features
from .names import Pictures, judged, population, share_right
from .probes import Seen, accuracies, activations, codes, look, pooled
from .results import Results, add_stability, dictionaries_in, spread, table
from .samplers import samplers_of, scheduler
from .steering import mean, measure, pairs, run, score

LATENTS = 16  # that steer
STRENGTHS = (0.12, 0.25, 0.5, 1.0, 2.0)
RAW = "raw activation"
SHARED = "same in another seed"  # one figure for all seeds of a kind
PREDICTED = 32  # prompts on which single predictions are made from reconstructions
SEED = 502  # of the prompts that are steered
DRAWN = 71_000_000  # of the pictures that are drawn from reconstructions


class Measures:
    """
    All measures of a dictionary, and the pictures and targets that all dictionaries share.

    Args:
        like (`SparseDictionary`): any of the dictionaries; all are of one site and have the same anchors.
    """

    def __init__(self, world: World, pipe, scorer: FactorScorer, like: SparseDictionary, a):
        self.world, self.pipe, self.scorer, self.like, self.a = world, pipe, scorer, like, a
        self.call = calling(pipe, a)

    @cached_property
    def seen(self) -> dict[str, Seen]:
        """Pictures that probes are fitted to, and others to measure accuracy on, with two samplers."""
        a, of = self.a, (self.world, self.pipe, self.scorer, self.like)
        found = {"labelled": look(*of, a.labelled, False, a.steps, a), "here": look(*of, a.judged, True, a.steps, a)}
        sampler, steps = samplers_of(self.pipe).elsewhere
        before = self.pipe.scheduler
        self.pipe.scheduler = scheduler(self.pipe, sampler)
        try:
            return found | {"elsewhere": look(*of, a.judged, True, steps, a, anchors=False)}
        finally:
            self.pipe.scheduler = before

    def _draw(self) -> torch.Tensor:
        """Pictures of held-out scenes."""
        scenes = self.world.sample(self.a.replaced, seed=DRAWN, held_out=True)
        seeds = range(DRAWN, DRAWN + len(scenes))
        return generate(self.pipe, self.world.describe(scenes, 0), seeds, self.a.steps, self.a.guidance)

    @cached_property
    def drawn(self) -> torch.Tensor:
        return self._draw()

    @torch.no_grad()
    def replaced(self, sae: SparseDictionary) -> dict:
        """How much of single predictions is recovered from reconstructions; and of pictures that are drawn from them,
        how many factors read the same and how far the pictures moved."""
        plain = self.drawn
        with Reconstructing(self.pipe, sae):
            images = self._draw()
        read = [[self.world.seen(one) for one in self.scorer.read(some)] for some in (plain, images)]
        same = [statistics.mean(a[factor] == b[factor] for factor in a) for a, b in zip(*read, strict=True)]
        prompts = self.world.describe(self.world.sample(PREDICTED, seed=DRAWN, held_out=True), 0)
        generators = [torch.Generator().manual_seed(DRAWN + i) for i in range(len(prompts))]
        return recovered(self.pipe, sae, prompts, generators, **self.call) | {
            "agreement": round(statistics.mean(same), 4),
            "distance": round(perceptual_distance(self.scorer, plain, images), 5),
        }

    def absorbed(self, sae: SparseDictionary) -> dict:
        seen, count = self.seen["labelled"], self.a.absorbed
        few = seen._replace(trajectories=seen.trajectories[:count], scenes=seen.scenes[:count])
        return mean_absorption(sae, few, self.world)

    def probed(self, sae: SparseDictionary | None) -> dict:
        """Accuracies of probes of a dictionary's codes, or of the raw activation if there is no dictionary."""

        def with_codes(read, width: int, *judged: str) -> dict:
            found = {name: (pooled(self.seen[name], read, width), self.seen[name].scenes) for name in judged}
            labelled = pooled(self.seen["labelled"], read, width), self.seen["labelled"].scenes
            shares = accuracies(*labelled, found, self.world.factors)
            return {name: {str(n): value for n, value in by.items()} for name, by in shares.items()}  # as JSON has it

        if sae is None:
            return {"probes": with_codes(activations, self.like.config.in_channels, "here", "elsewhere")}
        width = sae.config.num_latents
        found = with_codes(codes(sae), width, "here", "elsewhere")
        if isinstance(sae, MixtureSAE):
            found["untold"] = with_codes(codes(sae, told=False), width, "here")["here"]
        return {"probes": found}

    @cached_property
    def targets(self) -> list[Target]:
        chosen = self.world.many_valued[:: self.a.every]
        self.pipe.load_rtsae(axes(self.like))
        try:
            return [Target(self, *one) for one in tqdm(chosen, desc="effect", unit="target")]
        finally:
            self.pipe.unload_rtsae()

    @cached_property
    def probes(self) -> dict[str, list[Probe]]:
        return {
            kind: [self.world.probe(t.factor, t.value, kind, self.a.prompts, seed=SEED) for t in self.targets]
            for kind in KINDS
        }

    def _steered(self, kind: str, strengths: list[dict] | None) -> list[list[dict]]:
        """The readings of pictures of all targets' prompts of a kind."""
        a, probes = self.a, self.probes[kind]
        options = {} if strengths is None else {"clip": False}
        images = run(self.pipe, probes, strengths, a.steps, a.guidance, a.batch_size, **options)
        return score(self.world, self.scorer, images, probes)

    @cached_property
    def plain(self) -> dict[str, list[list[dict]]]:
        return {kind: self._steered(kind, None) for kind in KINDS}

    def steered(self, sae: SparseDictionary) -> dict:
        """The effect of each target's latents on pairs that were not used to choose them, and what they do to pictures
        of prompts that leave the factor open or contradict it."""
        labels, effects, plain = {}, [], self.plain
        for target in self.targets:
            ((name, label),) = effect_features(sae, [target.slope], [(target.factor, target.value)], LATENTS).items()
            strength, effect = target.effect(sae, label)
            (entry,) = label["features"]
            entry["weights"] = [strength * weight for weight in entry["weights"]]
            labels[name] = label | {"edit": {"apply_to": "cond"}}  # as its effect was measured
            effects.append(effect)
        found: dict = {"effect": round(statistics.mean(effects), 4)}
        self.pipe.load_rtsae(Dictionary({sae.config.site: sae}, labels))
        for kind, probes in self.probes.items():
            steered = self._steered(kind, [{name: 1.0} for name in labels])
            trios = zip(steered, plain[kind], probes, strict=True)
            found[kind] = mean([measure(now, was, one.factor, one.value) for now, was, one in trios])
        self.pipe.unload_rtsae()
        return found

    @cached_property
    def pictures(self) -> Pictures:
        """That names are judged on."""
        return Pictures(self.pipe, self.world, self.scorer, self.a.shown, self.a.shown_steps, self.a.guidance)

    def named(self, sae: SparseDictionary) -> dict:
        """How many of the latents that make a value by themselves have a name, and how many of the names are right."""
        self.pipe.load_rtsae(Dictionary({sae.config.site: sae}))
        latents = population(self.pipe, self.world, self.a.named, self.call)
        names = name_features(self.pipe, read_lines(bundled(WORLDS[self.a.world].prompts)), **self.call)
        rows = list(judged(self.world, self.pictures, names, latents))
        self.pipe.unload_rtsae()
        shares = {name: round(share, 3) for name, share in share_right(rows, LEAST_CONFIDENCE).items()}
        return {"names": shares | {"making": sum(bool(row["makes"]) for row in rows)}}

    def costs(self, sae: SparseDictionary, recipe: Recipe) -> dict:
        """Parameters, processor seconds of a training step, and the time of a picture while the three busiest latents
        are read, relative to a plain picture."""
        busy = [(sae.config.site, latent) for latent in sae.density.topk(3).indices.tolist()]
        self.pipe.load_rtsae(Dictionary({sae.config.site: sae}))
        times: dict[bool, list[float]] = {False: [], True: []}
        for _, is_steered in itertools.product(range(self.a.repeats), times):
            self.pipe.set_rtsae_features(dict.fromkeys(busy, 0.5) if is_steered else {}, operation="scale")
            begun = time.process_time()
            generate(self.pipe, [""] * 4, range(4), self.a.steps, self.a.guidance)
            times[is_steered].append(time.process_time() - begun)
        self.pipe.unload_rtsae()
        anchors = list(sae.config.anchors)
        rows = torch.randn(recipe.train.batch_size, len(anchors), sae.config.in_channels)
        dynamics = LinearDynamics(*rows.shape[1:])
        fresh = new_dictionary(sae.config.site, anchors, recipe, dynamics)
        trainer, steps = DictionaryTrainer(fresh, recipe.train, dynamics, rows, "cpu"), []
        for step in range(self.a.repeats):
            begun = time.process_time()
            trainer.backward(trainer.inputs(rows), None)
            trainer.update(step)
            steps.append(time.process_time() - begun)
        return {
            "parameters": sum(parameter.numel() for parameter in sae.parameters()),
            "training_step": round(min(steps), 4),
            "hook": round(min(times[True]) / min(times[False]), 4),
        }


class Target:
    """A value to steer to: pairs that choose its latents, and others on which their effect is measured."""

    def __init__(self, measures: Measures, factor: str, value: str):
        a, site = measures.a, measures.like.config.site
        self.factor, self.value, self.site = factor, value, site
        found, _ = pairs(measures.world, factor, value, a.pairs + a.pairs // 2, a.pairs // 2, 0, seed=13)
        self.chooses = States(measures.pipe, found[: a.pairs], **measures.call)
        self.judges = States(measures.pipe, found[a.pairs :], seed=1_000_000, **measures.call)
        self.where = concern(self.chooses, site) | concern(self.judges, site)
        with frozen(measures.pipe):
            self.slope = Slope.of(concerned({}, self.chooses))

    def effect(self, sae: SparseDictionary, label: dict) -> tuple[float, float]:
        """The strength with the largest effect on the pairs that choose, and the effect at that strength on the pairs
        that measure."""
        (entry,) = label["features"]
        amounts = torch.tensor(entry["weights"]) * sae.typical_activation[entry["latents"]]
        path = torch.einsum("k,kgd->gd", amounts, sae.feature_trajectories(entry["latents"]))

        def of(states: States, strength: float) -> float:
            def changes(state: State, rows):
                at = interpolate(path, states.grids[self.site].coordinate(state.timestep))
                return {self.site: strength * at * self.where[id(state)][list(rows)][..., None]}

            return float(states.effects(changes).mean())

        best = max(STRENGTHS, key=lambda strength: of(self.chooses, strength))
        return best, of(self.judges, best)


@torch.no_grad()
def perceptual_distance(scorer: FactorScorer, a: torch.Tensor, b: torch.Tensor) -> float:
    """Distance of pictures `(n, 3, h, w)` after LPIPS (1801.03924), without learned weights: the squared difference of
    a scorer's features, normalised to length 1 at each place, averaged over places and layers."""
    a, b, layers = a.to(scorer.device) * 2 - 1, b.to(scorer.device) * 2 - 1, []
    for layer in scorer.features:
        a, b = layer(a), layer(b)
        if isinstance(layer, torch.nn.SiLU):
            sides = [torch.nn.functional.normalize(side, dim=1) for side in (a, b)]
            layers.append((sides[0] - sides[1]).square().sum(1).mean().item())
    return statistics.mean(layers)


MEASURES = ("replaced", "absorbed", "probed", "steered", "named", "costs")


def markdown(rows: list[dict]) -> str:
    """Mean ± standard deviation over the seeds of each kind."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows if row["kind"] != RAW))

    def cell(kind: str, read: Callable[[dict], float], shared: bool = False) -> str:
        values = []
        for row in rows:
            if row["kind"] == kind:
                with contextlib.suppress(KeyError):  # not measured
                    values.append(read(row))
        return spread(values[:1] if shared else values) if values else "–"

    describing = {
        "FVU": lambda r: r["fvu_online"], "cosine": lambda r: r["cosine_online"], "L0": lambda r: r["l0_threshold"],
        "dead": lambda r: r["dead"], SHARED: lambda r: r["stability"],
        "noise prediction recovered": lambda r: r["recovered_online"], "factors read alike": lambda r: r["agreement"],
        "distance of pictures, in ‰": lambda r: 1000 * r["distance"], "absorption": lambda r: r["absorption"],
        "F1 of a value's latents": lambda r: r["f1"],
    }  # fmt: skip
    naming = {
        "latents that make a value": lambda r: r["names"]["making"], "of these named": lambda r: r["names"]["named"],
        "names right": lambda r: r["names"]["right"],
    }  # fmt: skip
    steering: dict[str, Callable] = {"effect of 16 latents": lambda r: r["effect"]}
    for kind in KINDS:
        for name in ("success", "leakage", "valid"):
            steering[f"{kind}: {name}"] = lambda r, kind=kind, name=name: r[kind][name]
    cost = {
        "million parameters": lambda r: r["parameters"] / 1e6,
        "CPU seconds a training step": lambda r: r["training_step"],
        "time of a picture with three latents read": lambda r: r["hook"],
    }  # fmt: skip
    parts = []
    for figures in (describing, naming, steering, cost):
        columns = {name: [cell(kind, read, name == SHARED) for kind in kinds] for name, read in figures.items()}
        columns = {name: cells for name, cells in columns.items() if set(cells) != {"–"}}
        lines = [line for line in zip(kinds, *columns.values(), strict=True) if set(line[1:]) - {"–"}]
        if lines:
            parts.append(table(["kind", *columns], lines))
    predicted = max((row.get("r2", ()) for row in rows), key=sum)
    shares = ", ".join(f"{share:.2f}" for share in predicted)
    parts.append(f"R² of predicting each anchor linearly from the one before: {shares}.\n")
    anchors = max(len(row.get("fvu_online_per_anchor", ())) for row in rows)
    for name, key in (("FVU", "fvu_online_per_anchor"), ("cosine", "cosine_online_per_anchor")):
        lines = [[kind, *(cell(kind, lambda r, g=g, key=key: r[key][g]) for g in range(anchors))] for kind in kinds]
        parts.append(table([f"{name} at anchor", *(str(g + 1) for g in range(anchors))], lines))
    counts, lines = list(dict.fromkeys(n for row in rows if "probes" in row for n in row["probes"]["here"])), []
    for kind in [RAW, *kinds]:
        for where in ("here", "untold", "elsewhere"):
            cells = [cell(kind, lambda r, where=where, n=n: r["probes"][where][n]) for n in counts]
            if set(cells) != {"–"}:
                lines.append([kind, where, *cells])
    if counts:
        parts.append(table(["probe of", "judged", *(f"{n} labelled" for n in counts)], lines))
    return "\n".join(parts)


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "scorer")
    parser.add_argument("--dictionaries", type=Path, default=Path("runs/kinds"), help="folder of `<kind>-<seed>` ones")
    parser.add_argument("--out", type=Path, default=Path("runs/kinds.json"))
    parser.add_argument(
        "--measures", nargs="*", action=Adding, choices=MEASURES, default=list(MEASURES), help="only these"
    )
    parser.add_argument("--labelled", type=int, default=1000, help="pictures for probes to learn from")
    parser.add_argument("--judged", type=int, default=400, help="pictures to judge probes on")
    parser.add_argument("--absorbed", type=int, default=500, help="pictures to measure absorption on")
    parser.add_argument("--replaced", type=int, default=64, help="pictures of reconstructed activations")
    parser.add_argument(
        "--pairs", type=int, default=6, help="that choose the latents of a target, and as many to judge"
    )
    parser.add_argument("--prompts", type=int, default=4, help="of each kind a target is steered on")
    parser.add_argument("--named", type=int, default=72, help="latents whose names are judged")
    parser.add_argument("--shown", type=int, default=6, help="pictures for each factor, to judge names")
    parser.add_argument("--shown-steps", type=int, default=10, help="of denoising, of these pictures")
    parser.add_argument("--every", type=int, default=1, help="measure every n-th target")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of what is timed")
    a, world = parse(parser)
    pipe, scorer = load_models(a)
    folders = dictionaries_in(a.dictionaries, "kinds")
    dictionaries = {folder.name: load_dictionary(folder, dtype=torch.float32) for folder in folders}
    saes = {name: sae for name, dictionary in dictionaries.items() for sae in dictionary.sites.values()}
    if len({(sae.config.site, tuple(sae.config.anchors), sae.config.activation) for sae in saes.values()}) > 1:
        raise ValueError(f"The dictionaries in {a.dictionaries} must be of one site and its anchors.")
    results = Results(a, [a.pipeline, *folders], ("measures",), elsewhere=str(samplers_of(pipe).elsewhere))
    measures = Measures(world, pipe, scorer, next(iter(saes.values())), a)
    if not results.rows:
        rows = [{"dictionary": RAW, "kind": RAW, "has": []}]
        for name, dictionary in dictionaries.items():
            (metrics,) = dictionary.config["metrics"].values()
            rows.append({"dictionary": name, "kind": name.rpartition("-")[0], "has": []} | metrics)
        results.add(*rows)
    for measure_name in a.measures:
        for row in tqdm(results.rows, desc=measure_name, unit="dictionary"):
            name, is_raw = row["dictionary"], row["kind"] == RAW
            if measure_name in row["has"] or is_raw and measure_name != "probed":
                continue
            recipe = [Recipe.model_validate(dictionaries[name].config["recipe"])] if measure_name == "costs" else []
            row |= getattr(measures, measure_name)(None if is_raw else saes[name], *recipe)
            row["has"] = [*row["has"], measure_name]
            results.add()
    add_stability([row for row in results.rows if row["kind"] != RAW], saes)
    results.write()
    results.tell(markdown(results.rows))


if __name__ == "__main__":
    main()
