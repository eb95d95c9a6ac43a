"""The trainer's commands. Arguments and recipes are checked before any library that takes seconds to import."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from .recipe import INDEX, Collect, bundled, load_recipe

_TRAIN = """Train the dictionaries of a recipe: collect, fit, train, evaluate, save.

    {prog} training/recipes/shapes.yaml --out runs/shapes

Every stage continues where it was stopped. A GPU is used if there is one; several processes (accelerate launch -m
training.train) share the work.
"""
_COLLECT = """Collect the trajectories of a recipe and stop; training with the same recipe goes on from there.

    {prog} training/recipes/shapes.yaml --work runs/shapes
"""
_EVALUATE = """How well dictionaries reconstruct held-out trajectories, and what the denoiser predicts from that.

    {prog} examples/shapes-rtsae --pipeline examples/shapes-sd --prompts shapes --out runs/report

Works with any pipeline and dictionary; writes report.json, report.md and plots. Dictionaries of another process than
denoising are measured on a folder of its trajectories, all of which count as held out:

    {prog} runs/sequences --trajectories FOLDER --out runs/report
"""


class Adding(argparse.Action):
    """For a flag with several values: a flag that is given again adds to them."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if before is self.default else [*before, *values])


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog, description=description.format(prog=prog), formatter_class=formatter)


@contextlib.contextmanager
def _one_sentence(parser: argparse.ArgumentParser):
    """Turn errors that the user can mend into one sentence, without a traceback."""
    try:
        yield
    except (OSError, ValueError, MemoryError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


def collect(prog: str, arguments: Sequence[str] | None = None) -> None:
    """The first stage of a recipe: its trajectories."""
    train(prog, arguments, collect_only=True)


def train(
    prog: str = "python -m training.train", arguments: Sequence[str] | None = None, collect_only: bool = False
) -> None:
    """All stages of a recipe, or a dry run; with the arguments of this process by default."""
    parser = _parser(prog, _COLLECT if collect_only else _TRAIN)
    parser.add_argument("recipe", type=Path, help="YAML file; training/recipes has some")
    if not collect_only:
        parser.add_argument("--out", type=Path, help="folder to write the dictionary to")
        parser.add_argument("--collect-only", action="store_true", help="stop when the trajectories are collected")
    parser.add_argument(
        "--work", type=Path, help="folder for shards and checkpoints; runs/<name of the recipe> by default"
    )
    parser.add_argument("--shards", help="where to keep shards, if not in the work folder: any URL that fsspec knows")
    parser.add_argument(
        "--set", nargs="*", action=Adding, default=[], metavar="KEY=VALUE", help="change the recipe: train.k=8"
    )
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the time, memory and disk that the run would take, and stop"
    )
    parser.add_argument(
        "--teraflops", type=float, default=50.0, help="speed of the device, for the dry run; %(default)s by default"
    )
    parser.set_defaults(**{"out": None, "collect_only": True} if collect_only else {})
    a = parser.parse_args(arguments)
    try:
        recipe = load_recipe(a.recipe, a.set)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if a.collect_only and recipe.trajectories is not None:
        parser.error("this recipe is for `trajectories` that exist: there is nothing to collect")
    if a.collect_only and recipe.collect.buffer is not None and not a.dry_run:
        parser.error("this recipe streams (`collect.buffer`): it keeps no trajectories to collect")
    if a.out is None and not a.collect_only and not a.dry_run:
        parser.error("the following arguments are required: --out")
    with _one_sentence(parser):
        if a.dry_run:
            if recipe.trajectories is None and not Path(bundled(recipe.pipeline)).is_dir():
                from diffusers_rtsae.dictionary import check_available

                check_available(recipe.pipeline, INDEX)
            from .plan import describe, plan

            print(describe(plan(recipe, a.teraflops), a.teraflops))
        else:
            from .run import run_all

            work = a.work or Path("runs") / a.recipe.stem
            run_all(recipe, a.out, work, a.shards, a.cpu, a.collect_only)


def evaluate(prog: str = "python -m training.evaluate", arguments: Sequence[str] | None = None) -> None:
    """A report of any dictionaries of any pipeline."""
    parser = _parser(prog, _EVALUATE)
    parser.add_argument("dictionaries", nargs="+", help="folders or Hub ids, all of one pipeline")
    parser.add_argument("--pipeline", help="folder or Hub id")
    parser.add_argument("--prompts", help="a world, a file or a dataset, as in a recipe's `collect`")
    parser.add_argument("--trajectories", help="folder of safetensors, instead of a pipeline and prompts")
    parser.add_argument("--count", type=int, default=128, help="pictures to draw; %(default)s by default")
    parser.add_argument("--steps", type=int, default=25, help="of denoising; %(default)s by default")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale; %(default)s by default")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures drawn at once; %(default)s by default")
    parser.add_argument("--tokens", type=int, default=64, help="tokens kept of each picture; %(default)s by default")
    parser.add_argument("--seed", type=int, default=1, help="of the noise; %(default)s by default")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="folder; %(default)s by default")
    parser.add_argument("--device", help="a GPU if there is one, by default")
    a = parser.parse_args(arguments)
    if (a.trajectories is None) != (a.pipeline is not None and a.prompts is not None):
        parser.error("expected either --pipeline and --prompts, or --trajectories")

    with _one_sentence(parser):
        if a.trajectories is not None:
            from .evaluation.report import evaluate_sequences

            evaluate_sequences(a.dictionaries, a.trajectories, a.out, a.device)
            return
        collect = Collect(
            prompts=a.prompts, count=a.count, steps=a.steps, guidance_scale=a.guidance, batch_size=a.batch_size,
            tokens_per_image=a.tokens,
        )  # fmt: skip
        from .evaluation.report import evaluate_all

        evaluate_all(a.dictionaries, a.pipeline, collect, a.seed, a.out, a.device)
