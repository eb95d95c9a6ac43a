"""Train a dictionary for a pipeline, make a slider of its latents, and steer with it: from prompts to a picture.

    python examples/training_your_own.py

Takes about four minutes on two cores. A real one takes more pictures and steps: see training/README.md.
"""

import sys

import torch
from common import HERE, arguments, load, show

from diffusers_rtsae.analysis.fit import fit_feature

sys.path.insert(0, str(HERE.parent))  # the trainer is part of the clone, not of the package
from training.recipe import Recipe  # noqa: E402
from training.train import run  # noqa: E402

a = arguments(__doc__)
prompts, colours = a.out / "prompts.txt", ("red", "blue", "green", "orange")
prompts.write_text(
    "\n".join(
        f"a {size} {colour} {shape}" for size in ("small", "large") for colour in colours
        for shape in ("star", "heart", "circle", "cross")
    )
)  # fmt: skip
recipe = Recipe(
    pipeline=str(a.pipeline),
    base_model="shapes-sd",
    sites=["up_blocks.1.attentions.1"],
    anchors=3,
    collect={
        "prompts": str(prompts), "count": 32, "steps": a.steps, "guidance_scale": 3.0, "batch_size": 4,
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
    (f"a large {colour} {shape}", f"a large orange {shape}") for shape in ("star", "heart") for colour in colours[:3]
]
fitted = fit_feature(pipe, pairs, latents=16, **call)
print(fitted)
pipe.add_rtsae_label("my orange", fitted)
pipe.save_rtsae(a.out / "dictionary")

strengths = [0.0, 0.5, 1.0]
images = []
for prompt in ("a large blue circle", "a large green cross"):  # of shapes that the pairs did not have
    generators = [torch.Generator().manual_seed(0) for _ in strengths]
    with pipe.rtsae_steering({"my orange": strengths}):
        images.append(pipe([prompt] * len(strengths), generator=generators, **call).images)
show(images, a.out / "training_your_own.png")
