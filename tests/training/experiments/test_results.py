"""Rows of a measurement: continued by the same settings, refused to others, and shown as they were committed."""

import json
from argparse import Namespace

import pytest

from training.experiments import page
from training.experiments.results import Results, contents, table


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


@pytest.mark.parametrize("world", page.PAGES)
def test_the_committed_page_is_that_of_the_committed_rows(world):
    one = page.PAGES[world]
    assert page.written(one) == (one.folder / "README.md").read_text(), "run `python -m training.experiments.page`"


def test_a_page_tells_every_file_and_which_are_of_other_weights(tmp_path):
    committed = page.PAGES["shapes"]
    stored = json.loads((committed.folder / "together.json").read_text())
    current = page.contents(*(page.ROOT / stored["settings"][name] for name in ("pipeline", "dictionary")))
    stored["settings"]["contents"] = current
    (tmp_path / "together.json").write_text(json.dumps(stored))
    one = committed._replace(folder=tmp_path)
    assert "| painted |" in page.written(one) and page.STALE not in page.written(one)
    stored["settings"]["contents"] = "others"
    (tmp_path / "together.json").write_text(json.dumps(stored))
    assert page.STALE in page.written(one)
    (tmp_path / "new.json").write_text("{}")
    with pytest.raises(ValueError, match="a section in page.py for each of .'new'"):
        page.written(one)
