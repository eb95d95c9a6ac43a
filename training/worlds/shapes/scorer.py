"""Train the scorer of the bundled world: which factors does this picture show, and is it a valid scene at all?

python -m training.worlds.shapes.scorer --out examples/shapes-scorer
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from diffusers_rtsae.analysis.scorer import FactorScorer

from ...checkpoint import load_checkpoint, save_checkpoint, step_generator
from .scenes import COLOURS, GLOBAL_FACTORS, PLACES, SHAPES, SIZES, Scenes, render, render_pictures, sample_scenes

SLOT_FACTORS = {"shape": ("none", *SHAPES), "colour": tuple(COLOURS), "size": tuple(SIZES)}
FACTORS = {f"{place}.{name}": list(values) for place in PLACES for name, values in SLOT_FACTORS.items()}
FACTORS |= {name: list(values) for name, values in GLOBAL_FACTORS.items()} | {"valid": ["no", "yes"]}


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


def train(out: Path, work: Path, steps: int, batch_size: int, device: str, seed: int = 0) -> dict[str, float]:
    torch.manual_seed(seed)
    scorer = FactorScorer(FACTORS).to(device)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    pictures, _, all_scenes = render_pictures(40_000, seed=10_000, device=device)
    checkpoint, state = work / "scorer.safetensors", dict(scorer.named_parameters())
    mark = f"steps {steps}, batch size {batch_size}, seed {seed}"
    done = load_checkpoint(checkpoint, state, optimizer, mark)
    for _ in range(done):
        schedule.step()
    progress = tqdm(range(done, steps), initial=done, total=steps, desc="scorer", unit="step", mininterval=5)
    for step in progress:
        generator = step_generator(seed, step, device)
        chosen = torch.randint(len(pictures), (batch_size,), generator=generator, device=device)
        images, scenes = soften(pictures[chosen].float() / 255, generator), all_scenes[chosen]
        bad = corrupt(images[: batch_size // 2], generator)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
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
        if step % 100 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_checkpoint(checkpoint, step + 1, state, optimizer, mark)
    result = accuracy(scorer)
    scorer.half().save_pretrained(out)
    (out / "metrics.json").write_text(json.dumps({"held_out_renders": 2000, "accuracy": result}, indent=2) + "\n")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("examples/shapes-scorer"))
    parser.add_argument("--work", type=Path, default=Path("runs/shapes-scorer"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    print(json.dumps(train(**vars(arguments)), indent=2))
