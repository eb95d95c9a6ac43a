"""What it costs to begin: processor time of a process that imports the package, or that runs a command without a
model, beside one that imports a pipeline."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable

from .timing import rows, take_turns

PIPELINE = "from diffusers import StableDiffusionPipeline"
COMMANDS = ["--help", "--version", "steer --help", "inspect", "list", "train --help", "steer star redd=1"]


def process(*arguments: str) -> Callable[[], float]:
    """Seconds of processor that Python takes with these arguments, with all it starts."""

    def run() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return run


def measure(budget: float) -> list[dict]:
    contenders = {"importing StableDiffusionPipeline": process("-c", PIPELINE)}
    contenders["importing diffusers_rtsae, then that"] = process("-c", f"import diffusers_rtsae; {PIPELINE}")
    for command in COMMANDS:
        contenders[f"diffusers-rtsae {command}"] = process("-m", "diffusers_rtsae.cli", *command.split())
    return rows(take_turns(contenders, budget))
