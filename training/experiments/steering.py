"""Measuring steering: pictures of many probes, difference-of-means directions, success and leakage."""

from __future__ import annotations

import random

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from diffusers_rtsae import RTSAE, Dictionary
from diffusers_rtsae.analysis.record import Recorder
from diffusers_rtsae.analysis.scorer import FactorScorer

from ..worlds import Probe, World
from ..worlds.pictures import generate


def measure(steered: list[dict], plain: list[dict], factor: str, value: str) -> dict[str, float]:
    """
    How well steering worked, from pictures as `World.seen` reads them: `success`, the share that are valid and show
    the value; `leakage`, the share in which any other factor changed; `leakage_mean`, the share of other factors that
    changed; and the share that are `valid`.
    """
    others, n = [f for f in plain[0] if f not in (factor, "valid")], len(steered)
    changed = [[s[f] != p[f] for f in others] for s, p in zip(steered, plain, strict=True)]
    return {
        "success": sum(bool(s["valid"]) and s[factor] == value for s in steered) / n,
        "leakage": sum(map(any, changed)) / n,
        "leakage_mean": sum(map(sum, changed)) / (n * len(others)),
        "valid": sum(bool(s["valid"]) for s in steered) / n,
    }


def pairs(
    world: World, factor: str, value: str, contradicted: int, leave_open: int, already: int, seed: int
) -> tuple[list[tuple[str, str]], list[str]]:
    """
    Prompts to fit a value on, of scenes that were trained on.

    Returns:
        pairs (from, to), shuffled, where the first prompt names another value (`contradicted` of them) or none
        (`leave_open`) and the second names this one; and prompts that name it (`already`), which must not change.
    """
    scenes = world.sample(8 * (contradicted + leave_open + already), seed=1_000_000 + seed, held_out=False)
    scenes = iter([scene for scene in scenes if scene[factor] != value])
    changing, rng = [], random.Random(seed)
    for i in range(contradicted + leave_open):
        scene, words = next(scenes), 1000 * (1 + seed) + i
        is_open = (factor,) if i >= contradicted else ()
        before = world.describe([scene], words, leave_open=is_open)[0]
        changing.append((before, world.describe([scene | {factor: value}], words)[0]))
    rng.shuffle(changing)
    named = [world.describe([next(scenes) | {factor: value}], i)[0] for i in range(already)]
    return changing, named


def mean(cells: list[dict[str, float]]) -> dict[str, float]:
    """The mean of the results of `measure` for several probes, rounded."""
    return {name: round(sum(cell[name] for cell in cells) / len(cells), 4) for name in cells[0]}


def tokens_on(masks: torch.Tensor, side: int) -> torch.Tensor:
    """`(pictures, side * side)` bool: the tokens that a mask `(pictures, size, size)` covers by more than a third."""
    return torch.nn.functional.adaptive_avg_pool2d(masks[:, None], side).flatten(1) > 0.35


def run(
    pipe: DiffusionPipeline,
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
        strengths (`list[dict]`, *optional*): for each probe `{feature: strength}`; `None` generates without steering.
        prompts (*optional*): to use instead of the probes' own.
        masks (`bool`): steer only inside the probes' masks.
        neutral (`float`): the strength of features that only other probes of the batch name.
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
    world: World,
    pipe: DiffusionPipeline,
    sites: list[str],
    count: int,
    steps: int,
    guidance: float,
    batch_size: int,
) -> Dictionary:
    """
    Directions of the difference of means, as a dictionary with one feature for each target of the world.

    A direction is the mean activation where prompts name the value, minus the mean over all values, at each site and
    step. For factors of the whole picture the mean is over all tokens, for factors of an object over its tokens.
    """
    sums: dict[tuple[str, str], torch.Tensor] = {}
    counts: dict[tuple[str, str], torch.Tensor] = {}
    for start in tqdm(range(0, count, batch_size), desc="difference of means", unit="batch"):
        scenes = world.sample(batch_size, seed=60_000_000 + start, held_out=False)
        with Recorder(pipe, sites) as recorder:
            generate(pipe, world.describe(scenes, start), range(start, start + batch_size), steps, guidance)
        for site in sites:
            h = recorder.trajectories(site)
            on_object = tokens_on(world.masks(scenes, world.image_size), int(h.shape[1] ** 0.5))  # squares
            for factor in world.steered:
                weight = on_object if factor in world.local else torch.ones_like(on_object)
                total = torch.einsum("bngd,bn->bgd", h, weight.float())
                values = world.factors[factor]
                codes = torch.tensor([values.index(scene[factor]) for scene in scenes])
                sums.setdefault((site, factor), torch.zeros(len(values), *total.shape[1:])).index_add_(0, codes, total)
                tokens = weight.sum(1).float()
                counts.setdefault((site, factor), torch.zeros(len(values))).index_add_(0, codes, tokens)
    pipe.scheduler.set_timesteps(steps)
    anchors = [int(t) for t in pipe.scheduler.timesteps]
    dictionaries = {}
    for site in sites:
        means = {f: sums[site, f] / counts[site, f].clamp(min=1)[:, None, None] for f in world.steered}
        directions = [(means[f] - means[f].mean(0))[world.factors[f].index(value)] for f, value in world.targets]
        dictionaries[site] = as_dictionary(site, anchors, torch.stack(directions))
    return Dictionary(dictionaries)


def as_dictionary(site: str, anchors: list[int], directions: torch.Tensor) -> RTSAE:
    """Directions `(features, steps, d)` as a dictionary without dynamics; strength 1 adds a direction as it is."""
    rtsae = RTSAE(site, directions.shape[2], anchors, num_latents=len(directions), k=1)
    rtsae.decoder.data.copy_(directions)
    return rtsae


def score(world: World, scorer: FactorScorer, images: torch.Tensor, probes: list[Probe]) -> list[list[dict]]:
    """The readings of the pictures that `run` made, for each probe."""
    seen = iter([world.seen(reading) for reading in scorer.read(images)])
    return [[next(seen) for _ in one.prompts] for one in probes]
