"""
The lines of the README and of the package's page work as they are printed: each command, with fewer steps, and all
Python in its order, on the bundled pipeline instead of models that would have to be downloaded. What CI runs as
printed is not run again.
"""

import functools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from small_analysis import find_less, fit_less
from typer.testing import CliRunner

from diffusers_rtsae.cli import app
from training import commands

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": ROOT / "README.md", "the package's page": ROOT / "diffusers_rtsae" / "README.md"}


def code(page: Path, language: str) -> str:
    """All that a page has in one language."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return "\n".join(blocks)


LINES = [line.split("  #")[0] for page in PAGES.values() for line in code(page, "bash").splitlines()]
COMMANDS = sorted({command.strip() for line in LINES for command in line.split(" && ") if command.strip()})
ELSEWHERE = (  # CI, and test_cli.py
    "pip install", "python -m pytest", "python -m pdoc", "diffusers-rtsae demo", "diffusers-rtsae app",
)  # fmt: skip
FEWER = {
    "steer": ["--steps", "1"],
    "find": ["--steps", "2", "--seeds", "1"],
    "fit": ["--steps", "3"],
    "report": ["--steps", "1", "--count", "1", "--steered", "1", "--prompts", "prompts.txt"],
    "train": ["--dry-run"],
}
LARGE = {  # what is downloaded, and what takes its place
    "CompVis/stable-diffusion-v1-4": str(ROOT / "examples" / "shapes-sd"),
    "bcywinski/SAeUron": str(ROOT / "examples" / "shapes-rtsae"),
    "torch.float16": "torch.float32",
    '"cuda"': '"cpu"',
}


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """An empty folder to work in, and everything as short as it can be."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red star\n")
    fit_less(monkeypatch)


@pytest.mark.parametrize("line", [command for command in COMMANDS if not command.startswith(ELSEWHERE)])
def test_a_command_works_as_printed(line, quick, monkeypatch):
    program, *arguments = shlex.split(line)
    if program == "diffusers-rtsae":
        result = CliRunner().invoke(app, [*arguments, *FEWER.get(arguments[0], [])])
        assert result.exit_code == 0, result.output or result.exception
    else:
        assert arguments[:2] == ["-m", "training.train"], f"nothing here runs {line!r}"
        monkeypatch.setattr("sys.argv", [*arguments[1:], *FEWER["train"]])
        commands.train()


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_the_python_works_as_printed(page, quick, monkeypatch):
    python = code(page, "python")
    for there, here in LARGE.items():
        python = python.replace(there, here)
    call = StableDiffusionPipeline.__call__

    @functools.wraps(call)
    def fewer_steps(self, *arguments, **options):
        return call(self, *arguments, **options | {"num_inference_steps": 3})

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", fewer_steps)
    find_less(monkeypatch)
    mask = np.zeros((64, 64), dtype=np.float32)
    mask[:, :32] = 1
    exec(compile(python, str(page), "exec"), {"mask_image": mask, "left_half": mask})  # which are the reader's own


def test_the_package_page_needs_no_repository_around_it():
    """Its links and pictures are addresses, not places in a clone."""
    targets = re.findall(r"\]\(([^)]*)\)", PAGES["the package's page"].read_text(encoding="utf-8"))
    assert targets and all(target.startswith("https://") for target in targets)
