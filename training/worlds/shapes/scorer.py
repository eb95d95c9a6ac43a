"""Train the scorer of the bundled world: which factors does this picture show, and is it a valid scene at all?

    python -m training.worlds.shapes.scorer            # examples/shapes-scorer
    python -m training.worlds.shapes.scorer --judge    # examples/shapes-judge

The judge is a second scorer of another architecture, trained on other pictures. No choice is ever made by it, so that
figures by it in a final table are no choice's own echo.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from diffusers_rtsae.analysis.scorer import FactorScorer
from diffusers_rtsae.hub import write_json

from ...checkpoint import load_checkpoint, save_checkpoint, step_generator
from ..pictures import generate, load_pipeline
from .scenes import COLOURS, GLOBAL_FACTORS, PLACES, SHAPES, SIZES, Scenes, render, render_pictures, sample_scenes
from .world import WORLD

SLOT_FACTORS = {"shape": ("none", *SHAPES), "colour": tuple(COLOURS), "size": tuple(SIZES)}
FACTORS = {f"{place}.{name}": list(values) for place in PLACES for name, values in SLOT_FACTORS.items()}
FACTORS |= {name: list(values) for name, values in GLOBAL_FACTORS.items()} | {"valid": ["no", "yes"]}


class Kind(NamedTuple):
    """What distinguishes a scorer from another."""

    architecture: str
    channels: int
    learning_rate: float
    seed: int


SCORER = Kind("convolution", 32, 2e-3, seed=0)
JUDGE = Kind("attention", 96, 1e-3, seed=1)
CHECKPOINT_EVERY = 250  # steps


def targets(scenes: Scenes) -> dict[str, torch.Tensor]:
    """Class `(batch,)` of every factor; -100 where it does not apply (colour and size of an empty slot)."""
    n, device = len(scenes), scenes.count.device
    result = {
        "style": scenes.style,
        "background": scenes.background,
        "valid": torch.ones(n, dtype=torch.long, device=device),
    }
    for p, place in enumerate(PLACES):
        here = scenes.place == p
        here[:, 1] &= scenes.count == 2
        filled, which = here.any(1), here.long().argmax(1, keepdim=True)
        for name in SLOT_FACTORS:
            value = getattr(scenes, name).gather(1, which)[:, 0]
            if name == "shape":
                result[f"{place}.shape"] = torch.where(filled, value + 1, 0)
            else:
                result[f"{place}.{name}"] = torch.where(filled, value, -100)
    return result


def corrupt(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Turn renders into pictures that are no valid scene, one of seven ways each."""
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
    """Small flaws that a generated picture may have and that do not change what it shows."""
    n, device = len(images), images.device
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = images + (blurred - images) * torch.rand((n, 1, 1, 1), generator=generator, device=device)
    noise = torch.randn(images.shape, generator=generator, device=device)
    return (images + 0.04 * torch.rand((n, 1, 1, 1), generator=generator, device=device) * noise).clamp(0, 1)


def accuracy(scorer: FactorScorer, count: int = 2000, seed: int = 999) -> dict[str, float]:
    """Share right per factor on held-out renders, pooled over slots; `valid` also on corrupted ones."""
    device = scorer.device
    scenes = sample_scenes(count, seed).to(device)
    images = render(scenes)
    with torch.no_grad():
        logits = scorer(images)
        bad = scorer(corrupt(images, step_generator(seed, 0, device)))["valid"].argmax(1) == 0
    right: dict[str, list[torch.Tensor]] = {}
    for name, target in targets(scenes).items():
        known = target >= 0
        right.setdefault(name.rpartition(".")[2], []).append((logits[name].argmax(1) == target)[known])
    result = {name: torch.cat(parts).float().mean().item() for name, parts in right.items()}
    return result | {"invalid": bad.float().mean().item()}


