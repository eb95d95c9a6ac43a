"""Which pictures a recipe asks for: what files may hold, and what is said of what they may not."""

import json

import pytest
from pyarrow import parquet, table

from training.data.prompts import Sample, read_samples
from training.recipe import Collect


def settings(source, **changes) -> Collect:
    usual = {"count": 5, "steps": 5, "guidance_scale": 4.0, "batch_size": 2, "tokens_per_image": 10}
    return Collect(prompts=str(source), **usual | changes)


def prompts(path, content: str, **changes) -> list[Sample]:
    path.write_text(content)
    return read_samples(settings(path, **changes), seed=0)


def test_prompts_from_a_text_file(tmp_path):
    found = prompts(tmp_path / "prompts.txt", "a cat\n\n  a dog \n")
    assert sorted(sample.prompt for sample in found) == ["a cat", "a dog"] and len({s.seed for s in found}) == 2
    assert len(prompts(tmp_path / "prompts.txt", "a cat\n" * 9, count=4)) == 4  # a prompt again, another picture


def test_prompts_with_seeds_are_taken_once_each(tmp_path):
    rows = [{"caption": "a cat", "seed": 1}, {"caption": "a cat", "seed": 2}, {"caption": "a cat", "seed": 1}]
    found = prompts(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)), column="caption")
    assert sorted(found) == [("a cat", 1), ("a cat", 2)]


@pytest.mark.parametrize("group", [3, 1000])
def test_rows_of_a_parquet_file_are_those_of_the_same_lines(tmp_path, group):
    """Whatever groups of rows they lie in, and in the same order."""
    rows = {"prompt": [f"a cat {i % 7}" for i in range(50)], "seed": [i % 3 or None for i in range(50)]}
    parquet.write_table(table(rows | {"other": [{"a": 1}] * 50}), tmp_path / "rows.parquet", row_group_size=group)
    lines = [json.dumps({"prompt": prompt, "seed": seed}) for prompt, seed in zip(*rows.values(), strict=True)]
    for count in (4, 20, 100):
        expected = prompts(tmp_path / "rows.jsonl", "\n".join(lines), count=count)
        assert read_samples(settings(tmp_path / "rows.parquet", count=count), seed=0) == expected
        assert len(expected) == min(count, 31)  # 14 with seeds of their own, and one for each row without


def test_only_groups_of_a_parquet_file_that_are_used_are_read(tmp_path, monkeypatch):
    parquet.write_table(table({"prompt": [str(i) for i in range(1000)]}), tmp_path / "rows.parquet", row_group_size=10)
    original, read = parquet.ParquetFile.iter_batches, []

    def noting(file, *arguments, row_groups, columns, **options):
        read.append((row_groups, columns))
        return original(file, *arguments, row_groups=row_groups, columns=columns, **options)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", noting)
    found = read_samples(settings(tmp_path / "rows.parquet", count=3), seed=0)
    assert sorted(read) == [([group], ["prompt"]) for group in sorted({int(one.prompt) // 10 for one in found})]


WRONG = {
    '"a cat"': "has no column 'prompt', it has: 'a cat'",
    '{"text": "a cat"}': "has no column 'prompt', it has: {'text': 'a cat'}",
    '{"prompt": null}': "expected a text as 'prompt', got None",
    '{"prompt": ["a cat"]}': r"expected a text as 'prompt', got \['a cat'\]",
    '{"prompt": "a cat", "seed": NaN}': "expected a whole number or nothing as 'seed', got nan",
    '{"prompt": "a cat", "seed": 1.5}': "expected a whole number or nothing as 'seed', got 1.5",
    '{"prompt": "a cat", "seed": "1"}': "expected a whole number or nothing as 'seed', got '1'",
    '{"prompt": "a cat", "seed": true}': "expected a whole number or nothing as 'seed', got True",
    '{"prompt": "a cat", "seed": 1e30}': r"expected a whole number or nothing as 'seed', got 1e\+30",
    "{prompt}": "expected JSON, got '{prompt}'",
}


@pytest.mark.parametrize("line", WRONG)
def test_every_row_is_checked(tmp_path, line):
    right = '{"prompt": "a cat", "seed": 3.0}\n'
    with pytest.raises(ValueError, match=rf"Row 2 of .*rows.jsonl:? {WRONG[line]}"):
        prompts(tmp_path / "rows.jsonl", right * 2 + line + "\n" + right * 9, count=1)


@pytest.mark.parametrize("seeds, message", [
    (None, "Row 1 of .*rows.parquet: expected a text as 'prompt', got None"),
    ([1.0, float("nan"), 2.0], "Row 1 of .*rows.parquet: expected a whole number or nothing as 'seed', got nan"),
])  # fmt: skip
def test_nulls_of_a_parquet_file(tmp_path, seeds, message):
    rows = {"prompt": ["a", None, "b"]} if seeds is None else {"prompt": ["a", "b", "c"], "seed": seeds}
    parquet.write_table(table(rows), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=message):
        read_samples(settings(tmp_path / "rows.parquet"), seed=0)


def test_prompts_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="holds no prompts: expected one a line"):
        prompts(tmp_path / "empty.txt", "\n\n")
    with pytest.raises(ValueError, match="Row 0 of .* has no column 'prompt', it has: {'text': 'a cat'}"):
        prompts(tmp_path / "rows.jsonl", '{"text": "a cat"}')
    with pytest.raises(FileNotFoundError):
        read_samples(settings(tmp_path / "none.txt"), seed=0)
