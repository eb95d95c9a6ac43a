"""Which pictures to make: prompts and seeds, from a world, a file or the Hub."""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from diffusers_rtsae.files import brief, read_lines

from ..recipe import Collect, bundled
from ..worlds import load_world, worlds

_BATCH = 4_096  # rows of a parquet file that are decoded at once
Take = Callable[[Sequence[int]], list]


class Sample(NamedTuple):
    """One picture to generate."""

    prompt: str
    seed: int


def read_samples(settings: Collect, seed: int) -> list[Sample]:
    """
    The pictures that a recipe asks for, each pair of prompt and seed once, in random order.

    Prompts are the captions of a world (`"shapes"`), the lines of a text file, or the rows of a `.jsonl` file, a
    `.parquet` file or a dataset on the Hub. A row without a seed gets one. Of a parquet file or a dataset only the
    columns and rows that are needed are read.

    Raises:
        `ValueError`: if there are no prompts, the column does not exist, or a row that is used (of a `.jsonl`: any
            row) holds anything else than a text, and a whole number or nothing as its seed.
        `OSError`: if the file or dataset does not exist.
    """
    source = settings.prompts
    if source in worlds():
        prompts = load_world(source).prompts(settings.count, seed)
        return [Sample(prompt, seed * 1_000_003 + i) for i, prompt in enumerate(prompts)]
    count, take = _rows(settings)
    if not count:
        raise ValueError(f"{source} holds no prompts: expected one a line.")
    order = array("I", range(count))
    random.Random(seed).shuffle(order)
    samples: dict[Sample, None] = {}
    start = 0
    while start < count and len(samples) < settings.count:
        chosen = order[start : start + max(settings.count, start)]  # repeated rows need some more
        for i, (number, row) in enumerate(zip(chosen, take(chosen), strict=True), start):
            prompt, row_seed = _checked(row, number, settings)
            samples[Sample(prompt, seed * 1_000_003 + i if row_seed is None else row_seed)] = None
        start += len(chosen)
    return list(samples)[: settings.count]


def _checked(row, number: int, settings: Collect) -> tuple[str, int | None]:
    """Prompt and seed of a row; raises `ValueError` if they are not a text and a whole number or nothing."""
    where, column = f"Row {number} of {settings.prompts}", settings.column
    if not isinstance(row, dict) or column not in row:
        raise ValueError(f"{where} has no column {column!r}, it has: {brief(row)}.")
    prompt, seed = row[column], row.get("seed")
    if not isinstance(prompt, str):
        raise ValueError(f"{where}: expected a text as {column!r}, got {brief(prompt)}.")
    whole = isinstance(seed, int | float) and not isinstance(seed, bool) and seed == seed // 1
    if seed is not None and not (whole and abs(seed) < 2**62):
        raise ValueError(f"{where}: expected a whole number or nothing as 'seed', got {brief(seed)}.")
    return prompt, None if seed is None else int(seed)


def _rows(settings: Collect) -> tuple[int, Take]:
    """The number of rows of a source, and a function that reads the rows with given numbers."""
    source = settings.prompts
    if source.endswith((".txt", ".jsonl")):
        lines = read_lines(Path(bundled(source)))
        if source.endswith(".txt"):
            return len(lines), lambda numbers: [{settings.column: lines[number]} for number in numbers]
        rows = [_parsed(line, number, source) for number, line in enumerate(lines)]
        for number, row in enumerate(rows):
            _checked(row, number, settings)
        return len(rows), lambda numbers: [rows[number] for number in numbers]
    if source.endswith(".parquet") and "://" not in source:
        return _parquet(Path(source), [settings.column, "seed"])
    from datasets import load_dataset

    parquet = source.endswith(".parquet")
    loaded = load_dataset("parquet", data_files=source) if parquet else load_dataset(source)
    loaded = loaded["train" if parquet else settings.split]
    used = [name for name in loaded.column_names if name in (settings.column, "seed")]
    loaded = loaded.select_columns(used) if used else loaded.take(1)
    return len(loaded), lambda numbers: loaded.select(numbers).to_list()


def _parsed(line: str, number: int, source: str):
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"Row {number} of {source}: expected JSON, got {brief(line)} ({error}).") from None


def _parquet(path: Path, columns: list[str]) -> tuple[int, Take]:
    """The same of a parquet file. Columns and groups of rows that are not needed are not read."""
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(path, buffer_size=2**16, pre_buffer=False)
    present = file.schema_arrow.names
    used = [name for name in columns if name in present] if columns[0] in present else present[:5]
    lengths = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]

    def take(numbers: Sequence[int]) -> list[dict]:
        missing, found, end = sorted(set(numbers), reverse=True), {}, 0  # the next row is the last
        for group, length in enumerate(lengths):
            start, end = end, end + length
            if not missing or missing[-1] >= end:
                continue
            for batch in file.iter_batches(_BATCH, row_groups=[group], columns=used, use_threads=False):
                inside = []
                while missing and missing[-1] < start + len(batch):
                    inside.append(missing.pop())
                rows = batch.take([number - start for number in inside]).to_pylist() if inside else []
                found.update(zip(inside, rows, strict=True))
                start += len(batch)
                if not missing or missing[-1] >= end:
                    break
        return [found[number] for number in numbers]

    return file.metadata.num_rows, take
