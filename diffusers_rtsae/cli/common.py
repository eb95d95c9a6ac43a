"""What the commands share: options, checks of what was typed, loading and printing."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.padding import Padding
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f'The command line needs {error.name}: pip install "diffusers-rtsae[analysis]"') from None

from .. import __version__
from ..worlds import WORLDS, World, bundled, load_bundled

# what is imported below is imported by the command that needs it: torch alone takes a second or two
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
console, errors = Console(emoji=False, highlight=False), Console(stderr=True, emoji=False, highlight=False)
GENERAL_PROMPTS = ["a photo of a car in a street", "a portrait of an old man", "a house by the sea, oil painting"]
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
EXTRAS = {  # that bring a module
    "analysis": ("matplotlib", "rich", "typer"),
    "app": ("gradio",),
    "train": ("datasets", "pydantic", "scipy", "tokenizers", "tqdm", "yaml"),
}


def finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"expected a finite number, got {value}.")
    return value


Pipeline = Annotated[str | None, typer.Option(help="Folder or Hub id of the pipeline; the world's by default.")]
Source = Annotated[str | None, typer.Option(help="Folder or Hub id of the dictionary; the world's by default.")]


def parse_world(name: str) -> World:
    if name not in WORLDS:
        raise typer.BadParameter(f"expected one of {list(WORLDS)}, got {name!r}.")
    return WORLDS[name]


Bundled = Annotated[
    World,
    typer.Option(
        "--world", parser=parse_world, metavar="shapes|people", help="Bundled pipeline and dictionary to use."
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Number of denoising steps.")]
Guidance = Annotated[float, typer.Option(callback=finite, help="Guidance scale.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the noise.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures drawn at once; fewer need less memory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def print_version(asked: bool) -> None:
    if asked:
        print(f"diffusers-rtsae {__version__}")
        raise typer.Exit(0)


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """See and steer what a text-to-image model does while it denoises."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it tells of torchvision, which nothing here needs


def say(text: str) -> None:
    """Print a line as it is: no markup, and broken nowhere, so that paths in it can be copied."""
    console.print(text, markup=False, soft_wrap=True)


def say_aside(text: str) -> None:
    """Print a line beside the results, to standard error, as it is."""
    errors.print(text, markup=False, soft_wrap=True)


def show_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a table whose cells are shown whole, as they are."""
    table = Table(*head)
    for name in table.columns:
        name.overflow = "fold"
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def show_entry(head: str, *lines: str) -> None:
    """Print a paragraph as wide as the terminal, indented below its head."""
    console.print(head, markup=False, soft_wrap=True)
    for line in filter(None, lines):
        console.print(Padding(escape(line), (0, 0, 0, 4)))


def read_dictionary(dictionary: str | None, weights: bool = True, world: World = WORLDS["shapes"]):
    """What a dictionary says besides its tensors, and the folder in which it lies; they are fetched too."""
    from ..dictionary import locate, read_contents

    folder = locate(dictionary or bundled(world.dictionary), weights=weights)
    return read_contents(folder), folder


def load_pipeline(pipeline: str | None, dictionary: str | Path, world: World):
    """A text-to-image pipeline with a dictionary loaded, on a GPU if there is one."""
    import torch
    import transformers
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    import diffusers_rtsae  # noqa: F401 - gives pipelines their methods

    if pipeline is None:  # loaded in a moment
        logging.set_verbosity_error()  # PixArt tells at every call that it cleans no captions
        logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    dtype = torch.float16 if on_gpu else torch.float32
    if pipeline is None:
        pipe = load_bundled(world.pipeline, dtype=dtype)
    else:
        pipe = DiffusionPipeline.from_pretrained(pipeline, dtype=dtype)
    pipe.set_progress_bar_config(file=sys.stderr, leave=False)
    pipe.load_rtsae(dictionary)
    return pipe.to("cuda") if on_gpu else pipe


def parse_strengths(features: Sequence[str]) -> dict[str, float]:
    """`red=1.5` → `{"red": 1.5}`."""
    chosen: dict[str, float] = {}
    for feature in features:
        name, separator, strength = feature.rpartition("=")
        try:
            value = float(strength)
        except ValueError:
            value = math.nan
        if not separator or not math.isfinite(value):
            raise ValueError(f"Expected FEATURE=STRENGTH, like red=1.5 or 1234=-0.5, got {feature!r}.")
        if name in chosen:
            raise ValueError(f"The feature {name!r} is given twice: expected one strength of each.")
        chosen[name] = value
    return chosen


def check_prompts(prompts: Sequence[str], option: str) -> None:
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError(f"A prompt of {option} is empty: expected words.")


def check_output(out: Path, endings: Sequence[str] = (), is_folder: bool = False) -> None:
    """Raise unless a file with one of these endings, or a folder, can be written there."""
    if endings and out.suffix.lower() not in endings:
        raise ValueError(f"{out} must end in {', '.join(endings)}.")
    if out.exists() and out.is_dir() != is_folder:
        raise OSError(f"{out} is a {'file' if is_folder else 'folder'}: expected another name to write to.")
    there = out if is_folder and out.exists() else next(path for path in out.absolute().parents if path.exists())
    if not there.is_dir():
        raise OSError(f"{out} cannot be written: {there} is a file.")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror}.") from None


def read_picture(path: Path | None):
    """A picture, read."""
    if path is None:
        return None
    from PIL import Image

    with Image.open(path) as image:
        image.load()
    return image


def check_extras(*extras: str) -> None:
    """Raise unless these extras are installed."""
    for extra in extras:
        for module in EXTRAS[extra]:
            if importlib.util.find_spec(module) is None:
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)
