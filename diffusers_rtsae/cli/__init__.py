"""`diffusers-rtsae`: the command line. What is on standard output with `--json` is JSON and nothing else."""

from __future__ import annotations

from typing import NoReturn

# the order of these is that of `--help`
from .common import EXTRAS, app, errors, escape  # isort: split

from .steering import demo, steer  # isort: split

from .analysis import find, fit, inspect, report  # isort: split

from .browser import app_  # isort: split

from .dictionaries import convert, list_, push  # isort: split

from .training import collect, evaluate, train

__all__ = [
    "app", "app_", "collect", "convert", "demo", "evaluate", "find", "fit", "inspect", "list_", "push", "report",
    "run", "steer", "train",
]  # fmt: skip


def run() -> None:
    """Entry point: what a user got wrong is one sentence, not a traceback."""
    try:
        app()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = next((extra for extra, modules in EXTRAS.items() if missing in modules), None)
        if extra is None:
            raise
        fail(f'This needs {missing}: pip install "diffusers-rtsae[{extra}]"')
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}." if error.filename and error.strerror else str(error))
    except ValueError as error:
        fail(str(error))


def fail(reason: str) -> NoReturn:
    errors.print("[red]error:[/red]", escape(reason), soft_wrap=True)
    raise SystemExit(1) from None
