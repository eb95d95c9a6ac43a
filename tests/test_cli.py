import json
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from diffusers_rtsae.cli import app


def test_demo_writes_its_pictures_and_measures(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--steps", "8", "--prompts", "2"])
    assert result.exit_code == 0, result.output
    for name in ("steering", "trajectories", "heat_maps"):
        picture = Image.open(tmp_path / f"{name}.png").convert("L")
        assert min(picture.size) > 200 and len(picture.getcolors(256)) > 20
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert measured and all(0 <= v <= 1 for row in measured.values() for v in row["success"].values())


def test_demo_with_a_wrong_dictionary_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-m", "diffusers_rtsae.cli", "demo", "--dictionary", str(tmp_path / "empty")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode != 0 and "rtsae_config.json" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
def test_help(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "demo" in result.output
