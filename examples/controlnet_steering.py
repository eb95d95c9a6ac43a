"""Steering beside a ControlNet: the dictionary belongs to the U-Net, so both act.

    python examples/controlnet_steering.py

The bundled model has no trained ControlNet: a new one is made from its U-Net, which at first changes nothing.
"""

import torch
from common import arguments, load, show
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image, ImageDraw

a = arguments(__doc__)
plain = load(a)
controlnet = ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=(16, 32, 96))  # 64 px to 16
pipe = StableDiffusionControlNetPipeline(**plain.components, controlnet=controlnet)  # the dictionary comes along
edges = Image.new("RGB", (64, 64))
ImageDraw.Draw(edges).ellipse((16, 16, 48, 48), outline="white", width=2)


def draw():
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": a.steps, "guidance_scale": 3.0, "generator": generator}
    return pipe("a large circle in the centre, flat, on white", image=edges, **call).images[0]


images = [edges, draw()]
with pipe.rtsae_steering({"purple": 1.0}):
    images.append(draw())
show([images], a.out / "controlnet_steering.png")
