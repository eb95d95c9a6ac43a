"""Commands that are handed to the trainer: `collect`, `train` and `evaluate`."""

from __future__ import annotations

import importlib
import sys

import typer

from ..worlds import ROOT
from .common import app, check_extras


def run_trainer(command: str, arguments: list[str], *extras: str) -> None:
    """
    Hand the arguments to the trainer, which nothing else in the package imports.

    A clone has it beside the package, in `training/`; a wheel brings it in `bundled/training` (see `pyproject.toml`).
    `ROOT` is the folder around either.
    """
    check_extras("train", *extras)
    if not (ROOT / "training" / "commands.py").is_file():
        raise ValueError(f"{ROOT / 'training' / 'commands.py'} is missing: install diffusers-rtsae again.")
    sys.path.insert(0, str(ROOT))  # before all else that is called training, here or among other packages
    commands = importlib.import_module("training.commands")
    getattr(commands, command)(f"diffusers-rtsae {command}", arguments)


FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=FORWARDED)
def collect(context: typer.Context) -> None:
    """Collect the trajectories of a recipe and stop; `train` continues from there.

    Example: diffusers-rtsae collect training/recipes/shapes.yaml --work runs/shapes
    """
    run_trainer("collect", context.args)


@app.command(context_settings=FORWARDED)
def train(context: typer.Context) -> None:
    """Collect, fit, train, evaluate and save the dictionaries of a recipe.

    Example: diffusers-rtsae train training/recipes/sd15.yaml --dry-run
    """
    run_trainer("train", context.args)


@app.command(context_settings=FORWARDED)
def evaluate(context: typer.Context) -> None:
    """Report how well dictionaries reconstruct the activations of a pipeline.

    Example: diffusers-rtsae evaluate examples/shapes-rtsae --pipeline examples/shapes-sd --prompts shapes
    """
    run_trainer("evaluate", context.args, "analysis")
