"""Name the features of a world's dictionary: each value is fitted by its effect on the prediction, without a scorer.

    python -m training.experiments.label --out examples/shapes-rtsae

Labels are fitted to pairs of prompts of combinations that were trained on: some name another value, some leave the
factor open, and some name the value already and must not change. Each fit is stored in --work; the same command
continues. At the end labels replace those of the same name; values whose effect is below --least get no label.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffusers_rtsae import load_dictionary
from diffusers_rtsae.analysis.fit import FittedFeature, fit_feature
from diffusers_rtsae.files import read_json, write_json

from ..commands import Adding
from ..worlds.pictures import add_models, calling, load_pipeline, new_parser, parse
from .steering import pairs


def stored(folder: Path, value: str) -> FittedFeature | None:
    """The feature that an earlier run fitted, if there is one."""
    path = folder / f"{value}.json"
    if not path.is_file():
        return None
    tensors = folder / f"{value}.safetensors"
    return FittedFeature(read_json(path), load_file(tensors) if tensors.is_file() else {})


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "dictionary")
    parser.add_argument("--out", type=Path, help="dictionary to write; the same by default")
    parser.add_argument("--work", type=Path, default=Path("runs/labels"), help="folder of the fitted features")
    parser.add_argument("--values", nargs="*", action=Adding, help="values to label; all by default")
    parser.add_argument("--pairs", type=int, default=24, help="of prompts; a third of them leave the factor open")
    parser.add_argument("--latents", type=int, default=24)
    parser.add_argument("--rank", type=int, default=8, help="of a linear map; 0 fits latents instead")
    parser.add_argument("--least", type=float, default=0.1, help="smallest effect of a label")
    parser.add_argument("--fit-only", action="store_true", help="leave the dictionary as it is")
    a, world = parse(parser)
    pipe = load_pipeline(a.pipeline, a.device, a.dtype)
    dictionary = load_dictionary(a.dictionary, dtype=torch.float32)
    pipe.load_rtsae(dictionary)
    a.work.mkdir(parents=True, exist_ok=True)
    targets = [target for target in world.targets if a.values is None or target[1] in a.values]
    call = calling(pipe, a)
    for factor, value in targets:
        if stored(a.work, value):
            continue
        leave_open = a.pairs // 3
        different, same = pairs(world, factor, value, a.pairs - leave_open, leave_open, already=8, seed=0)
        fitted = fit_feature(pipe, different, a.latents, same, a.rank or None, **call)
        if fitted.maps:
            save_file(fitted.maps, a.work / f"{value}.safetensors")
        write_json(a.work / f"{value}.json", {"factor": factor, "value": value} | fitted.label)
        print(f"{factor} {value}: {fitted}", flush=True)
    if a.fit_only:
        return
    result = load_dictionary(a.dictionary)
    for _, value in targets:
        fitted = stored(a.work, value)
        result.labels.pop(value, None)
        if fitted.measured["effect"] >= a.least:
            result.add_label(value, fitted.label, fitted.maps)
    order = [value for _, value in world.targets]
    result.labels = dict(sorted(result.labels.items(), key=lambda item: order.index(item[0])))
    result.save(a.out or a.dictionary)


if __name__ == "__main__":
    main()
