"""Rows of a measurement: continued by the same settings, refused to others, and shown as they were committed."""

import json
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest

from training.experiments.results import Results, contents, table

COMMITTED = Path(__file__).parents[3] / "training" / "results"


def test_rows_are_continued_by_the_same_settings_alone(tmp_path):
    told = {"out": tmp_path / "new" / "rows.json", "world": "shapes", "device": "cpu", "batch_size": 64}
    first = Results(Namespace(**told, prompts=8, kinds=["open"]), [], said_by_rows=("kinds",), elsewhere="here")
    first.add({"method": "add", "success": 0.5}, {"method": "swap", "success": 0.25})
    assert first.settings == {"prompts": "8", "contents": contents(), "elsewhere": "here"}
    told |= {"device": "cuda", "batch_size": 2}
    again = Results(Namespace(**told, prompts=8, kinds=[]), [], said_by_rows=("kinds",), elsewhere="here")
    assert again.rows == first.rows and again.has(method="swap") and not again.has(method="swap", success=0.5)
    with pytest.raises(ValueError, match="measured with other settings.*'prompts': '8'"):
        Results(Namespace(**told, prompts=9, kinds=[]), [], said_by_rows=("kinds",), elsewhere="here")


def test_contents_are_those_of_weights_and_labels(tmp_path):
    before = contents(tmp_path)
    (tmp_path / "notes.json").write_text("{}")
    assert contents(tmp_path) == before
    (tmp_path / "labels.json").write_text("{}")
    assert contents(tmp_path) != before


def test_a_table_has_a_line_a_row(tmp_path):
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


@pytest.mark.parametrize(
    "stem, experiment, summary",
    [
        ("steering", "table", "markdown"),
        ("fitted", "table", "markdown"),
        ("hard", "hard", "markdown"),
        ("samplers", "samplers", "markdown"),
        ("unlearn", "unlearn", "markdown"),
        ("arms", "arms", "summary"),
        ("anchors", "arms", "summary"),
    ],
)
def test_committed_tables_are_those_of_the_committed_rows(stem, experiment, summary):
    rows = json.loads((COMMITTED / f"{stem}.json").read_text())["rows"]
    made = getattr(import_module(f"training.experiments.{experiment}"), summary)(rows)
    assert made == (COMMITTED / f"{stem}.md").read_text()
