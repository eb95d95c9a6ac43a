"""Files: JSON and text read with their form checked, and written so that readers never see a part. Needs no torch."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

_JSON_BYTES, _JSON_DEPTH = 64 * 2**20, 32

_short = reprlib.Repr()  # what a file holds may be long, a message about it must not be
_short.maxstring = _short.maxother = 120
brief = _short.repr
_names = reprlib.Repr()
_names.maxlist, _names.maxstring = 30, 120


def closest(name, known: Iterable[str]) -> str:
    """How a message on an unknown name ends: with those that may have been meant, which are spelled alike or contain
    it, or else with all there are; labels, a mapping, by their factor."""
    known, name = list(known) if not isinstance(known, Mapping) else known, str(name)
    near = difflib.get_close_matches(name, known, n=3)
    near += [other for other in known if len(name) > 1 and name.lower() in other.lower() and other not in near]
    if near:
        return f"Did you mean {near[:5]}?"
    by_factor: dict[str, list[str]] = {}
    for other in known:
        label = known[other] if isinstance(known, Mapping) else None
        by_factor.setdefault(label.get("factor") or "" if isinstance(label, dict) else "", []).append(other)
    if list(by_factor) in ([], [""]):
        return f"It has {_names.repr(sorted(known))}."
    named = (f"{factor or 'others'}: {', '.join(own[:30])}" for factor, own in by_factor.items())
    return f"It has {'; '.join(named)}."


def write_json(path: Path, content) -> None:
    """Write a JSON file so that readers see the old or the new one, never a part."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file so that readers see the old or the new one, never a part."""
    with whole(path) as partial, open(partial, "x", encoding="utf-8") as file:  # follows no link of that name
        file.write(text)


@contextlib.contextmanager
def whole(path: Path, writer: int | None = None) -> Iterator[Path]:
    """
    A new name beside `path` to write to, which takes its place if that went well, and of which nothing is left
    otherwise.

    Args:
        writer (`int`, *optional*): tells apart those that may write the same file at once.
    """
    partial = path.with_name(f"{path.name}.partial" if writer is None else f"{path.name}.{writer}.partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, stripped, without the blank ones; `ValueError` names the first that is no UTF-8."""
    lines = []
    for number, found in enumerate(path.read_bytes().splitlines(), 1):
        try:
            lines.append(found.decode("utf-8-sig" if number == 1 else "utf-8").strip())
        except UnicodeDecodeError:
            raise ValueError(f"{path}, line {number}: expected text in UTF-8, got {brief(found)}.") from None
    return [found for found in lines if found]


def read_json(path: Path) -> dict:
    """Read a JSON object of reasonable size and depth; `ValueError` otherwise."""
    if path.stat().st_size > _JSON_BYTES:
        raise ValueError(f"{path} is too large: expected at most {_JSON_BYTES >> 20} MB of JSON.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    level, depth = [content], 0
    while level:  # whoever compares or prints this later would recurse into it
        inner = [outer.values() if isinstance(outer, dict) else outer for outer in level]
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
        depth += 1
        if depth > _JSON_DEPTH:
            raise ValueError(f"{path} is nested more than {_JSON_DEPTH} levels deep.")
    return content


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Pairs of prompts from a JSON file `[[from, to], …]`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {line(error)}") from None
    if not isinstance(content, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in content):
        raise ValueError(f"{path} must hold a list of [from, to] prompts.")
    return [tuple(pair) for pair in content]


def line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@contextlib.contextmanager
def open_tensors(path: Path, framework: str = "pt"):
    """A safetensors file, open; what is wrong with it is an `OSError`."""
    try:
        with safe_open(path, framework) as file:
            yield file
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{path} is damaged or no safetensors file: {line(error)}") from None
