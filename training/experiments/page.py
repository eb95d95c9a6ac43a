"""Write the pages of measurements, one for each world, from the rows beside them: `training/results/README.md` and
`training/results/people/README.md`.

    python -m training.experiments.page

`texts.py` has the words. Every figure of a section comes from a JSON file, through the `markdown` function of the
experiment that wrote the file. A test fails if a committed page differs from what this command writes.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import textwrap
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from .results import contents, table
from .texts import (
    DRAWN,
    DRAWN_PEOPLE,
    INTRODUCTION,
    NOTES,
    PEOPLE_INTRODUCTION,
    PEOPLE_NOTES,
    PEOPLE_SECTIONS,
    SECTIONS,
    SHEET,
    Section,
)  # fmt: skip

ROOT = Path(__file__).parents[2]
APART = ("pipeline", "scorer", "dictionary", "dictionaries", "contents", "elsewhere")  # settings not listed as such

STALE = "**Measured with labels or weights that are no longer the bundled ones.**"


def drawn_people() -> str:
    """How much of what prompts name the pipeline of people draws, and how well real pictures are read."""
    found = json.loads((ROOT / "examples" / "people-dit" / "metrics.json").read_text())
    heads, lines = list(found["right"]), [["drawn", *(f"{share:.2f}" for share in found["right"].values())]]
    for reader in ("scorer", "judge"):
        own = json.loads((ROOT / "examples" / f"people-{reader}" / "metrics.json").read_text())["accuracy"]
        lines.append([f"real, as the {reader} reads", *(f"{own[head]:.2f}" if head in own else "–" for head in heads)])
    return DRAWN_PEOPLE.format(**found) + "\n" + table(["", *heads], lines) + SHEET


class Page(NamedTuple):
    """
    folder (`Path`): where the rows lie, and the page.
    options (`str`): the arguments with which a command measures this world.
    dictionary (`str`): the bundled one.
    introduction (`str`): the beginning of the page.
    sections (`dict[str, Section]`): by the name of the file of rows.
    notes (`str`): what was learned on the way, which has no rows.
    drawn (`Callable[[], str]`): writes how much of what prompts name the pipeline draws.
    """

    folder: Path
    options: str
    dictionary: str
    introduction: str
    sections: dict[str, Section]
    notes: str
    drawn: Callable[[], str]


@functools.cache
def _contents(*folders: str) -> str:
    return contents(*(ROOT / folder for folder in folders))


def is_bundled(page: Page, settings: dict, rows: list[dict]) -> bool:
    """Whether what was measured is what is bundled now; dictionaries of a measurement's own are not looked for."""
    named = [settings[name] for name in ("pipeline", "dictionary") if name in settings]
    if "dictionaries" not in settings and settings["contents"] != _contents(*named):
        return False
    digests = {row["dictionary"] for row in rows if row.get("method") == "feature" and "dictionary" in row}
    return digests <= {_contents(page.dictionary)}


def wrapped(text: str) -> str:
    """The paragraphs and items of a text, as wide as a page."""
    parts = re.split(r"\n\s*\n|\n\s*(?=- )", text.strip())
    items = [" ".join(part.split()) for part in parts]
    lines = [
        textwrap.fill(
            item, 119, break_long_words=False, break_on_hyphens=False, subsequent_indent="  " * item.startswith("- ")
        )
        for item in items
    ]
    joints = ["\n" if a.startswith("- ") and b.startswith("- ") else "\n\n" for a, b in pairwise(items)]
    return "".join(line + joint for line, joint in zip(lines, [*joints, ""], strict=True))


def section(page: Page, path: Path) -> tuple[str, str]:
    """The day of a measurement, and its section of the page."""
    stored = json.loads(path.read_text())
    settings, rows = stored["settings"], stored["rows"]
    experiment, title, text = page.sections[path.stem]
    if "elsewhere" in settings:
        settings["elsewhere"] = "{} with {} steps".format(*ast.literal_eval(settings["elsewhere"]))
    listed = {name: value for name, value in settings.items() if name not in APART and value != "None"}
    how = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in listed.items())
    out = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    options, reader = page.options, settings.get("scorer", "")
    if reader.endswith("-judge"):
        options += "--judge " if settings.get("judge") == "True" else f"--scorer {reader} "
    command = f"`python -m training.experiments.{experiment} {options}--out {out}`"
    facts = f"{stored['measured']}, {command}: {how}"
    facts += f"; read by `{Path(settings['scorer']).name}`." if "scorer" in settings else "."
    parts = [f"## {title}", wrapped(facts), wrapped(text.format(**settings))]
    parts += [] if is_bundled(page, settings, rows) else [STALE]
    shown = import_module(f"training.experiments.{experiment}").markdown(rows)
    return stored["measured"], "\n\n".join([*parts, shown.strip()]) + "\n"


def drawn() -> str:
    """How much of what prompts name the bundled pipeline draws."""
    found = json.loads((ROOT / "examples" / "shapes-sd" / "metrics.json").read_text())
    rows = {name: found[name] for name in ("1 object", "2 objects")}
    factors = list(dict.fromkeys(factor for row in rows.values() for factor in row))
    lines = [[name, *(f"{row[f]:.2f}" if f in row else "–" for f in factors)] for name, row in rows.items()]
    return DRAWN.format(**found) + "\n" + table(["scenes of", *factors], lines)


PAGES = {
    "shapes": Page(ROOT / "training" / "results", "", "examples/shapes-rtsae", INTRODUCTION, SECTIONS, NOTES, drawn),
    "people": Page(
        ROOT / "training" / "results" / "people",
        "--world people ",
        "examples/people-rtsae",
        PEOPLE_INTRODUCTION,
        PEOPLE_SECTIONS,
        PEOPLE_NOTES,
        drawn_people,
    ),
}


def written(page: Page) -> str:
    """The whole page."""
    unknown = sorted({path.stem for path in page.folder.glob("*.json")} - page.sections.keys())
    if unknown:
        raise ValueError(f"Expected a section in {Path(__file__).name} for each of {unknown}.")
    order = [path for stem in page.sections if (path := page.folder / f"{stem}.json").exists()]
    sections = sorted((section(page, path) for path in order), key=lambda one: one[0], reverse=True)
    return "\n".join([page.introduction, *(text for _, text in sections), page.notes, page.drawn()])


if __name__ == "__main__":
    for one in PAGES.values():
        (one.folder / "README.md").write_text(written(one))
        print(one.folder / "README.md")
