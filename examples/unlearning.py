"""Take a concept away from a model without training: scale its features below zero, whatever the prompt asks for.

python examples/unlearning.py
"""

import torch
from common import arguments, load, show

a = arguments(__doc__)
pipe = load(a)
prompts = [f"a large blue {shape} in the centre, flat, on white" for shape in ("heart", "cross", "star")]


def draw():
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(prompts, generator=generators, num_inference_steps=a.steps, guidance_scale=3.0).images


before = draw()
pipe.set_rtsae_features({"heart": -2.0}, operation="scale", clip=False)  # stays until it is changed
show([before, draw()], a.out / "unlearning.png")
