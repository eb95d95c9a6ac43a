"""What the examples share: a bundled pipeline with its dictionary, and rows of pictures."""

import argparse
import io
from pathlib import Path

from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from PIL import Image

from diffusers_rtsae import bundled, load_bundled


def arguments(
    description: str, pipeline: str = "shapes-sd", dictionary: str = "shapes-rtsae", steps: int = 25
) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--pipeline", default=bundled(pipeline), help="folder or Hub id")
    parser.add_argument("--dictionary", default=bundled(dictionary), help="folder or Hub id, for that pipeline")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    return a


def load(a: argparse.Namespace) -> DiffusionPipeline:
    is_bundled = isinstance(a.pipeline, Path)
    pipe = load_bundled(a.pipeline.name) if is_bundled else DiffusionPipeline.from_pretrained(a.pipeline)
    pipe.load_rtsae(a.dictionary)
    return pipe


def show(rows: list[list[Image.Image]], path: Path, size: int = 128) -> None:
    """Write rows of pictures of one size, in 256 colours to be small."""
    step = size + 4
    sheet = Image.new("RGB", (step * max(map(len, rows)) - 4, step * len(rows) - 4), "white")
    for y, images in enumerate(rows):
        for x, image in enumerate(images):
            sheet.paste(image.resize((size, size), Image.Resampling.NEAREST), (step * x, step * y))
    few_colours(sheet).save(path)
    print(path)


def few_colours(image: Image.Image) -> Image.Image:
    return image.quantize(method=Image.Quantize.MAXCOVERAGE, kmeans=4, dither=Image.Dither.NONE)


def save(figure: Figure, path: Path) -> None:
    """Write a figure, in 256 colours to be small."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90)
    few_colours(Image.open(buffer).convert("RGB")).save(path)
    print(path)
