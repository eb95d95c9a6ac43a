"""Does a dictionary trained on one sampler and step count steer the others?

    python -m training.shapes.samplers --out training/results/samplers.json

The labelled features at strength 1, on prompts that leave their factor open, with every sampler and step count. Rows
are added to the JSON as they are measured; the same command continues where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import diffusers
from tqdm import tqdm

from diffusers_rtsae import load_dictionary
from diffusers_rtsae.analysis.scorer import FactorScorer
from diffusers_rtsae.hub import write_json

from .evaluate import add_arguments, contents, load_pipeline, stored_rows
from .steering import measure, probe, run, score

SAMPLERS = {
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {"algorithm_type": "deis"}),
}
REFERENCE = ("DDIM", 25)  # what the dictionary was trained on


def markdown(rows: list[dict]) -> str:
    """Success / leakage for each sampler and step count."""
    cells = {(r["sampler"], r["steps"]): r for r in rows}
    steps = sorted({r["steps"] for r in rows})
    text = ["| sampler | " + " | ".join(f"{s} steps" for s in steps) + " |", "| --- |" + " --- |" * len(steps)]
    for sampler in dict.fromkeys(r["sampler"] for r in rows):
        found = [cells.get((sampler, s)) for s in steps]
        text.append(
            f"| {sampler} | "
            + " | ".join(f"{r['success']:.2f} / {r['leakage_mean']:.2f}" if r else "–" for r in found)
            + " |"
        )
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--dictionary", type=Path, default=Path("examples/shapes-rtsae"))
    parser.add_argument("--out", type=Path, default=Path("runs/samplers.json"))
    parser.add_argument("--labels", nargs="*", help="all of the dictionary by default")
    parser.add_argument("--prompts", type=int, default=4, help="for each label")
    parser.add_argument("--step-counts", nargs="*", type=int, default=[25, 4, 10, 50, 100])
    a = parser.parse_args()
    pipe, scorer = load_pipeline(a.pipeline, a.device, a.dtype), FactorScorer.from_pretrained(a.scorer).to(a.device)
    dictionary = load_dictionary(a.dictionary)
    labels = {name: dictionary.labels[name] for name in a.labels or dictionary.labels}
    pipe.load_rtsae(dictionary)
    asked = ("out", "device", "batch_size", "steps", "step_counts")  # what rows say themselves
    settings = {k: str(v) for k, v in vars(a).items() if k not in asked}
    settings["contents"] = contents(a.pipeline, a.dictionary)
    rows = stored_rows(a.out, settings)
    probes = [probe(label["factor"], label["value"], "open", a.prompts, seed=300) for label in labels.values()]
    config = pipe.scheduler.config
    for steps in a.step_counts:
        for name, (kind, options) in tqdm(SAMPLERS.items(), desc=f"{steps} steps", unit="sampler"):
            if any((r["sampler"], r["steps"]) == (name, steps) for r in rows):
                continue
            pipe.scheduler = getattr(diffusers, kind).from_config(config, **options)
            plain = score(scorer, run(pipe, probes, None, steps, a.guidance, a.batch_size), probes)
            strengths = [{label: 1.0} for label in labels]
            images = run(pipe, probes, strengths, steps, a.guidance, a.batch_size, masks=False)
            cells = [
                measure(steered, was, label["factor"], label["value"])
                | {"plain_valid": sum(bool(p["valid"]) for p in was) / len(was)}
                for steered, was, label in zip(score(scorer, images, probes), plain, labels.values(), strict=True)
            ]
            mean = {key: round(sum(cell[key] for cell in cells) / len(cells), 4) for key in cells[0]}
            rows.append({"sampler": name, "steps": steps, "n": len(labels) * a.prompts} | mean)
            print(rows[-1], flush=True)
            a.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(a.out, {"settings": settings, "rows": rows})
    reference = next((r["success"] for r in rows if (r["sampler"], r["steps"]) == REFERENCE), None)
    if reference:
        kept = [r for r in rows if r["success"] >= 0.95 * reference]
        print(f"{len(kept)} of {len(rows)} settings keep 95 % of the success on the training grid ({reference:.2f})")
    a.out.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
