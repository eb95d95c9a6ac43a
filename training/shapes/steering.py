"""Measuring steering on the bundled world: prompts, difference-of-means directions, success and leakage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from tqdm import tqdm

from diffusers_rtsae import RTSAE, Dictionary
from diffusers_rtsae.analysis.record import Recorder
from diffusers_rtsae.analysis.scorer import FactorScorer

from .captions import captions
from .evaluate import generate, read_objects
from .scenes import FACTORS, GLOBAL_FACTORS, IMAGE_SIZE, OBJECT_FACTORS, PLACES, SIZES, Scenes, sample_scenes

STEERED = ("background", "style", "colour", "shape", "size")
TARGETS = [(factor, value) for factor in STEERED for value in FACTORS[factor]]
NAMED = dict.fromkeys(FACTORS, 1.0)


def code(scenes: Scenes, factor: str) -> torch.Tensor:
    """Integer value of `factor` of one-object scenes, `(batch,)`."""
    values = getattr(scenes, factor)
    return values if factor in GLOBAL_FACTORS else values[:, 0]


def object_mask(scenes: Scenes) -> torch.Tensor:
    """`(batch, 64, 64)`: a disc over the place and size the prompt names."""
    centre = torch.tensor(list(PLACES.values())).float()[scenes.place[:, 0]]
    radius = 1.1 * torch.tensor(list(SIZES.values()))[scenes.size[:, 0]]
    axis = torch.arange(IMAGE_SIZE) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    distance = ((x - centre[:, 0, None, None]) ** 2 + (y - centre[:, 1, None, None]) ** 2).sqrt()
    return (distance < radius[:, None, None]).float()


@dataclass
class Probe:
    """Prompts on which one value of one factor is to be steered to: other factors named, this one open or
    contradicted."""

    factor: str
    value: str
    scenes: Scenes
    prompts: list[str]
    seeds: list[int]

    @property
    def mask(self) -> torch.Tensor:
        """Where to steer, `(prompts, 64, 64)`: everywhere for global factors, on the object for its own."""
        return torch.ones(len(self.prompts), 64, 64) if self.factor in GLOBAL_FACTORS else object_mask(self.scenes)


def probe(factor: str, value: str, kind: str, count: int, seed: int, naming: dict[str, float] = NAMED) -> Probe:
    """`count` held-out prompts of one-object scenes with another value than `value`; `kind` is `open` or
    `contradicted`."""
    index = TARGETS.index((factor, value))
    scenes = sample_scenes(count * 4, seed=9000 + 97 * index + seed, held_out=True, objects=1)
    scenes = scenes[code(scenes, factor) != FACTORS[factor].index(value)][slice(count)]
    prompts = captions(scenes, index + seed, naming | ({factor: 0.0} if kind == "open" else {factor: 1.0}))
    return Probe(factor, value, scenes, prompts, [100_000 * (1 + seed) + 1000 * index + i for i in range(count)])


def prompted(probe_: Probe, naming: dict[str, float] = NAMED) -> list[str]:
    """The prompts of a probe, edited to name the target: the upper bound of steering."""
    scenes = probe_.scenes[slice(None)]
    field = getattr(scenes, probe_.factor).clone()
    field[...] = FACTORS[probe_.factor].index(probe_.value)
    setattr(scenes, probe_.factor, field)
    return captions(scenes, len(probe_.prompts), naming)


def factors(reading: dict[str, str | None]) -> dict[str, str | None]:
    """All factors of a one-object picture; `None` where there is not exactly one object, `valid` as bool."""
    seen = read_objects(reading)
    valid = reading["valid"] == "yes" and len(seen) == 1
    one = seen[0] if len(seen) == 1 else {}
    return {f: one.get(f) for f in OBJECT_FACTORS} | {f: reading[f] for f in GLOBAL_FACTORS} | {"valid": valid}


def measure(steered: list[dict], plain: list[dict], factor: str, value: str) -> dict[str, float]:
    """
    Success (valid and shows the value), leakage (share of pictures in which any other factor changed; `leakage_mean`:
    share of other factors that changed) and validity, of `factors` readings.
    """
    others, n = [f for f in FACTORS if f != factor], len(steered)
    changed = [[s[f] != p[f] for f in others] for s, p in zip(steered, plain, strict=True)]
    return {
        "success": sum(bool(s["valid"]) and s[factor] == value for s in steered) / n,
        "leakage": sum(map(any, changed)) / n,
        "leakage_mean": sum(map(sum, changed)) / (n * len(others)),
        "valid": sum(bool(s["valid"]) for s in steered) / n,
    }


def run(
    pipe: StableDiffusionPipeline,
    probes: list[Probe],
    strengths: list[dict] | None,
    steps: int,
    guidance: float,
    batch_size: int,
    prompts: list[list[str]] | None = None,
    masks: bool = True,
    neutral: float = 0.0,
    **options,
) -> torch.Tensor:
    """
    Generate the pictures of many probes in large batches.

    Args:
        strengths (`list[dict]`, *optional*): for each probe `{feature: strength}`; `None` generates plainly.
        prompts (*optional*): to use instead of the probes' own.
        masks (`bool`): steer only on the probes' masks.
        neutral (`float`): the strength of a probe's pictures for the features of other probes.
    """
    rows = [(p, i) for p, one in enumerate(probes) for i in range(len(one.prompts))]
    texts = [(prompts[p] if prompts else probes[p].prompts)[i] for p, i in rows]
    seeds, where = [probes[p].seeds[i] for p, i in rows], torch.cat([one.mask for one in probes])
    images = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        if strengths is None:
            images.append(generate(pipe, texts[part], seeds[part], steps, guidance))
            continue
        names = dict.fromkeys(name for p in {p for p, _ in rows[part]} for name in strengths[p])
        features = {name: [strengths[p].get(name, neutral) for p, _ in rows[part]] for name in names}
        with pipe.rtsae_steering(features, mask=where[part] if masks else None, **options):
            images.append(generate(pipe, texts[part], seeds[part], steps, guidance))
    return torch.cat(images)


@torch.no_grad()
def difference_of_means(
    pipe: StableDiffusionPipeline,
    sites: list[str],
    count: int,
    steps: int,
    guidance: float,
    batch_size: int,
    seed: int = 0,
) -> Dictionary:
    """
    For each site and steered value, the mean activation of fully named prompts with it minus that of all, at each
    step:
    over all tokens for global factors, over the object's tokens for its own. As a dictionary, one feature a target.
    """
    sums: dict[tuple[str, str], torch.Tensor] = {}
    counts: dict[tuple[str, str], torch.Tensor] = {}
    for start in tqdm(range(0, count, batch_size), desc="difference of means", unit="batch"):
        scenes = sample_scenes(batch_size, seed=60_000_000 + seed + start, held_out=False, objects=1)
        with Recorder(pipe, sites) as recorder:
            generate(pipe, captions(scenes, start, NAMED), range(start, start + batch_size), steps, guidance)
        for site in sites:
            h = recorder.trajectories(site)
            side = int(h.shape[1] ** 0.5)  # the bundled world is square
            on_object = torch.nn.functional.adaptive_avg_pool2d(object_mask(scenes)[:, None], side).flatten(1) > 0.35
            for factor in STEERED:
                weight = torch.ones_like(on_object) if factor in GLOBAL_FACTORS else on_object
                total = torch.einsum("bngd,bn->bgd", h, weight.float())
                size = len(FACTORS[factor])
                sums.setdefault((site, factor), torch.zeros(size, *total.shape[1:])).index_add_(
                    0, code(scenes, factor), total
                )
                tokens = weight.sum(1).float()
                counts.setdefault((site, factor), torch.zeros(size)).index_add_(0, code(scenes, factor), tokens)
    pipe.scheduler.set_timesteps(steps)
    anchors = [int(t) for t in pipe.scheduler.timesteps]
    dictionaries = {}
    for site in sites:
        means = [sums[site, f] / counts[site, f].clamp(min=1)[:, None, None] for f in STEERED]
        dictionaries[site] = as_dictionary(site, anchors, torch.cat([m - m.mean(0) for m in means]))
    return Dictionary(dictionaries)


def as_dictionary(site: str, anchors: list[int], directions: torch.Tensor) -> RTSAE:
    """Directions `(features, steps, d)` as a dictionary without dynamics, whose strength 1 adds exactly them."""
    rtsae = RTSAE(site, directions.shape[2], anchors, num_latents=len(directions), k=1)
    rtsae.decoder.data.copy_(directions)
    return rtsae


def score(scorer: FactorScorer, images: torch.Tensor, probes: list[Probe]) -> list[list[dict]]:
    """`factors` readings of the pictures that `run` made, for each probe."""
    readings = iter([factors(reading) for reading in scorer.read(images)])
    return [[next(readings) for _ in one.prompts] for one in probes]
