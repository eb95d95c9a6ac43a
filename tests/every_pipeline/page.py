"""The table as a page."""

from __future__ import annotations

import re
import textwrap
from collections import Counter

import diffusers

MEANING = {
    "exact": "bit-equal to the plain pipeline without edits, and every edit changes exactly what it should, with "
    "guidance and without",
    "exact in part": "exact for one prompt; the use that the row names raises an error that says why",
    "exact without guidance": "exact without guidance; with it an error says why not",
    "refused": "an error says why it cannot be steered",
    "wrong": "an edit changes something else than it should",
    "crash": "an error from inside the plugin",
    "no denoiser": "has no U-Net or transformer that it calls to denoise",
    "untold": "could not be built or measured here",
}


def counts(rows: list[dict]) -> Counter:
    return Counter(row["verdict"] for row in rows)


def sentence(rows: list[dict]) -> str:
    """What the README says of supported pipelines."""
    found = counts(rows)
    partly = found["exact in part"] + found["exact without guidance"]
    others = len(rows) - found["exact"] - partly - found["refused"]
    return (
        f"Of the {len(rows)} pipeline classes of diffusers {diffusers.__version__}, {found['exact']} are steered "
        f"exactly. Another {partly} are steered exactly except in some uses (mostly several prompts with several "
        f"images each), and {found['refused']} are not supported; both raise an error that says why. The other "
        f"{others} do not denoise or cannot be built here"
    )


def into_readme(text: str, rows: list[dict]) -> str:
    """A README with that sentence in the place of an earlier one."""
    paragraphs = text.split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        if "pipeline classes of diffusers" in paragraph:
            earlier = r"Of the \d+ pipeline classes of diffusers .*? built here"
            flat = re.sub(earlier, sentence(rows), " ".join(paragraph.split()))
            paragraphs[i] = textwrap.fill(flat, 119, break_on_hyphens=False, break_long_words=False)
    return "\n\n".join(paragraphs)


def page(rows: list[dict]) -> str:
    """The page in Markdown."""
    found = counts(rows)
    lines = [
        "# Every pipeline",
        "",
        *textwrap.wrap(
            f"Made by `python -m tests.every_pipeline` with diffusers {diffusers.__version__}. Each class is built "
            "small from random weights and run without the plugin, with it and no edit, and steered. What an edit "
            "should change is computed without the plugin, by [measure.py](measure.py).",
            119,
        ),
        "",
        *textwrap.wrap(sentence(rows) + ".", 119),
        "",
        "| verdict | classes | |",
        "| --- | --- | --- |",
        *(f"| {verdict} | {found[verdict]} | {meaning} |" for verdict, meaning in MEANING.items()),
        "",
        "| class | denoisers | calls, rows | time | blocks | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        denoisers = ", ".join(f"{name}: {kind}" for name, kind in row.get("denoisers", {}).items())
        calls = f"{row['calls']} of {', '.join(map(str, row['rows']))}" if "calls" in row else ""
        time = f"{row['time'][0]:g} → {row['time'][1]:g}" if row.get("time") else ""
        why = f": {row['why']}" if row.get("why") else ""
        cells = [row["class"], denoisers, calls, time, ", ".join(row.get("blocks", [])), row["verdict"] + why]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
