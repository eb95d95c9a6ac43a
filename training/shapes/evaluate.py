"""Does the bundled pipeline draw what it is told? Checked by the scorer on prompts with held-out combinations.

python -m training.shapes.evaluate --pipeline examples/shapes-sd --out examples/shapes-sd/metrics.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from diffusers_rtsae.analysis.scorer import FactorScorer

from .captions import caption
from .scenes import FACTORS, GLOBAL_FACTORS, OBJECT_FACTORS, PLACES, sample_scenes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every measurement of the bundled pipeline can be told: the models, and how to generate."""
    parser.add_argument("--pipeline", type=Path, default=Path("examples/shapes-sd"))
    parser.add_argument("--scorer", type=Path, default=Path("examples/shapes-scorer"))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the pipeline")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def contents(*folders: Path) -> str:
    """A short hash of the weights and labels in some folders: their paths do not say what lies there."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in folders:
        for path in sorted(
            p for p in Path(folder).rglob("*") if p.suffix == ".safetensors" or p.name == "labels.json"
        ):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def stored_rows(path: Path, settings: dict[str, str]) -> list[dict]:
    """The rows that an earlier run of a measurement wrote; raises `ValueError` if its settings were others."""
    if not path.exists():
        return []
    stored = json.loads(path.read_text())
    if stored["settings"] != settings:
        raise ValueError(f"{path} was measured with other settings: {stored['settings']}. Choose another --out.")
    return stored["rows"]


def load_pipeline(folder: Path | str, device: str, dtype: str = "float32") -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def fixed_noise(pipe: StableDiffusionPipeline, seeds: Sequence[int]) -> torch.Tensor:
    """Initial latents `(images, 4, 16, 16)`, one seed an image, the same on every device."""
    shape = (pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(noise).to(pipe.device, pipe.unet.dtype)


def generate(
    pipe: StableDiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], steps: int = 25, guidance: float = 3.0
) -> torch.Tensor:
    """Images `(prompts, 3, 64, 64)` in [0, 1] on the CPU, one seed an image."""
    images = pipe(
        list(prompts),
        latents=fixed_noise(pipe, seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],  # of samplers that draw noise on the way
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="pt",
    ).images
    return images.float().cpu().clamp(0, 1)


def read_objects(reading: dict[str, str | None]) -> list[dict[str, str]]:
    """The objects a scorer reading lists: `[{"shape": …, "colour": …, "size": …, "place": …}]`."""
    return [
        {"place": place} | {name: reading[f"{place}.{name}"] for name in ("shape", "colour", "size")}
        for place in PLACES
        if reading[f"{place}.shape"] is not None
    ]


def truth(scenes, index: int) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Factor values by name of scene `index`: of each object, and global."""
    objects = [
        {name: OBJECT_FACTORS[name][getattr(scenes, name)[index, i]] for name in OBJECT_FACTORS}
        for i in range(int(scenes.count[index]))
    ]
    return objects, {name: GLOBAL_FACTORS[name][getattr(scenes, name)[index]] for name in GLOBAL_FACTORS}


def contact_sheet(images: torch.Tensor, columns: int, scale: int = 2) -> Image.Image:
    """Tile images `(n, 3, h, w)` into one picture."""
    n, c, h, w = images.shape
    rows = math.ceil(n / columns)
    sheet = torch.ones(rows * columns, c, h + 2, w + 2)
    sheet[:n, :, 1:-1, 1:-1] = images
    sheet = sheet.reshape(rows, columns, c, h + 2, w + 2).permute(2, 0, 3, 1, 4).reshape(c, rows * (h + 2), -1)
    picture = Image.fromarray((sheet.permute(1, 2, 0) * 255).round().byte().numpy())
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def evaluate(
    pipe: StableDiffusionPipeline,
    scorer: FactorScorer,
    count: int,
    steps: int,
    guidance: float,
    batch_size: int,
    seed: int = 0,
) -> tuple[dict, torch.Tensor]:
    """Share of named factors that are right, for held-out scenes of one and of two objects, and share of valid
    scenes."""
    sheets, result = (
        [],
        {"prompts": count, "steps": steps, "sampler": "DDIM", "guidance_scale": guidance, "seed": seed},
    )
    valid = []
    for objects in (1, 2):
        scenes = sample_scenes(count // 2, seed=70 + seed, held_out=True, objects=objects)
        rng = random.Random(seed)
        told = [caption(scenes, i, rng) for i in range(len(scenes))]
        images = []
        for start in range(0, len(told), batch_size):
            part = range(start, min(start + batch_size, len(told)))
            images.append(generate(pipe, [told[i][0] for i in part], [1000 * seed + i for i in part], steps, guidance))
        images = torch.cat(images)
        sheets.append(images[:32])
        hits: dict[str, list[bool]] = {name: [] for name in FACTORS} | {"binding": []}
        for i, reading in enumerate(scorer.read(images)):
            wanted, world = truth(scenes, i)
            seen = read_objects(reading)
            valid.append(reading["valid"] == "yes" and len(seen) == objects)
            for name in told[i][2]:
                hits[name].append(reading[name] == world[name])
            placed = "place" in told[i][1][0]
            if objects == 1:
                for name in told[i][1][0]:
                    hits[name].append(len(seen) == 1 and seen[0][name] == wanted[0][name])
            elif placed:  # both objects, each with its named shape and colour, each in its place
                named = [[f for f in told[i][1][k] if f in ("shape", "colour")] for k in range(2)]
                at = {o["place"]: o for o in seen}
                hits["binding"].append(
                    all(
                        w["place"] in at and all(at[w["place"]][f] == w[f] for f in n)
                        for w, n in zip(wanted, named, strict=True)
                    )
                )
        right = {name: round(sum(v) / len(v), 4) for name, v in hits.items() if v}
        result[f"{objects} object{'s' * (objects - 1)}"] = right
    result["valid"] = round(sum(valid) / len(valid), 4)
    return result, torch.cat(sheets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("runs/shapes-sd-metrics.json"))
    parser.add_argument("--prompts", type=int, default=512)
    a = parser.parse_args()
    pipe, scorer = load_pipeline(a.pipeline, a.device, a.dtype), FactorScorer.from_pretrained(a.scorer).to(a.device)
    result, sheet = evaluate(pipe, scorer, a.prompts, a.steps, a.guidance, a.batch_size)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=2) + "\n")
    contact_sheet(sheet, 16).save(a.out.with_suffix(".png"))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
