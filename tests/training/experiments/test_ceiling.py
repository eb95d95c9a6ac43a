import json
import sys
from pathlib import Path

import pytest

from diffusers_rtsae.analysis import fit
from training.experiments import ceiling

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_a_block_is_measured_for_a_value_of_each_factor(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fit, "_PICTURES", 4)
    monkeypatch.chdir(ROOT)
    out = tmp_path / "ceiling.json"
    told = f"--world people --anchors 2 --steps 2 --values 1 --pairs 4 --rank 2 --out {out}".split()
    last, both = "transformer_blocks.5", "transformer_blocks.0.attn2+transformer_blocks.5"
    monkeypatch.setattr(sys, "argv", ["ceiling", *told, "--sites", last, both])
    ceiling.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["factor"] for row in rows] == ["style", "tone", "who", "role"] * 2
    for row in rows:
        # what the last block puts out decides; of both, the first one's change reaches it too, partly added twice
        assert row["ceiling"] > (0.99 if row["site"] == last else 0.7)
        assert row["map"] <= row["ceiling"]
    assert "| transformer_blocks.0.attn2 + transformer_blocks.5 |" in capsys.readouterr().out
