"""Steer only a part of the picture: a mask, or the tokens on which another feature is active.

python examples/spatial_steering.py
"""

import numpy as np
import torch
from common import arguments, load, show

a = arguments(__doc__)
pipe = load(a)
prompt = "a large star on the left of a large heart, flat, on white"


def draw():
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, generator=generator, num_inference_steps=a.steps, guidance_scale=3.0).images[0]


left = np.zeros((64, 64), dtype=np.float32)
left[:, :32] = 1
images = [draw()]
with pipe.rtsae_steering({"red": 1.0}, mask=left):
    images.append(draw())
with pipe.rtsae_steering({"red": 1.0}, mask=1 - left):
    images.append(draw())
with pipe.rtsae_steering({"blue": 1.0}, where="heart"):
    images.append(draw())
show([images], a.out / "spatial_steering.png")
