"""Steer a text-to-image generation: one feature by strength, then two at once, each for part of the time.

python examples/text_to_image.py
"""

import torch
from common import arguments, load, row

a = arguments(__doc__)
pipe = load(a)
prompt = "a large heart on the left, flat, on a gray background"
call = {"num_inference_steps": a.steps, "guidance_scale": 3.0}


def noise(count: int = 1) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(0) for _ in range(count)]


strengths = [0.0, 0.5, 1.0, 1.5]
with pipe.rtsae_steering({"red": strengths}):  # one strength a prompt
    row(pipe([prompt] * 4, generator=noise(4), **call).images, a.out / "red.png")

with (
    pipe.rtsae_steering({"striped": 1.0}, end=0.7),
    pipe.rtsae_steering({"orange": lambda progress: 2 - 2 * progress}),
):
    image = pipe(prompt, generator=noise(), **call).images[0]
row([image], a.out / "striped-orange.png")
print(pipe.rtsae_report())  # how much was edited, and how much lay outside the training data
