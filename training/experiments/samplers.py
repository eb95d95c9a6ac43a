"""Does a dictionary trained on one sampler and step count steer the others?

    python -m training.experiments.samplers --out training/results/samplers.json

The labelled features at strength 1, on prompts that leave their factor open, with every sampler and step count. Rows
are added to the JSON as they are measured; the same command continues where it was stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import diffusers
from diffusers import DiffusionPipeline
from tqdm import tqdm

from diffusers_rtsae import load_dictionary
from diffusers_rtsae.denoiser import noise_schedule

from ..commands import Adding
from ..worlds.pictures import add_models, load_models, new_parser, parse
from .results import Results, table
from .steering import mean, measure, run, score


class Samplers(NamedTuple):
    """
    Samplers for pipelines of one kind.

    known (`dict[str, tuple[str, dict]]`): scheduler class of each, and its differences from the pipeline's
    configuration. reference (`tuple[str, int]`): the sampler and number of steps that dictionaries are trained on.
    elsewhere (`tuple[str, int]`): a sampler and number of steps that no dictionary was trained on.
    """

    known: dict[str, tuple[str, dict]]
    reference: tuple[str, int]
    elsewhere: tuple[str, int]


NOISE = Samplers(
    {
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
    },
    reference=("DDIM", 25),
    elsewhere=("DPM++ 2M", 12),
)
FLOW = Samplers(  # for flow-matching models in pipelines such as PixArt's, which have no flow-matching sampler
    {
        "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
        "DPM++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        "Euler": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
        "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        "DPM++ 2S": ("DPMSolverSinglestepScheduler", {}),
        "UniPC": ("UniPCMultistepScheduler", {}),
        "DEIS": ("DEISMultistepScheduler", {"algorithm_type": "deis"}),
    },
    reference=("DPM++ 2M", 20),
    elsewhere=("UniPC", 12),
)


def samplers_of(pipe: DiffusionPipeline) -> Samplers:
    """The samplers that suit a pipeline."""
    return FLOW if noise_schedule(pipe.scheduler) is None else NOISE


def scheduler(pipe: DiffusionPipeline, name: str):
    """The sampler `name` for a pipeline."""
    kind, options = samplers_of(pipe).known[name]
    return getattr(diffusers, kind).from_config(pipe.scheduler.config, **options)


def markdown(rows: list[dict]) -> str:
    """Success / mean leakage for each sampler and step count, and how many settings reach 95 % of the reference."""
    cells = {(r["sampler"], r["steps"]): r for r in rows}
    steps = sorted({r["steps"] for r in rows})
    lines = []
    for sampler in dict.fromkeys(r["sampler"] for r in rows):
        found = [cells.get((sampler, s)) for s in steps]
        lines.append([sampler] + [f"{r['success']:.2f} / {r['leakage_mean']:.2f}" if r else "–" for r in found])
    text = table(["sampler", *(f"{s} steps" for s in steps)], lines)
    found = [kind.reference for kind in (NOISE, FLOW) if kind.reference in cells]
    if not found:
        return text
    name, count = found[0]
    reference = cells[name, count]
    kept = {s: [r for r in rows if r["steps"] == s and r["success"] >= 0.95 * reference["success"]] for s in steps}
    counts = ", ".join(f"{len(kept[s])} of {sum(r['steps'] == s for r in rows)} with {s}" for s in steps)
    return f"{text}\nAt least 95 % of the success of {name} with {count} steps: {counts}.\n"


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "scorer", "dictionary")
    parser.add_argument("--out", type=Path, default=Path("runs/samplers.json"))
    parser.add_argument("--labels", nargs="*", action=Adding, help="all of the dictionary by default")
    parser.add_argument("--prompts", type=int, default=4, help="for each label")
    parser.add_argument("--step-counts", nargs="*", action=Adding, type=int, default=[25, 4, 10, 50, 100])
    a, world = parse(parser)
    pipe, scorer = load_models(a)
    dictionary = load_dictionary(a.dictionary)
    labels = {name: dictionary.labels[name] for name in a.labels or dictionary.labels}
    pipe.load_rtsae(dictionary)
    results = Results(a, [a.pipeline, a.dictionary], said_by_rows=("steps", "step_counts"))
    probes = [world.probe(label["factor"], label["value"], "open", a.prompts, seed=300) for label in labels.values()]
    known = {name: scheduler(pipe, name) for name in samplers_of(pipe).known}
    for steps in a.step_counts:
        for name, sampler in tqdm(known.items(), desc=f"{steps} steps", unit="sampler"):
            if results.has(sampler=name, steps=steps):
                continue
            pipe.scheduler = sampler
            plain = score(world, scorer, run(pipe, probes, None, steps, a.guidance, a.batch_size), probes)
            strengths = [{label: 1.0} for label in labels]
            images = run(pipe, probes, strengths, steps, a.guidance, a.batch_size, masks=False)
            cells = [
                measure(now, was, one.factor, one.value)
                | {"plain_valid": sum(bool(p["valid"]) for p in was) / len(was)}
                for now, was, one in zip(score(world, scorer, images, probes), plain, probes, strict=True)
            ]
            results.add({"sampler": name, "steps": steps, "n": len(labels) * a.prompts} | mean(cells))
            print(results.rows[-1], flush=True)
    results.tell(markdown(results.rows))


if __name__ == "__main__":
    main()
