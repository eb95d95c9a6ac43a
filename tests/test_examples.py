"""Every example runs on the bundled world, with few steps, and writes what it says."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_analysis import find_less, fit_less

EXAMPLES = Path(__file__).parents[1] / "examples"
PUBLISHED = "published_dictionary.py"  # downloads a large model: run on the bundled one below
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in ("common.py", PUBLISHED))
LONG = ("training_your_own.py", "fit_feature.py", "who_gets_drawn.py")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in SCRIPTS]
)
def test_example_runs_and_writes_pictures(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--steps", "3", "--out", str(tmp_path)])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    find_less(monkeypatch)
    fit_less(monkeypatch)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    told = capsys.readouterr().out
    written = list(tmp_path.glob("*.png"))
    assert written and all(path.name in told for path in written)
    for path in written:
        assert len(Image.open(path).convert("RGB").getcolors(1 << 20)) > 20


@pytest.mark.filterwarnings("ignore:.*how active its latents are", "ignore:To read some latents")
def test_the_example_of_a_published_dictionary(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    folder, d, m = tmp_path / "SAeUron" / "unet.up_blocks.1.attentions.1", 160, 64
    folder.mkdir(parents=True)
    config = {"d_in": d, "num_latents": m, "expansion_factor": 0, "k": 4, "batch_topk": True, "sample_topk": False}
    (folder / "cfg.json").write_text(json.dumps(config))
    rows = torch.nn.functional.normalize(torch.randn(m, d), dim=1)
    tensors = {"encoder.weight": rows, "encoder.bias": torch.zeros(m), "W_dec": rows.clone(), "b_dec": torch.zeros(d)}
    save_file(tensors, folder / "sae.safetensors")
    arguments = ["--pipeline", str(EXAMPLES / "shapes-sd"), "--dictionary", str(tmp_path / "SAeUron"), "--steps", "2"]
    arguments += ["--with", "a red star", "--without", "a blue heart", "--count", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [PUBLISHED, *arguments])
    find_less(monkeypatch)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / PUBLISHED), run_name="__main__")
    assert "up_blocks.1.attentions.1" in capsys.readouterr().out
    sheet = Image.open(tmp_path / "published_dictionary.png").convert("RGB")
    above, below = (sheet.crop((0, top, 64, top + 64)) for top in (0, 68))
    assert above.tobytes() != below.tobytes()


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
