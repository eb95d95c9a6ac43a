"""Every example runs on the bundled world, with few steps, and writes what it says."""

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from diffusers_rtsae.analysis import fit

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "common.py")
LONG = ("training_your_own.py", "fit_feature.py", "who_gets_drawn.py")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in SCRIPTS]
)
def test_example_runs_and_writes_pictures(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--steps", "3", "--out", str(tmp_path)])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for constant, value in {"_PICTURES": 2, "_STEPS": 3, "_LAST": 4, "_CHOICE": 2, "_RIDGES": (0.003,)}.items():
        monkeypatch.setattr(fit, constant, value)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    told = capsys.readouterr().out
    written = list(tmp_path.glob("*.png"))
    assert written and all(path.name in told for path in written)
    for path in written:
        assert len(Image.open(path).convert("RGB").getcolors(1 << 20)) > 20


@pytest.mark.slow
def test_the_notebook_runs_and_is_stored_with_what_it_shows(monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other take long beside other work
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    stored = [[output.output_type for output in cell.outputs] for cell in cells]
    assert sum("image/png" in o.data for cell in cells for o in cell.outputs) == 8
    for cell in cells:
        cell.source = cell.source.replace("steps = 25", "steps = 3")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    assert [[o.output_type for o in cell.outputs if o.output_type != "stream"] for cell in cells] == stored
