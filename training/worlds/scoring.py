"""Train the models that read factors back from a world's pictures: a scorer for all choices, and a judge for final
tables.

The judge is a second scorer with another architecture, other first weights and other batches. It is used for no
choice, so that its figures in a final table are not biased by choices that were made with it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from diffusers_rtsae.analysis.scorer import FactorScorer
from diffusers_rtsae.files import write_json

from ..common.checkpoint import load_checkpoint, save_checkpoint
from ..common.seeds import step_generator
from . import World
from .muon import Muon, split
from .pictures import generate, load_pipeline

Truth = dict[str, torch.Tensor]  # class (pictures,) of every factor; -100 where it does not apply


class Kind(NamedTuple):
    """What distinguishes a scorer from another."""

    architecture: str
    channels: int
    learning_rate: float  # of hidden layers' matrices
    seed: int


SCORER = Kind("convolution", 32, 4e-3, seed=0)
JUDGE = Kind("attention", 96, 2e-3, seed=1)
#: parts of the names of weights that are not matrices of hidden layers
OUTER = ("features.0.", "cells.0.", "positions", "features.factors", "head.3.", "head.heads")
CHECKPOINT_EVERY = 250  # steps


def corrupt(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn each picture into an invalid scene, in one of seven ways."""
    n, device = len(images), images.device

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device)

    other = images[torch.randperm(n, generator=generator, device=device)]
    blend = images + (other - images) * (0.35 + 0.3 * uniform(n, 1, 1, 1))
    noisy = images + (0.25 + 0.3 * uniform(n, 1, 1, 1)) * torch.randn(images.shape, generator=generator, device=device)
    small = F.avg_pool2d(images, 8) + 0.1 * torch.randn((n, 3, 8, 8), generator=generator, device=device)
    blurred = F.interpolate(small, size=images.shape[-2:], mode="bilinear")
    empty = images[:, :, :4].mean((2, 3), keepdim=True) + 0.02 * torch.randn(
        images.shape, generator=generator, device=device
    )
    tiles = images.unfold(2, 16, 16).unfold(3, 16, 16).reshape(n, 3, 16, 16, 16)
    tiles = tiles[:, :, torch.randperm(16, generator=generator, device=device)].reshape(n, 3, 4, 4, 16, 16)
    shuffled = tiles.permute(0, 1, 2, 4, 3, 5).reshape(images.shape)
    half = torch.cat([images[..., :32], other[..., 32:]], -1)
    stain = F.interpolate(uniform(n, 3, 4, 4), size=images.shape[-2:], mode="bilinear")
    stained = images + (stain - images) * (
        F.interpolate(uniform(n, 1, 4, 4), size=images.shape[-2:], mode="bilinear") > 0.5
    )
    ways = torch.stack([blend, noisy, blurred, empty, shuffled, half, stained])
    choice = torch.randint(len(ways), (n,), generator=generator, device=device)
    return ways[choice, torch.arange(n, device=device)].clamp(0, 1)


