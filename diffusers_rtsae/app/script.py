"""The script that makes the same picture."""

from __future__ import annotations

import torch

from .studio import Wish


def as_code(pipeline: str, dictionary: str, dtype: torch.dtype, device: str, wish: Wish) -> str:
    """A script that makes the same picture."""
    call, arguments = dict(wish.call), [f"{key}={value!r}" for key, value in wish.options.items()]
    lines = ["import torch", "from diffusers import DiffusionPipeline"]
    if wish.mask is not None:
        lines += ["from PIL import Image"]
        arguments.append('mask=Image.open("mask.png")')
    generator = f"torch.Generator().manual_seed({wish.seed})"
    called = [repr(call.pop("prompt")), f"generator={generator}", *(f"{k}={v!r}" for k, v in call.items())]
    loaded = repr(pipeline) if dtype == torch.float32 else f"{pipeline!r}, dtype={dtype}"
    moved = "" if device == "cpu" else f".to({device!r})"
    name, of = ("images", "images") if "num_images_per_prompt" in call else ("image", "images[0]")
    return "\n".join(
        [
            *lines, "", "import diffusers_rtsae", "",
            f"pipe = DiffusionPipeline.from_pretrained({loaded}){moved}",
            f"pipe.load_rtsae({dictionary!r})",
            f"pipe.set_rtsae_features({', '.join([repr(wish.features), *arguments])})",
            f"{name} = pipe({', '.join(called)}).{of}",
        ]
    )  # fmt: skip
