"""Make a feature from pairs of prompts: find what acts, fit it to what changing the prompt does, and steer with it.

    python examples/fit_feature.py

Takes about three minutes on two cores. No scorer and no picture is looked at: the effect on the prediction is enough.
"""

import torch
from common import arguments, load, show

from diffusers_rtsae.analysis.find import find_features
from diffusers_rtsae.analysis.fit import fit_feature

a = arguments(__doc__)
pipe = load(a)
pipe.set_progress_bar_config(disable=True)
call = {"num_inference_steps": a.steps, "guidance_scale": 3.0}
places = ("on the left, flat, on white", "at the top, striped, on gray")
pairs = [
    (f"a large {word}star {place}", f"a large pink star {place}")
    for word in ("blue ", "green ", "")  # prompts that contradict it, and that leave it open
    for place in places
]

before, after = zip(*pairs, strict=True)
print(find_features(pipe, after, before, count=5, seeds=1, **call))  # single latents, the best first

fitted = fit_feature(pipe, pairs, unchanged=["a large pink star at the bottom, flat, on black"], rank=8, **call)
print(fitted)
pipe.add_rtsae_label("my pink", fitted)
pipe.save_rtsae(a.out / "with-my-pink")

strengths = [-1.0, 0.0, 0.5, 1.0]
generators = [torch.Generator().manual_seed(0) for _ in strengths]
with pipe.rtsae_steering({"my pink": strengths}):
    images = pipe(["a large blue star at the top, flat, on white"] * 4, generator=generators, **call).images
show([images], a.out / "fit_feature.png")
