import json
import sys
from pathlib import Path

from diffusers_rtsae.analysis import fit
from training.experiments import ceiling

ROOT = Path(__file__).parents[3]


def test_a_block_is_measured_for_a_value_of_each_factor(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fit, "_PICTURES", 4)
    monkeypatch.chdir(ROOT)
    out = tmp_path / "ceiling.json"
    told = [
        "--world",
        "people",
        "--anchors",
        "2",
        "--steps",
        "2",
        "--values",
        "1",
        "--pairs",
        "4",
        "--rank",
        "2",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", ["ceiling", *told, "--sites", "transformer_blocks.0.attn2+transformer_blocks.5"])
    ceiling.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["factor"] for row in rows] == ["style", "tone", "who", "role"]
    for row in rows:
        assert row["ceiling"] > 0.7  # what the last block puts out decides, but the first one's change reaches it too
        assert row["map"] <= row["ceiling"]
    assert "| transformer_blocks.0.attn2 + transformer_blocks.5 |" in capsys.readouterr().out
