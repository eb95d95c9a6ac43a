"""Find a concept in a dictionary that others published, and draw without it.

python examples/published_dictionary.py

Downloads Stable Diffusion 1.4 and a dictionary of SAeUron (arXiv 2501.18052), some gigabytes in all.
"""

import argparse
from pathlib import Path

import torch
from common import show
from diffusers import DiffusionPipeline

import diffusers_rtsae  # noqa: F401 - gives pipelines the methods with `rtsae` in their name
from diffusers_rtsae.analysis.find import find_features

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--pipeline", default="CompVis/stable-diffusion-v1-4", help="folder or Hub id")
parser.add_argument("--dictionary", default="bcywinski/SAeUron", help="folder or Hub id, for that pipeline")
parser.add_argument("--site", default="up_blocks.1.attentions.1", help="the block to steer")
parser.add_argument("--with", dest="positive", nargs="+", default=["a photo of a dog on grass", "a dog in a room"])
parser.add_argument("--without", dest="negative", nargs="+", default=["a photo of grass", "a room"])
parser.add_argument("--count", type=int, default=5, help="how many latents to take away")
parser.add_argument("--steps", type=int, default=25)
parser.add_argument("--out", type=Path, default=Path("runs/examples"))
a = parser.parse_args()
a.out.mkdir(parents=True, exist_ok=True)

pipe = DiffusionPipeline.from_pretrained(a.pipeline).to("cuda" if torch.cuda.is_available() else "cpu")
pipe.load_rtsae(a.dictionary, layers=[a.site])
call = {"num_inference_steps": a.steps}

# SAeUron publishes no statistics, so presence is in units of the activation itself
features = find_features(pipe, a.positive, a.negative, count=a.count, by="presence", **call)
print(features)


def draw():
    generators = [torch.Generator().manual_seed(i) for i in range(len(a.positive))]
    return pipe(a.positive, generator=generators, **call).images


before = draw()
with pipe.rtsae_steering({(f.site, f.index): 0.0 for f in features}, operation="scale"):
    show([before, draw()], a.out / "published_dictionary.png", size=before[0].width)
