"""Train a dictionary for a pipeline, make sliders with it, and steer: from prompts to a picture.

    python examples/training_your_own.py

Takes some minutes on two cores. A real one takes more pictures and steps: see training/README.md.
"""

import itertools
import sys
from pathlib import Path

import torch
from common import arguments, load, show

from diffusers_rtsae.analysis.fit import fit_feature

sys.path.insert(0, str(Path(__file__).parents[1]))  # the trainer is part of the clone, not of the package
from training.recipe import Recipe  # noqa: E402
from training.run import run  # noqa: E402

a = arguments(__doc__)
places = "on the left", "on the right", "at the top", "at the bottom"


def prompt(colour: str, shape: str, place: str) -> str:
    return f"a large {colour} {shape} {place}, flat, on white"


colours, shapes = ("red", "blue", "green", "orange"), ("star", "heart", "circle", "cross")
prompts = a.out / "prompts.txt"
prompts.write_text("\n".join(prompt(*named) for named in itertools.product(colours, shapes, places)))
recipe = Recipe(
    pipeline=str(a.pipeline),
    base_model="shapes-sd",
    sites=["up_blocks.1.attentions.1"],
    anchors=3,
    collect={
        "prompts": str(prompts), "count": 64, "steps": a.steps, "guidance_scale": 3.0, "batch_size": 4,
        "tokens_per_image": 64,
    },
    train={"num_latents": 256, "k": 8, "steps": 300, "batch_size": 256, "learning_rate": 2e-3, "validation": 0.25},
)  # fmt: skip
run(recipe, a.out / "dictionary", a.out / "work")

pipe = load(a)
pipe.set_progress_bar_config(disable=True)
pipe.unload_rtsae()
pipe.load_rtsae(a.out / "dictionary")
call = {"num_inference_steps": a.steps, "guidance_scale": 3.0}
pairs = [
    (prompt(colour, shape, place), prompt("orange", shape, place))
    for colour, shape, place in itertools.product(("red", "blue", "green"), ("star", "heart"), places[:2])
]
strengths, images = [0.0, 0.5, 1.0], []
for label, by in (("latents", {"latents": 16}), ("map", {"rank": 8})):
    fitted = fit_feature(pipe, pairs, **by, **call)
    print(fitted)
    pipe.add_rtsae_label(f"orange, {label}", fitted)
    generators = [torch.Generator().manual_seed(0) for _ in strengths]
    with pipe.rtsae_steering({f"orange, {label}": strengths}):  # on a shape that the pairs did not have
        images.append(pipe([prompt("blue", "circle", places[0])] * 3, generator=generators, **call).images)
pipe.save_rtsae(a.out / "dictionary")
show(images, a.out / "training_your_own.png")