@torch.no_grad()
def agreement(one: FactorScorer, other: FactorScorer, pictures: torch.Tensor) -> dict[str, float]:
    """Share of pictures that both scorers read alike, for each factor of `World.seen` and for `all` of them."""
    pairs = [(WORLD.seen(a), WORLD.seen(b)) for a, b in zip(one.read(pictures), other.read(pictures), strict=True)]
    alike = {name: sum(a[name] == b[name] for a, b in pairs) / len(pairs) for name in pairs[0][0]}
    return alike | {"all": sum(a == b for a, b in pairs) / len(pairs)}


def train(kind: Kind, out: Path, work: Path, steps: int, batch_size: int, device: str) -> dict:
    """Train, write the weights and `metrics.json`; losses go to `log.jsonl` in `work`."""
    torch.manual_seed(kind.seed)
    scorer = FactorScorer(FACTORS, channels=kind.channels, architecture=kind.architecture).to(device)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=kind.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, kind.learning_rate, total_steps=steps)
    pictures, _, all_scenes = render_pictures(40_000, seed=10_000 + kind.seed, device=device)
    checkpoint, state = work / "scorer.safetensors", dict(scorer.named_parameters())
    mark = f"{kind}, steps {steps}, batch size {batch_size}"
    done = load_checkpoint(checkpoint, state, optimizer, mark)
    for _ in range(done):
        schedule.step()
    work.mkdir(parents=True, exist_ok=True)
    # attention with a backward pass is slower in bfloat16 than in float32 on a CPU
    half = torch.device(device).type == "cuda" or kind.architecture == "convolution"
    losses = []
    progress = tqdm(range(done, steps), initial=done, total=steps, desc="scorer", unit="step", mininterval=5)
    for step in progress:
        generator = step_generator(kind.seed, step, device)
        chosen = torch.randint(len(pictures), (batch_size,), generator=generator, device=device)
        images, scenes = soften(pictures[chosen].float() / 255, generator), all_scenes[chosen]
        bad = corrupt(images[: batch_size // 2], generator)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=half):
            logits = scorer(torch.cat([images, bad]))
        truth = targets(scenes)
        loss = sum(
            F.cross_entropy(logits[name][:batch_size].float(), truth[name]) for name in FACTORS if name != "valid"
        )
        valid = torch.cat([truth["valid"], torch.zeros(len(bad), dtype=torch.long, device=device)])
        loss = loss + F.cross_entropy(logits["valid"].float(), valid)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            mean = round(sum(losses) / len(losses), 4)
            losses.clear()
            progress.set_postfix(loss=mean)
            with (work / "log.jsonl").open("a") as log:
                log.write(json.dumps({"step": step + 1, "loss": mean}) + "\n")
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == steps:
            save_checkpoint(checkpoint, step + 1, state, optimizer, mark)
    result = {"held_out_renders": 2000, "accuracy": accuracy(scorer)}
    scorer.half().save_pretrained(out)
    write_json(out / "metrics.json", result)
    return result


def compare(judge: Path, count: int, device: str) -> dict:
    """What the scorer and the judge read alike in pictures that the pipeline draws of held-out combinations."""
    pipe = load_pipeline(WORLD.pipeline, device)
    prompts, pictures = WORLD.prompts(count, seed=7, held_out=True), []
    for start in tqdm(range(0, count, 64), desc="drawing", unit="batch"):
        part = prompts[start : start + 64]
        pictures.append(generate(pipe, part, range(start, start + len(part)), WORLD.steps, WORLD.guidance))
    scorers = [FactorScorer.from_pretrained(path).to(device) for path in (WORLD.scorer, judge)]
    return {"generated_pictures": count, "agreement": agreement(*scorers, torch.cat(pictures))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", action="store_true", help="train the judge; compare the two at the end")
    parser.add_argument("--out", type=Path, help="the world's own by default")
    parser.add_argument("--work", type=Path, help="runs/<name of the folder> by default")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    a = parser.parse_args()
    out = a.out or (WORLD.judge if a.judge else WORLD.scorer)
    work = a.work or Path("runs") / out.name
    result = train(JUDGE if a.judge else SCORER, out, work, a.steps, a.batch_size, a.device)
    if a.judge:
        result |= compare(out, 512, a.device)
        write_json(out / "metrics.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
