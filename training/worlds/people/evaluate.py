"""Does the pipeline of the world of people draw what the prompt says? Checked by the scorer on held-out combinations.

    python -m training.worlds.people.evaluate --out examples/people-dit/metrics.json \\
        --sheet training/results/people/drawn.webp

Every prompt names all factors of a combination that was never trained on. The contact sheet shows the first 64 of
them, unchosen, each beside the foundry's own picture, which is not trained on either.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from diffusers_rtsae.analysis.scorer import FactorScorer
from diffusers_rtsae.files import whole, write_json

from ..pictures import add_models, contact_sheet, generate, load_models, new_parser, parse
from .captions import captions
from .scenes import FACTORS, People, load


def shares(logits: dict[str, torch.Tensor], people: People) -> dict[str, float]:
    """Share of pictures whose factor is read as it should be; `role top 5`: among the five most likely; `valid`."""
    result = {}
    for name in FACTORS:
        target = getattr(people, name)
        known = target >= 0
        result[name] = (logits[name].argmax(1) == target)[known]
    result["role top 5"] = (logits["role"].topk(5, 1).indices == people.role[:, None]).any(1)
    result["valid"] = logits["valid"].argmax(1) == 1
    return {name: round(hits.float().mean().item(), 4) for name, hits in result.items()}


def evaluate(
    pipe: DiffusionPipeline, scorer: FactorScorer, people: People, steps: int, guidance: float, batch_size: int
) -> tuple[dict, torch.Tensor]:
    """How many factors of `people` are drawn as the prompt says, and the pictures `(people, 3, 64, 64)`."""
    prompts = captions(people, seed=0, naming=dict.fromkeys(FACTORS, 1.0))
    images = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="drawing", unit="batch"):
        part = prompts[start : start + batch_size]
        images.append(generate(pipe, part, range(start, start + len(part)), steps, guidance))
    images = torch.cat(images)
    with torch.no_grad():
        logits = {name: value.cpu() for name, value in scorer(images.to(scorer.device)).items()}
    settings = {"prompts": len(prompts), "steps": steps, "guidance_scale": guidance}
    return settings | {"right": shares(logits, people)}, images


def main() -> None:
    parser = new_parser(__doc__, world="people")
    add_models(parser, "pipeline", "scorer")
    parser.add_argument("--pictures", type=Path, default=Path("runs/people"), help="what `scenes` built")
    parser.add_argument("--out", type=Path, default=Path("runs/people-dit-metrics.json"))
    parser.add_argument("--sheet", type=Path, default=Path("runs/people-drawn.webp"), help="contact sheet to write")
    parser.add_argument("--prompts", type=int, default=400)
    a, _ = parse(parser)
    pipe, scorer = load_models(a)
    real, people = load(a.pictures, held_out=True)
    order = torch.randperm(len(people), generator=torch.Generator().manual_seed(0))[: a.prompts]
    result, images = evaluate(pipe, scorer, people[order], a.steps, a.guidance, a.batch_size)
    write_json(a.out, result)
    pairs = torch.stack([images[:64], real[order[:64]].float() / 255], 1).flatten(0, 1)
    with whole(a.sheet) as partial:
        contact_sheet(pairs, 16, scale=1).save(partial, "webp", quality=85)
    print(result)


if __name__ == "__main__":
    main()
