"""Every example runs on the bundled world, with few steps, and writes what it says."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "common.py")


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_runs_and_writes_pictures(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--steps", "4", "--out", str(tmp_path)])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    told = capsys.readouterr().out
    written = list(tmp_path.glob("*.png"))
    assert written and all(path.name in told for path in written)
    for path in written:
        assert len(Image.open(path).convert("RGB").getcolors(1 << 20)) > 20
