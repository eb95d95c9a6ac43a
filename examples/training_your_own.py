"""Train a dictionary for a pipeline, from prompts to a folder that `load_rtsae` reads, in a minute.

    python examples/training_your_own.py

A real one takes more pictures and steps: see training/README.md.
"""

import sys

import torch
from common import HERE, arguments, load, show

sys.path.insert(0, str(HERE.parent))  # the trainer is part of the clone, not of the package
from training.recipe import Recipe  # noqa: E402
from training.train import run  # noqa: E402

a = arguments(__doc__)
prompts = a.out / "prompts.txt"
prompts.write_text(
    "\n".join(f"a {c} {s}" for c in ("red", "blue", "green", "pink") for s in ("star", "heart", "circle", "cross"))
)
recipe = Recipe(
    pipeline=str(a.pipeline),
    base_model="shapes-sd",
    sites=["up_blocks.1.attentions.1"],
    anchors=3,
    collect={
        "prompts": str(prompts), "count": 16, "steps": a.steps, "guidance_scale": 3.0, "batch_size": 4,
        "tokens_per_image": 64,
    },
    train={"num_latents": 128, "k": 8, "steps": 100, "batch_size": 256, "learning_rate": 1e-3, "validation": 0.25},
)  # fmt: skip
dictionary = run(recipe, a.out / "dictionary", a.out / "work")[""]
pipe = load(a)
pipe.unload_rtsae()
pipe.load_rtsae(a.out / "dictionary")
images = []
for strength in (0.0, 2.0):
    pipe.set_rtsae_features({int(dictionary.sites["up_blocks.1.attentions.1"].density.argmax()): strength})
    images += pipe("a star", generator=torch.Generator().manual_seed(0), num_inference_steps=a.steps).images
show([images], a.out / "training_your_own.png")
