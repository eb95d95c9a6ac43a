"""Commands that are handed to the trainer: `collect`, `train` and `evaluate`."""

from __future__ import annotations

import os
import subprocess
import sys

import typer

from ..worlds import ROOT
from .common import app, check_extras


def run_trainer(command: str, arguments: list[str], *extras: str) -> None:
    """Hand the arguments to the trainer, which nothing in the package imports: it runs beside it, on its own."""
    check_extras("train", *extras)
    commands = ROOT / "training" / "commands.py"
    if not commands.is_file():
        raise ValueError(f"{commands} is missing: install diffusers-rtsae again.")
    code = f"from training import commands; commands.{command}('diffusers-rtsae {command}')"
    # -P: of all that may be called training, here or among other packages, it is the one that came with this package
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run([sys.executable, "-P", "-c", code, *arguments], env=os.environ | {"PYTHONPATH": path})
    sys.exit(run.returncode)


FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=FORWARDED)
def collect(context: typer.Context) -> None:
    """Collect the trajectories of a recipe and stop; `train` with the same recipe goes on from there.

    Example: diffusers-rtsae collect training/recipes/sd15.yaml --work runs/sd15
    """
    run_trainer("collect", context.args)


@app.command(context_settings=FORWARDED)
def train(context: typer.Context) -> None:
    """Collect, fit, train, evaluate and save the dictionaries of a recipe.

    Example: diffusers-rtsae train training/recipes/sd15.yaml --out runs/sd15 --dry-run
    """
    run_trainer("train", context.args)


@app.command(context_settings=FORWARDED)
def evaluate(context: typer.Context) -> None:
    """Report how well dictionaries describe a pipeline.

    Example: diffusers-rtsae evaluate runs/sd15 --pipeline MODEL --prompts prompts.txt
    """
    run_trainer("evaluate", context.args, "analysis")