def soften(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Add small flaws that generated pictures may have, which do not change what they show."""
    n, device = len(images), images.device
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images + (blurred - images) * torch.rand((n, 1, 1, 1), generator=generator, device=device)
    noise = torch.randn(images.shape, generator=generator, device=device)
    return (images + 0.04 * torch.rand((n, 1, 1, 1), generator=generator, device=device) * noise).clamp(0, 1)


@torch.no_grad()
def accuracy(scorer: FactorScorer, images: torch.Tensor, truth: Truth, seed: int = 999) -> dict[str, float]:
    """The share of `images (n, 3, height, width)` in which each factor is read correctly, pooled over slots; `invalid`
    is the share of the same images, corrupted, that are recognised as invalid."""
    logits = [scorer(part) for part in images.split(500)]
    bad = corrupt(images, step_generator(seed, 0, images.device)).split(500)
    right: dict[str, list[torch.Tensor]] = {}
    for name, target in truth.items():
        read = torch.cat([part[name].argmax(1) for part in logits])
        right.setdefault(name.rpartition(".")[2], []).append((read == target)[target >= 0])
    invalid = torch.cat([scorer(part)["valid"].argmax(1) == 0 for part in bad])
    shares = {name: torch.cat(parts).float().mean().item() for name, parts in right.items()}
    return shares | {"invalid": invalid.float().mean().item()}


@torch.no_grad()
def agreement(world: World, one: FactorScorer, other: FactorScorer, pictures: torch.Tensor) -> dict[str, float]:
    """Share of pictures in which both scorers read the same, for each factor of `World.seen` and for `all` of them."""
    pairs = [(world.seen(a), world.seen(b)) for a, b in zip(one.read(pictures), other.read(pictures), strict=True)]
    alike = {name: sum(a[name] == b[name] for a, b in pairs) / len(pairs) for name in pairs[0][0]}
    return alike | {"all": sum(a == b for a, b in pairs) / len(pairs)}


def train(
    kind: Kind,
    factors: dict[str, list[str]],
    pictures: torch.Tensor,
    truth: Truth,
    work: Path,
    steps: int,
    batch_size: int,
    flaws: Callable[[torch.Tensor, torch.Generator], torch.Tensor] = soften,
) -> FactorScorer:
    """Train on `pictures` uint8 `(n, 3, height, width)`; losses go to `log.jsonl` in `work`."""
    torch.manual_seed(kind.seed)
    device = pictures.device
    scorer = FactorScorer(factors, channels=kind.channels, architecture=kind.architecture).to(device)
    optimizer = Muon(*split(scorer, OUTER), kind.learning_rate, lr_others=1e-3)
    checkpoint, state = work / "scorer.safetensors", dict(scorer.named_parameters())
    mark = f"{kind}, steps {steps}, batch size {batch_size}"
    done = load_checkpoint(checkpoint, state, optimizer, mark)
    work.mkdir(parents=True, exist_ok=True)
    half = device.type == "cuda"  # many CPUs are slower in bfloat16
    losses = []
    progress = tqdm(range(done, steps), initial=done, total=steps, desc="scorer", unit="step", mininterval=5)
    for step in progress:
        generator = step_generator(kind.seed, step, device)
        chosen = torch.randint(len(pictures), (batch_size,), generator=generator, device=device)
        images = flaws(pictures[chosen].float() / 255, generator)
        bad = corrupt(images[: batch_size // 2], generator)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            logits = scorer(torch.cat([images, bad]))
        loss = sum(
            F.cross_entropy(logits[name][:batch_size].float(), truth[name][chosen])
            for name in factors
            if name != "valid"
        )
        valid = torch.cat([truth["valid"][chosen], torch.zeros(len(bad), dtype=torch.long, device=device)])
        loss = loss + F.cross_entropy(logits["valid"].float(), valid)
        optimizer.set_rate(min(1, 10 * (step + 1) / steps) * (1 - step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % 100 == 0:
            mean = round(torch.stack(losses).mean().item(), 4)
            losses.clear()
            progress.set_postfix(loss=mean)
            with (work / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": step + 1, "loss": mean}) + "\n")
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            save_checkpoint(checkpoint, step + 1, state, optimizer, mark)
    return scorer


def compare(world: World, judge: Path, count: int, device: str) -> dict:
    """The agreement of scorer and judge on pictures that the pipeline draws of held-out combinations."""
    pipe = load_pipeline(world.pipeline, device)
    prompts, pictures = world.prompts(count, seed=7, held_out=True), []
    for start in tqdm(range(0, count, 64), desc="drawing", unit="batch"):
        part = prompts[start : start + 64]
        pictures.append(generate(pipe, part, range(start, start + len(part)), world.steps, world.guidance))
    scorers = [FactorScorer.from_pretrained(path).to(device) for path in (world.scorer, judge)]
    return {"generated_pictures": count, "agreement": agreement(world, *scorers, torch.cat(pictures))}


def new_parser(description: str, steps: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", action="store_true", help="train the judge; compare the two at the end")
    parser.add_argument("--out", type=Path, help="the world's own by default")
    parser.add_argument("--work", type=Path, help="runs/<name of the folder> by default")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def run(
    world: World,
    a: argparse.Namespace,
    factors: dict[str, list[str]],
    training: Callable[[int], tuple[torch.Tensor, Truth]],
    test: Callable[[], tuple[torch.Tensor, Truth]],
    flaws: Callable[[torch.Tensor, torch.Generator], torch.Tensor] = soften,
) -> None:
    """
    Train a scorer or a judge as the arguments of `new_parser` say; write the weights and `metrics.json`.

    Args:
        training (`Callable[[int], tuple[torch.Tensor, Truth]]`): pictures uint8 for a seed, and their truth.
        test (`Callable[[], tuple[torch.Tensor, Truth]]`): other pictures, float in [0, 1], and their truth.
    """
    kind, out = (JUDGE, a.out or world.judge) if a.judge else (SCORER, a.out or world.scorer)
    scorer = train(
        kind, factors, *training(kind.seed), a.work or Path("runs") / out.name, a.steps, a.batch_size, flaws
    )
    images, truth = test()
    result = {"held_out_pictures": len(images), "accuracy": accuracy(scorer, images, truth)}
    scorer.half().save_pretrained(out)
    write_json(out / "metrics.json", result)
    if a.judge:
        result |= compare(world, out, 512, a.device)
        write_json(out / "metrics.json", result)
    print(json.dumps(result, indent=2))
