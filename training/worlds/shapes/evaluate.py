"""Does the bundled pipeline draw what the prompt says? Checked by the scorer on prompts with held-out combinations.

python -m training.worlds.shapes.evaluate --pipeline examples/shapes-sd --out examples/shapes-sd/metrics.json
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from diffusers_rtsae.analysis.scorer import FactorScorer

from ..pictures import add_models, contact_sheet, generate, load_models, new_parser, parse
from .captions import caption
from .scenes import FACTORS, GLOBAL_FACTORS, OBJECT_FACTORS, sample_scenes
from .world import WORLD


def truth(scenes, index: int) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Factor values by name of scene `index`: of each object, and global."""
    objects = [
        {name: OBJECT_FACTORS[name][getattr(scenes, name)[index, i]] for name in OBJECT_FACTORS}
        for i in range(int(scenes.count[index]))
    ]
    return objects, {name: GLOBAL_FACTORS[name][getattr(scenes, name)[index]] for name in GLOBAL_FACTORS}


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
        captioned = [caption(scenes, i, rng) for i in range(len(scenes))]
        images = []
        for start in range(0, len(captioned), batch_size):
            part = range(start, min(start + batch_size, len(captioned)))
            images.append(
                generate(pipe, [captioned[i][0] for i in part], [1000 * seed + i for i in part], steps, guidance)
            )
        images = torch.cat(images)
        sheets.append(images[:32])
        hits: dict[str, list[bool]] = {name: [] for name in FACTORS} | {"binding": []}
        for i, reading in enumerate(scorer.read(images)):
            targets, world = truth(scenes, i)
            seen = WORLD.objects(reading)
            valid.append(reading["valid"] == "yes" and len(seen) == objects)
            for name in captioned[i][2]:
                hits[name].append(reading[name] == world[name])
            placed = "place" in captioned[i][1][0]
            if objects == 1:
                for name in captioned[i][1][0]:
                    hits[name].append(len(seen) == 1 and seen[0][name] == targets[0][name])
            elif placed:  # both objects, each with its named shape and colour, each in its place
                named = [[f for f in captioned[i][1][k] if f in ("shape", "colour")] for k in range(2)]
                at = {o["place"]: o for o in seen}
                hits["binding"].append(
                    all(
                        w["place"] in at and all(at[w["place"]][f] == w[f] for f in n)
                        for w, n in zip(targets, named, strict=True)
                    )
                )
        right = {name: round(sum(v) / len(v), 4) for name, v in hits.items() if v}
        result[f"{objects} object{'s' * (objects - 1)}"] = right
    result["valid"] = round(sum(valid) / len(valid), 4)
    return result, torch.cat(sheets)


def main() -> None:
    parser = new_parser(__doc__, world="shapes")
    add_models(parser, "pipeline", "scorer")
    parser.add_argument("--out", type=Path, default=Path("runs/shapes-sd-metrics.json"))
    parser.add_argument("--prompts", type=int, default=512)
    a, _ = parse(parser)
    pipe, scorer = load_models(a)
    result, sheet = evaluate(pipe, scorer, a.prompts, a.steps, a.guidance, a.batch_size)
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=2) + "\n")
    contact_sheet(sheet, 16).save(a.out.with_suffix(".png"))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
