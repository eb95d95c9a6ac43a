"""
The README's lines work as they are printed: each command, with fewer steps, and all Python in its order, on the
bundled pipeline instead of models that would have to be downloaded. What CI runs as printed is not run again.
"""

import functools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from typer.testing import CliRunner

from diffusers_rtsae.analysis import find, fit
from diffusers_rtsae.cli import app
from training import commands

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = "\n".join(block for language, block in BLOCKS if language == "python")
LINES = [line.split("  #")[0] for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
COMMANDS = [command.strip() for line in LINES for command in line.split(" && ") if command.strip()]
ELSEWHERE = ("pip install", "python -m pytest", "diffusers-rtsae demo", "diffusers-rtsae app")  # CI, and test_cli.py
FEWER = {
    "steer": ["--steps", "1"],
    "find": ["--steps", "2", "--seeds", "1"],
    "fit": ["--steps", "3"],
    "report": ["--steps", "1", "--count", "1", "--steered", "1", "--prompts", "prompts.txt"],
    "train": ["--dry-run"],
}
LARGE = {  # what is downloaded, and what takes its place
    "stable-diffusion-v1-5/stable-diffusion-v1-5": str(ROOT / "examples" / "shapes-sd"),
    "org/sd15-rtsae": str(ROOT / "examples" / "shapes-rtsae"),
    "torch.float16": "torch.float32",
    '"cuda"': '"cpu"',
}


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """An empty folder to work in, and everything as short as it can be."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red star\n")
    for constant, value in {"_PICTURES": 2, "_STEPS": 3, "_LAST": 4, "_CHOICE": 2}.items():
        monkeypatch.setattr(fit, constant, value)


def test_there_are_lines():
    assert (
        PYTHON and COMMANDS and all(command.split()[0] in ("pip", "python", "diffusers-rtsae") for command in COMMANDS)
    )


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


def test_the_python_works_as_printed(quick, monkeypatch):
    code = PYTHON
    for there, here in LARGE.items():
        code = code.replace(there, here)
    call = StableDiffusionPipeline.__call__

    @functools.wraps(call)
    def fewer_steps(self, *arguments, **options):
        return call(self, *arguments, **options | {"num_inference_steps": 3})

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", fewer_steps)
    monkeypatch.setattr(find, "_PASSES", 2)
    mask = np.zeros((64, 64), dtype=np.float32)
    mask[:, :32] = 1
    exec(compile(code, "README.md", "exec"), {"mask_image": mask, "left_half": mask})  # which are the reader's own
