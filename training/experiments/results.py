"""The results of a measurement: rows in a JSON file, which an interrupted run continues, and their tables."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from diffusers_rtsae import SparseDictionary
from diffusers_rtsae.dictionary import CONFIG_NAME
from diffusers_rtsae.files import write_json

from ..evaluation.reconstruction import stability


def contents(*folders: Path) -> str:
    """A short hash of the weights and labels in some folders, whose paths do not identify their content."""
    digest = hashlib.blake2b(digest_size=8)
    for folder in folders:
        for path in sorted(
            p for p in Path(folder).rglob("*") if p.suffix == ".safetensors" or p.name == "labels.json"
        ):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def dictionaries_in(folder: Path, recipe: str) -> list[Path]:
    """The folders of dictionaries in the output folder of a training; raises `ValueError` if there are none."""
    folders = sorted(path.parent for path in folder.glob(f"*/{CONFIG_NAME}"))
    if not folders:
        raise ValueError(f"{folder} holds no dictionaries: train `recipes/{recipe}.yaml` first.")
    return folders


def add_stability(rows: list[dict], saes: dict[str, SparseDictionary]) -> None:
    """Add `stability` to the rows of each kind that has several dictionaries."""
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        names = dict.fromkeys(row["dictionary"] for row in of_kind)
        if len(names) > 1:
            shared = stability([saes[name] for name in names])
            for row in of_kind:
                row["stability"] = shared


class Results:
    """
    The rows of a measurement. Each is written when it is added; a run with the same settings continues the file.

    Args:
        a (`argparse.Namespace`): the arguments of the measurement. All are settings, except `world` (whose models are
            settings), `out`, `device` and `batch_size`.
        folders (`list[Path]`): of the models that are measured.
        said_by_rows (`tuple[str, ...]`): arguments that are no settings, because every row records its own value.
        settings: further settings, which are no arguments.

    Raises:
        `ValueError`: the file at `a.out` was measured with other settings.
    """

    def __init__(
        self, a: argparse.Namespace, folders: list[Path], said_by_rows: tuple[str, ...] = (), **settings: str
    ):
        apart = ("world", "out", "device", "batch_size", *said_by_rows)
        self.path: Path = a.out
        self.settings = {name: str(value) for name, value in vars(a).items() if name not in apart}
        self.settings |= {"contents": contents(*folders)} | settings
        self.rows: list[dict] = []
        self.measured = ""  # the day of the last rows
        if self.path.exists():
            stored = json.loads(self.path.read_text())
            if stored["settings"] != self.settings:
                raise ValueError(
                    f"{self.path} was measured with other settings: {stored['settings']}. Choose another --out."
                )
            self.rows, self.measured = stored["rows"], stored["measured"]

    def has(self, **entries) -> bool:
        """Whether there is a row with these entries."""
        return any(entries.items() <= row.items() for row in self.rows)

    def add(self, *rows: dict) -> None:
        """Add rows, and write the file."""
        self.rows += rows
        self.measured = datetime.date.today().isoformat()
        self.write()

    def write(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"settings": self.settings, "measured": self.measured, "rows": self.rows})

    def tell(self, markdown: str) -> None:
        """Print a summary of the rows. `page` writes that of the committed rows to a page."""
        print(markdown)


def table(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    heads = list(heads)
    rows = [heads, ["---"] * len(heads), *lines]
    return "".join("|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|\n" for row in rows)


def folded(title: str, text: str) -> str:
    """A part of a page that is folded until it is clicked."""
    return f"<details><summary>{title}</summary>\n\n{text}\n</details>\n"


def best(rows: Iterable[dict]) -> dict:
    """The row with the largest success minus leakage."""
    return max(rows, key=lambda row: row["success"] - row["leakage"])


def figures(row: dict) -> str:
    """Success / leakage / valid."""
    return f"{row['success']:.2f} / {row['leakage']:.2f} / {row['valid']:.2f}"


def spread(values: list[float]) -> str:
    """Mean ± standard deviation."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"
