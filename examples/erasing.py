"""Take things out of a picture: where a feature is seen, tokens become like the rest of the picture.

python examples/erasing.py
"""

import numpy as np
import torch
from common import arguments, load, show

a = arguments(__doc__)
pipe = load(a)
prompts = [
    "a large red heart on the left of a large blue star, flat, on white",
    "a small green circle above a small pink heart, dotted, on navy",
    "a large orange heart to the right of a large cyan cross, with a soft gradient, on black",
]


def draw():
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(prompts, generator=generators, num_inference_steps=a.steps, guidance_scale=3.0).images


rows = [draw()]
with pipe.rtsae_steering({"heart": 1.0}, operation="erase"):  # wherever the dictionary sees one
    rows.append(draw())
left = np.zeros((64, 64), dtype=np.float32)
left[:, :32] = 1
with pipe.rtsae_steering({"heart": 1.0}, operation="erase", where="everywhere", mask=left):  # all that is painted
    rows.append(draw())
show(rows, a.out / "erasing.png")
