"""Whom does a model draw when the prompt does not say? Count, and even it out without touching the prompt.

    python examples/who_gets_drawn.py

Each picture is steered to one value of every factor that the prompt leaves open, all values as often as each other, in
an order that has nothing to do with the picture.
"""

import random
from collections import Counter

import torch
from common import HERE, arguments, load, show

from diffusers_rtsae.analysis.scorer import FactorScorer

a = arguments(__doc__, "people-dit", "people-rtsae")
pipe = load(a)
scorer = FactorScorer.from_pretrained(HERE / "people-scorer")
prompts = [f"a {role}" for role in ("firefighter", "teacher", "judge", "cook")] * 15
values = {factor: scorer.factors[factor] for factor in ("tone", "who")}


def draw() -> torch.Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    call = {
        "num_inference_steps": a.steps,
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
        "clean_caption": False,
    }
    return pipe(prompts, generator=generators, output_type="pt", **call).images.clamp(0, 1)


def told(images: torch.Tensor) -> None:
    seen = scorer.read(images)
    for factor in values:
        print(f"  {factor}:", dict(Counter(one[factor] for one in seen).most_common()))
    right = sum(one["role"] in prompt for one, prompt in zip(seen, prompts, strict=True))
    print(f"  the role is right in {right} of {len(prompts)}")


before = draw()
print("as it is")
told(before)

strengths, rng = {}, random.Random(0)
for names in values.values():
    order = rng.sample([names[i % len(names)] for i in range(len(prompts))], len(prompts))
    strengths |= {name: [float(name == one) for one in order] for name in names}
with pipe.rtsae_steering(strengths):  # one strength an image
    after = draw()
print("evened out")
told(after)
rows = [pipe.image_processor.numpy_to_pil(images[:24].permute(0, 2, 3, 1).numpy()) for images in (before, after)]
show([row[i : i + 12] for row in rows for i in (0, 12)], a.out / "who_gets_drawn.png", size=64)
