"""Whom does a model draw when the prompt does not say? Count, and even it out without touching the prompt.

python examples/who_gets_drawn.py

Each picture is steered to one value of every factor that the prompt leaves open, all values as often as each other, in
an order that has nothing to do with the picture.
"""

import random
from collections import Counter

import torch
from common import arguments, load, show

from diffusers_rtsae import bundled
from diffusers_rtsae.analysis.scorer import FactorScorer

a = arguments(__doc__, "people-dit", "people-rtsae", steps=20)
pipe = load(a)
scorer = FactorScorer.from_pretrained(bundled("people-scorer"))
roles = ("firefighter", "teacher", "judge", "cook")
named = [role for role in roles for _ in range(12)]
values = {factor: scorer.factors[factor] for factor in ("tone", "who")}


def draw() -> torch.Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(len(named))]
    call = {"num_inference_steps": a.steps, "guidance_scale": 3.0, "clean_caption": False}
    call |= {"use_resolution_binning": False, "output_type": "pt"}
    return pipe([f"a {role}" for role in named], generator=generators, **call).images.clamp(0, 1)


def tell(images: torch.Tensor) -> None:
    seen = scorer.read(images)
    for factor in values:
        print(f"  {factor}:", dict(Counter(one[factor] for one in seen).most_common()))
    right = sum(one["role"] == role for one, role in zip(seen, named, strict=True))
    print(f"  the role is right in {right} of {len(named)}")


before = draw()
print("as it is")
tell(before)

strengths, rng = {}, random.Random(0)
for names in values.values():
    order = rng.sample([names[i % len(names)] for i in range(len(named))], len(named))
    strengths |= {name: [float(name == one) for one in order] for name in names}
with pipe.rtsae_steering(strengths):  # one strength an image
    after = draw()
print("evened out")
tell(after)
some = [i for i in range(len(named)) if i % 12 < 6]  # of each role
rows = [pipe.image_processor.numpy_to_pil(images[some].permute(0, 2, 3, 1).numpy()) for images in (before, after)]
show([row[i : i + 12] for i in range(0, len(some), 12) for row in rows], a.out / "who_gets_drawn.png", size=64)
