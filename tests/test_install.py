"""What a wheel holds and asks for, and what importing the package costs."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from diffusers_rtsae import cli, worlds

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETTINGS = PROJECT["tool"]["setuptools"]


def tracked(folder: str) -> set[str]:
    """The files of a folder that belong to the repository, or all that are no by-products where there is none."""
    try:
        told = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return set(told.split())
    except (OSError, subprocess.CalledProcessError):
        found = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {str(path.relative_to(ROOT)) for path in found}


def packed() -> set[str]:
    """The files of the repository that go into a wheel, as pyproject.toml has it."""
    found = set()
    for package in SETTINGS["packages"]:
        mapped = next((p for p in sorted(SETTINGS["package-dir"], reverse=True) if package.startswith(p)), None)
        below = package.removeprefix(mapped).strip(".") if mapped else package
        folder = Path(SETTINGS["package-dir"].get(mapped, ""), *filter(None, below.split(".")))
        patterns = ["*.py", *SETTINGS["package-data"].get(package, [])]
        for path in (path for pattern in patterns for path in (ROOT / folder).glob(pattern) if path.is_file()):
            found.add(str(path.relative_to(ROOT)))
    return found


def test_a_wheel_has_the_package_the_trainer_and_the_bundled_worlds():
    wheel, training = packed(), tracked("training")
    assert {path for path in tracked("diffusers_rtsae") if not path.endswith(".md")} <= wheel
    left = {path for path in training if path.startswith(("training/experiments/", "training/results/"))}
    assert {path for path in training - left if not path.endswith("README.md")} <= wheel and not left & wheel
    world = {
        path
        for path in tracked("examples")
        if re.match("examples/(shapes|people)-(sd|dit|rtsae|scorer|prompts)", path)
    }
    assert world <= wheel and 20e6 < sum((ROOT / path).stat().st_size for path in wheel) < 80e6


def test_the_bundled_files_are_found_beside_the_package_or_in_it(tmp_path, monkeypatch):
    assert worlds.bundled("shapes-sd") == ROOT / "examples" / "shapes-sd"
    monkeypatch.setattr(worlds, "ROOT", tmp_path)
    (tmp_path / "examples" / "shapes-sd").mkdir(parents=True)
    assert worlds.bundled("shapes-sd") == tmp_path / "examples" / "shapes-sd"
    with pytest.raises(ValueError, match="Nothing called 'shapes' comes with the package: .*shapes-sd"):
        worlds.bundled("shapes")


def test_the_extras_are_those_of_the_package():
    names = {"yaml": "pyyaml"}
    for extra, modules in cli.common.EXTRAS.items():
        wanted = [re.split("[<>=]", one)[0] for one in PROJECT["project"]["optional-dependencies"][extra]]
        assert sorted(names.get(module, module) for module in modules) == sorted(
            one for one in wanted if not one.startswith("diffusers-rtsae")
        )


def imported(code: str) -> set[str]:
    """What is imported once `code` has run in a Python of its own, where no library tells what it could do with
    others."""
    told = f"import sys\n{code}\nprint(*sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0 and "[transformers]" not in done.stderr, done.stderr
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"torch", "numpy", "diffusers", "transformers", "matplotlib", "gradio"}
COMMANDS = """
from typer.testing import CliRunner
from diffusers_rtsae.cli import app
for arguments in {arguments}:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == {code}, (arguments, result.output, result.exception)
"""


def test_what_needs_no_model_imports_none():
    """Help, the version, an index and what is said of a dictionary; the package itself; and what a user got wrong."""
    shown = [["--help"], ["--version"], ["steer", "--help"], ["list"]]
    assert not imported("import diffusers_rtsae") & {*HEAVY, "huggingface_hub"}
    told = COMMANDS.format(arguments=shown, code=0)
    assert not imported(told) & HEAVY
    wrong = [["steer", "a star"], ["steer", "a star", "red"], ["steer", "a star", "redd=1"], ["inspect", "README.md"],
             ["steer", "a star", "red=1", "--out", "a.doc"], ["find", "--with", " ", "--without", "a"]]  # fmt: skip
    assert not imported(COMMANDS.format(arguments=wrong, code=1)) & (HEAVY - {"numpy"})
    told = COMMANDS.format(arguments=[["inspect"], ["inspect", "--json"]], code=0)
    assert not imported(told) & (HEAVY - {"numpy"})  # safetensors reads names with numpy


def test_the_trainer_checks_what_it_is_told_before_it_imports_torch():
    told = """
sys.path.insert(0, ".")
from training import commands
for command, arguments in (("train", ["--help"]), ("collect", ["--help"]), ("evaluate", ["--help"]),
                           ("train", ["none.yaml"]), ("train", ["training/recipes/shapes.yaml"])):
    sys.argv = ["", *arguments]
    try:
        getattr(commands, command)(f"diffusers-rtsae {command}")
    except SystemExit as end:
        assert end.code == (0 if "--help" in arguments else 2)
"""
    assert not imported(told) & HEAVY


def test_pipelines_that_are_imported_later_have_their_methods_and_bundled_ones_load_in_silence():
    """Those that nobody imports stay out. (The other order is that of every other test.)"""
    told = """
import diffusers_rtsae
from diffusers import DiffusionPipeline
assert DiffusionPipeline.load_rtsae and issubclass(DiffusionPipeline, diffusers_rtsae.RTSAELoaderMixin)
assert "diffusers.modular_pipelines.modular_pipeline" not in sys.modules
from diffusers import ModularPipeline
assert ModularPipeline.load_rtsae and issubclass(ModularPipeline, diffusers_rtsae.RTSAELoaderMixin)
diffusers_rtsae.load_bundled("people-dit")
"""
    assert "diffusers_rtsae.bundled_pipelines" in imported(told)


def test_the_version_is_said_once():
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    assert SETTINGS["dynamic"]["version"]["attr"] == "diffusers_rtsae.__version__"
