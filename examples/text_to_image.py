"""Steer a text-to-image generation: one feature each by strength, then two at once, each for a part of the time.

python examples/text_to_image.py
"""

import torch
from common import arguments, load, save, show

from diffusers_rtsae.analysis.plots import plot_strengths

a = arguments(__doc__)
pipe = load(a)
call = {"num_inference_steps": a.steps, "guidance_scale": 3.0}
strengths = [-1.0, 0.0, 0.5, 1.0, 2.0]
prompts = {  # each leaves open what is steered
    "red": "a large heart on the left, flat, on a gray background",
    "square": "a large blue object in the centre, flat, on a white background",
    "navy": "a large red star in the centre, flat",
    "dotted": "a large green circle in the centre, on a white background",
}


def noise(count: int = 1) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(0) for _ in range(count)]


rows = []
for feature, prompt in prompts.items():
    with pipe.rtsae_steering({feature: strengths}):  # one strength a prompt
        rows.append((feature, prompt, pipe([prompt] * 5, generator=noise(5), **call).images))
save(plot_strengths(rows, strengths, "One feature each, by strength"), a.out / "steering.png")

images = [rows[0][2][1]]
with (
    pipe.rtsae_steering({"striped": 1.0}, end=0.7),
    pipe.rtsae_steering({"orange": lambda progress: 2 - 2 * progress}),
):
    images += pipe(prompts["red"], generator=noise(), **call).images
    ((first, *_),) = pipe.rtsae_report().values()  # of each step: what was edited, and how large the edit was
    print(first)
show([images], a.out / "text_to_image.png")
