"""Rivals of the labels of a world's dictionary: fitted to the same pairs and the same goal, by other means.

    python -m training.experiments.rivals --out runs/rivals
    python -m training.experiments.table --rivals runs/rivals --out training/results/labels.json

Writes a dictionary for each rival, with a label for each value:

- `direction`: one direction for each anchor, the mean change of the activation over the tokens on which the two
prompts
  make a difference.
- `free direction`: one direction for each anchor, the one with the largest effect, fitted by gradient.
- `latents`: few latents of the dictionary with signed weights, chosen by pursuit (`fit_feature`).
- `random latents`: the same fit with as many random latents of the dictionary.

A label takes up to some minutes, so only every n-th value (--every) is fitted. Fits are stored separately for each
dictionary and each choice of settings; the same command continues.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffusers_rtsae import Dictionary, load_dictionary
from diffusers_rtsae.analysis.effect import States, frozen
from diffusers_rtsae.analysis.fit import fit_feature
from diffusers_rtsae.files import read_json, whole, write_json
from diffusers_rtsae.models import SparseDictionary

from ..commands import Adding
from ..worlds.pictures import add_models, calling, load_pipeline, new_parser, parse
from .constants import axes, free_direction, mean_change
from .results import contents
from .steering import as_dictionary, pairs

CONSTANT = ("direction", "free direction")
LATENTS = ("latents", "random latents")
RIVALS = CONSTANT + LATENTS
STEPS = 400  # of gradient, for a free direction


def subset(sae: SparseDictionary, latents: list[int]) -> SparseDictionary:
    """A dictionary that has only some of the latents of another."""
    count = sae.config.num_latents
    settings = {name: value for name, value in sae.config.items() if not name.startswith("_")}
    made = type(sae)(**settings | {"num_latents": len(latents), "k": min(sae.config.k, len(latents))})
    made.load_state_dict(
        {name: value[latents] if value.shape[:1] == (count,) else value for name, value in sae.state_dict().items()}
    )
    return made


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "dictionary")
    parser.add_argument("--out", type=Path, default=Path("runs/rivals"))
    parser.add_argument("--latents", type=int, default=16)
    parser.add_argument("--every", type=int, default=3, help="fit rivals for every n-th value")
    parser.add_argument("--only", nargs="*", action=Adding, choices=RIVALS, default=list(RIVALS))
    a, world = parse(parser)
    pipe = load_pipeline(a.pipeline, a.device, a.dtype)
    dictionary = load_dictionary(a.dictionary, dtype=torch.float32)
    dictionary = replace(dictionary, labels={}, maps={})
    ((site, sae),) = dictionary.sites.items()
    call = calling(pipe, a)
    settings = f"{a.steps}-{a.guidance:g}-{a.latents}-{STEPS}"
    work = a.out / "work" / f"{contents(a.pipeline, a.dictionary)}-{settings}"
    work.mkdir(parents=True, exist_ok=True)
    targets = world.targets[:: a.every]
    for i, (factor, value) in enumerate(targets):
        target = {"factor": factor, "value": value}
        different, same = pairs(world, factor, value, contradicted=16, leave_open=8, already=8, seed=0)
        for rival in CONSTANT:
            path = work / f"{rival}-{value}.safetensors"
            if rival not in a.only or path.exists():
                continue
            pipe.load_rtsae(axes(sae))
            states = States(pipe, different, **call)
            if rival == "direction":
                direction = mean_change(states, site)
            else:
                with frozen(pipe):
                    direction = free_direction(states, STEPS)
            pipe.unload_rtsae()
            with whole(path) as partial:
                save_file({"direction": direction}, partial)
        generator = torch.Generator().manual_seed(i)
        chosen = torch.randperm(sae.config.num_latents, generator=generator)[: a.latents].tolist()
        for rival in LATENTS:
            path = work / f"{rival}-{value}.json"
            if rival not in a.only or path.exists():
                continue
            pipe.load_rtsae(dictionary if rival == "latents" else Dictionary({site: subset(sae, chosen)}))
            fitted = fit_feature(pipe, different, a.latents, same, **call)
            pipe.unload_rtsae()
            entries = [entry for entry in fitted.label["features"] if entry["bounds"][1] > 0]
            if rival == "random latents":
                entries = [
                    entry | {key: entry[key] and [chosen[j] for j in entry[key]] for key in ("latents", "where")}
                    for entry in entries
                ]
            write_json(path, target | fitted.label | {"features": entries, "seen": []})
            print(f"{rival}, {factor} {value}: {fitted}", flush=True)
    for rival in set(CONSTANT) & set(a.only):
        rows = [load_file(work / f"{rival}-{value}.safetensors")["direction"] for _, value in targets]
        labels = {
            value: {"factor": factor, "value": value, "edit": {"apply_to": "cond"}}
            | {"features": [{"site": site, "latents": [row], "weights": [1.0], "where": None}]}
            for row, (factor, value) in enumerate(targets)
        }
        made = as_dictionary(site, list(sae.config.anchors), torch.stack(rows))
        Dictionary({site: made}, labels).save(a.out / rival)
    for rival in LATENTS:
        labels = {value: read_json(path) for _, value in targets if (path := work / f"{rival}-{value}.json").exists()}
        if rival in a.only and labels:
            replace(dictionary, labels=labels).save(a.out / rival)


if __name__ == "__main__":
    main()
