"""Which of the 2,048 latents is red? From prompts, from a region of a picture, and seen over denoising time.

python examples/finding_features.py
"""

import torch
from common import arguments, load, save

from diffusers_rtsae.analysis.find import find_features, top_features
from diffusers_rtsae.analysis.plots import plot_heat_maps
from diffusers_rtsae.analysis.record import record

a = arguments(__doc__)
pipe = load(a)
pipe.set_progress_bar_config(disable=True)
call = {"num_inference_steps": a.steps, "guidance_scale": 3.0}
red, blue = (
    [f"a large {colour} {s} on the left, flat, on white" for s in ("star", "heart")] for colour in ("red", "blue")
)
found = find_features(pipe, red, blue, count=5, verify=2, **call)
print(found)

recording = record(pipe, red[0], generator=torch.Generator().manual_seed(0), **call)
left = torch.zeros(64, 64)
left[:, :32] = 1
print(top_features(recording, mask=left, count=5))
active = [feature for feature in found if feature.present > 0]  # some steer and are never active by themselves
save(plot_heat_maps(recording, ["red", *active[:2]], columns=6), a.out / "finding_features.png")
