"""Draw the same people in another foundry's style, whatever style the prompt asks for.

python examples/style_transfer.py

At strength 0.8: styles are all there then, and at 1 more of the picture changes with them.
"""

import torch
from common import arguments, load, show

a = arguments(__doc__, "people-dit", "people-rtsae", steps=20)
pipe = load(a)
people = (
    "a woman firefighter with dark skin",
    "a man teacher with light skin",
    "a gender-neutral judge with yellow skin",
    "a woman surfing with medium skin",
    "a man guard with medium-dark skin",
    "a gender-neutral astronaut with medium-light skin",
)


def draw(style: str) -> list:
    generators = [torch.Generator().manual_seed(i) for i in range(len(people))]
    prompts = [f"{person} in {style} style" for person in people]
    call = {"num_inference_steps": a.steps, "guidance_scale": 3.0, "clean_caption": False}
    return pipe(prompts, generator=generators, use_resolution_binning=False, **call).images


rows = []
for style, others in {"noto": ("fluent", "twemoji"), "fluent": ("noto", "twemoji")}.items():
    rows.append(draw(style))
    for other in others:
        with pipe.rtsae_steering({other: 0.8}):
            rows.append(draw(style))
show(rows, a.out / "style_transfer.png", size=64)
