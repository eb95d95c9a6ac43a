"""What do latents make? Named from prompts alone, and each drawn at strength 1.

python examples/naming.py
"""

import torch
from common import arguments, load, save
from matplotlib.figure import Figure

from diffusers_rtsae import bundled
from diffusers_rtsae.analysis.names import name_features
from diffusers_rtsae.files import read_lines

a = arguments(__doc__)
pipe = load(a)
pipe.set_progress_bar_config(disable=True)
call = {"num_inference_steps": a.steps, "guidance_scale": 3.0}
names = name_features(pipe, read_lines(bundled("shapes-prompts.txt")), ["red", "star", "small", "striped"], **call)
print(names)

surest = {}
for name in names:
    surest.setdefault((name.by, name.name), name)
words = [name for name in surest.values() if name.by == "word"][:8]
looks = [name for name in surest.values() if name.by == "look"][:5]
steered = [{}] + [{(name.site, name.index): 1.0} for name in [*words, *looks]]
titles = ["as it is", *(f"{name.index}: {name.name}" for name in [*words, *looks])]

figure = Figure(figsize=(11, 4.2), layout="constrained")
for axis, features, title in zip(figure.subplots(2, 7).flat, steered, titles, strict=False):
    with pipe.rtsae_steering(features):
        image = pipe("a large blue circle", generator=torch.Generator().manual_seed(0), **call).images[0]
    axis.imshow(image)
    axis.set_title(title, fontsize=8)
for axis in figure.axes:
    axis.axis("off")
save(figure, a.out / "naming.png")
