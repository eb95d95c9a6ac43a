"""What the examples share: the bundled pipeline with its dictionary, and a row of pictures."""

import argparse
from pathlib import Path

from diffusers import StableDiffusionPipeline
from PIL import Image

import diffusers_rtsae  # noqa: F401 - gives pipelines their methods

HERE = Path(__file__).parent


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--pipeline", default=HERE / "shapes-sd", help="folder or Hub id")
    parser.add_argument("--dictionary", default=HERE / "shapes-rtsae", help="folder or Hub id, for that pipeline")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    return a


def load(a: argparse.Namespace) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(a.pipeline)
    pipe.load_rtsae(a.dictionary)
    return pipe


def row(images: list[Image.Image], path: Path, height: int = 192) -> None:
    """Write pictures side by side."""
    images = [
        image.resize((image.width * height // image.height, height), Image.Resampling.NEAREST) for image in images
    ]
    sheet = Image.new("RGB", (sum(image.width + 4 for image in images), height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (sum(other.width + 4 for other in images[:i]), 0))
    sheet.save(path)
    print(path)
