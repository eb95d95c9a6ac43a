"""The honest table: every labelled feature of the bundled dictionary against its baselines, judged by the scorer.

    python -m training.shapes.table --out training/results/steering.json

Rows are added to the JSON as they are measured; the same command continues where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from diffusers_rtsae import Dictionary, load_dictionary
from diffusers_rtsae.analysis.scorer import FactorScorer
from diffusers_rtsae.hub import write_json

from .evaluate import add_arguments, contents, load_pipeline, stored_rows
from .steering import (
    TARGETS,
    Probe,
    as_dictionary,
    difference_of_means,
    measure,
    probe,
    prompted,
    run,
    score,
)

KINDS = ("open", "contradicted")
BASELINES = ("feature", "means", "random")  # the last at strength 1 only, the second at positive ones


def random_directions(dictionary: Dictionary, seed: int = 0) -> Dictionary:
    """For each label a random direction with, at each anchor, the norm its feature has there at strength 1."""
    generator, sites = torch.Generator().manual_seed(seed), {}
    for site, rtsae in dictionary.sites.items():
        rows = []
        for label in dictionary.labels.values():
            entry = next((f for f in label["features"] if f["site"] == site), None)
            latents = entry["latents"] if entry else [0]
            units = rtsae.typical_activation[latents] * torch.tensor(entry["weights"] if entry else [0.0])
            norm = torch.einsum("n,ngd->gd", units, rtsae.feature_trajectories(latents).detach()).norm(dim=1)
            direction = torch.randn(rtsae.config.in_channels, generator=generator)
            rows.append(norm[:, None] * direction / direction.norm())
        sites[site] = as_dictionary(site, list(rtsae.config.anchors), torch.stack(rows))
    return Dictionary(sites)


def markdown(rows: list[dict]) -> str:
    """The table as Markdown: one line a label, success / leakage / valid on open and contradicted prompts."""
    cells = {(r["label"], r["kind"], r["method"], r["strength"]): r for r in rows}
    labels = list(dict.fromkeys(r["label"] for r in rows))

    def cell(label: str, kind: str, method: str) -> str:
        found = [r for key, r in cells.items() if key[:3] == (label, kind, method)]
        if not found:
            return "–"
        r = max(found, key=lambda r: r["success"] - r["leakage"])
        at = f" @{r['strength']:g}" if method in ("feature", "means") else ""
        return f"{r['success']:.2f} / {r['leakage']:.2f} / {r['valid']:.2f}{at}"

    methods = {
        "plain": "no edit",
        "feature": "feature",
        "means": "difference of means",
        "random": "random",
        "prompt": "edited prompt",
    }
    text = []
    for kind in KINDS:
        if not any(r["kind"] == kind for r in rows):
            continue
        text += [f"**{kind} prompts** (success / leakage / valid, at the best strength)", ""]
        text += ["| feature | " + " | ".join(methods.values()) + " |", "| --- |" + " --- |" * len(methods)]
        text += [f"| {label} | " + " | ".join(cell(label, kind, m) for m in methods) + " |" for label in labels]
        text.append("")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--dictionary", type=Path, default=Path("examples/shapes-rtsae"))
    parser.add_argument("--out", type=Path, default=Path("runs/steering.json"))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--strengths", nargs="*", type=float, default=[1.0, 2.0, 0.5, -1.0])
    parser.add_argument("--samples", type=int, default=512, help="pictures behind the difference of means")
    a = parser.parse_args()
    pipe, scorer = load_pipeline(a.pipeline, a.device, a.dtype), FactorScorer.from_pretrained(a.scorer).to(a.device)
    dictionary = load_dictionary(a.dictionary, dtype=torch.float32)
    sites, labels = list(dictionary.sites), dictionary.labels
    pipe.load_rtsae(difference_of_means(pipe, sites, a.samples, a.steps, a.guidance, a.batch_size), "means")
    pipe.load_rtsae(dictionary, "feature")
    pipe.load_rtsae(random_directions(dictionary), "random")
    settings = {k: str(v) for k, v in vars(a).items() if k not in ("out", "device", "batch_size")}
    settings["contents"] = contents(a.pipeline, a.dictionary)
    rows = stored_rows(a.out, settings)

    plans = [("plain", 0.0), ("prompt", 0.0)]
    plans += [(m, s) for s in a.strengths for m in BASELINES if m == "feature" or s == 1 or (m == "means" and s > 0)]
    for kind in KINDS:
        probes: list[Probe] = []
        for label in labels.values():
            parts = [probe(label["factor"], label["value"], kind, a.prompts, seed=100 + s) for s in a.seeds]
            probes += parts
        plain = None
        for method, strength in tqdm(plans, desc=kind, unit="setting"):
            if method != "plain" and any(
                (r["method"], r["strength"], r["kind"]) == (method, strength, kind) for r in rows
            ):
                continue
            prompts = strengths = None
            if method == "prompt":
                prompts = [prompted(one) for one in probes]
            elif method != "plain":
                strengths = []
                for i, (name, label) in enumerate(labels.items()):
                    target = TARGETS.index((label["factor"], label["value"]))
                    entries = [(f["site"], target if method == "means" else i) for f in label["features"]]
                    chosen = {name: strength} if method == "feature" else dict.fromkeys(entries, strength)
                    strengths += [chosen] * len(a.seeds)
            # directions that are no features have no range to be kept in
            options = {"adapter_name": method, "clip": method == "feature"} if strengths else {}
            images = run(
                pipe,
                probes,
                strengths,
                a.steps,
                a.guidance,
                a.batch_size,
                prompts,
                masks=method != "feature",
                **options,
            )
            readings = score(scorer, images, probes)
            if method == "plain":
                plain = (images, readings)
                if any((r["method"], r["kind"]) == (method, kind) for r in rows):
                    continue
            distance = (images - plain[0]).square().mean((1, 2, 3)).sqrt()
            per_label, position = len(a.seeds), 0
            for i, (name, label) in enumerate(labels.items()):
                cells = []
                for j in range(i * per_label, (i + 1) * per_label):
                    cells.append(measure(readings[j], plain[1][j], label["factor"], label["value"]))
                n = sum(len(probes[j].prompts) for j in range(i * per_label, (i + 1) * per_label))
                row = {"label": name, "factor": label["factor"], "kind": kind, "method": method, "strength": strength}
                row |= {k: round(sum(c[k] for c in cells) / len(cells), 4) for k in cells[0]}
                row |= {"success_per_seed": [round(c["success"], 4) for c in cells], "n": n}
                row["image_distance"] = round(distance[position : position + n].mean().item(), 4)
                position += n
                rows.append(row)
            a.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(a.out, {"settings": settings, "rows": rows})
    a.out.with_suffix(".md").write_text(markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
