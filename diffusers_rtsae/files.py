"""What lies in a dictionary's folder besides tensors: read with every claim checked, written so that readers never see
a part. Needs no torch."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import reprlib
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

CONFIG_NAME, LABELS_NAME, PRESETS_NAME = "rtsae_config.json", "labels.json", "presets.json"
MAPS_NAME = "maps.safetensors"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
ACTIVATIONS = ("output", "update", "input")  # what is read at a site; what is changed is its output
_MODULE_PATH = re.compile(r"\w+(\.\w+)*", re.ASCII)  # a site is also a folder, and must not lead out of its own
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


def is_site(name) -> bool:
    """Whether this is the path of a module, which is also a folder's name."""
    return isinstance(name, str) and len(name) <= 200 and _MODULE_PATH.fullmatch(name) is not None


def check_sites(sites, path: Path) -> list[str]:
    """The `sites` of a configuration, checked."""
    good = isinstance(sites, list) and 0 < len(sites) <= 1000 and all(is_site(site) for site in sites)
    if not good or len(set(sites)) < len(sites):
        raise ValueError(f"{path} must list its `sites` as module paths, got {brief(sites)}.")
    return sites


def choose_sites(sites: Iterable[str], layers: list[str] | None) -> list[str]:
    """Those of the `sites` that are asked for, all by default."""
    if isinstance(layers, str):
        raise ValueError(f"Expected `layers` as a list of sites, got the string {layers!r}.")
    unknown = [layer for layer in layers or () if layer not in sites]
    if unknown:
        raise ValueError(f"The dictionary has no site {unknown[0]!r}. {closest(unknown[0], sites)}")
    return list(layers or sites)


def line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _is_int(value, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def check_label(path: Path, name: str, label, sizes: dict[str, int | None], maps: Container[str]) -> None:
    """
    Raise `ValueError` unless a label is well formed, and of rows and maps that its dictionary has.

    Args:
        sizes (`dict[str, int | None]`): latents of each site, `None` where that is not known.
        maps (`Container[str]`): names of the linear maps that fitted labels have of their own.
    """
    name = brief(name)
    features, edit = (label.get("features"), label.get("edit", {})) if isinstance(label, dict) else (None, None)
    seen = label.get("seen", []) if isinstance(label, dict) else None
    if not isinstance(features, list) or not features or not isinstance(edit, dict) or not isinstance(seen, list):
        raise ValueError(
            f"{path}: label {name} must be an object with a list `features` and, if any, an object `edit` and a list "
            "`seen`."
        )
    for entry in features + seen:
        entry = entry if isinstance(entry, dict) else {}
        site, rows, weights, where = (entry.get(key) for key in ("site", "latents", "weights", "where"))
        lists = isinstance(rows, list) and isinstance(weights, list) and isinstance(where, list | None)
        least = 0 if _check_part(path, name, entry, maps) else 1
        if not isinstance(site, str) or site not in sizes or not lists or not least <= len(rows) == len(weights):
            raise ValueError(
                f"{path}: each feature of {name} needs a site of {brief(list(sizes))}, and as many weights as latents."
            )
        last = 2**31 - 1 if sizes[site] is None else sizes[site] - 1
        for row in rows + (where or []):
            if not _is_int(row, 0, last):
                raise ValueError(f"{path}: {name} names latent {brief(row)}, but {site} has 0 to {last}.")
        if not all(type(weight) in (int, float) and abs(weight) < 1e9 for weight in weights):  # which NaN is not
            raise ValueError(f"{path}: the weights of {name} must be finite numbers, got {brief(weights)}.")


def _check_part(path: Path, name: str, entry: dict, maps: Container[str]) -> bool:
    """Check what only parts of fitted labels have; whether this one is a map of its own."""
    if not entry.keys() & {"bounds", "operation", "map"}:
        return False
    bounds, own = entry.get("bounds"), entry.get("map")
    numbers = isinstance(bounds, list) and len(bounds) == 2 and all(type(b) in (int, float) for b in bounds)
    if not numbers or not -1e9 < bounds[0] <= 0 <= bounds[1] < 1e9:
        raise ValueError(f"{path}: the `bounds` of {name} must be two numbers around 0, got {brief(bounds)}.")
    if entry.get("operation", "add") not in ("add", "ablate"):
        raise ValueError(f"{path}: a part of {name} must 'add' or 'ablate', got {brief(entry['operation'])}.")
    if own is None:
        return False
    if not isinstance(own, str) or own not in maps or entry.get("latents") or "operation" in entry:
        raise ValueError(f"{path}: {name} must name one of the maps and no latents, got {brief(own)}.")
    return True


def check_preset(path: Path, name: str, preset) -> None:
    """Raise `ValueError` unless a preset is well formed: features with strengths, and options of an edit."""
    name, preset = brief(name), preset if isinstance(preset, dict) else {}
    features, options = preset.get("features"), preset.get("options", {})
    pairs = isinstance(features, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in features)
    if not pairs or not features or not isinstance(options, dict) or preset.keys() - {"features", "options"}:
        raise ValueError(
            f"{path}: preset {name} must be an object with a list `features` of [feature, strength] and, if any, an "
            "object `options`."
        )
    for feature, strength in features:
        one_of_site = isinstance(feature, list) and len(feature) == 2 and is_site(feature[0])
        index = feature[1] if one_of_site else feature
        if not isinstance(feature, str) and not _is_int(index, 0, 2**31 - 1):
            raise ValueError(
                f"{path}: {name} has feature {brief(feature)}, expected a label, an index or [site, index]."
            )
        many = strength if isinstance(strength, list) else [strength]
        if not many or not all(type(value) in (int, float) and abs(value) < 1e9 for value in many):
            raise ValueError(
                f"{path}: {name} has strength {brief(strength)}, expected a finite number or a list of them."
            )


def check_files(folder: Path, *names: str) -> None:
    """Raise `OSError` unless these files of a site are there."""
    if not all((folder / name).is_file() for name in names):
        found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "nothing"
        raise OSError(f"Expected config.json and {WEIGHTS_NAME} (safetensors only) in {folder}, found {found}.")


def check_site_config(path: Path, content: dict, site: str) -> dict:
    """The settings in a site's config.json, checked as far as any kind has them."""
    config = {name: value for name, value in content.items() if not name.startswith("_")}
    if config.get("site") != site:
        raise ValueError(f"{path} must be of site {site!r}, got {brief(config.get('site'))}.")
    for name in ("in_channels", "num_latents", "k"):
        if not _is_int(config.get(name), 1, 2**31 - 1):
            raise ValueError(f"{path}: expected `{name}` as a positive int, got {brief(config.get(name))}.")
    anchors = config.get("anchors")
    timesteps = isinstance(anchors, list) and all(_is_int(anchor, 0, 10**6) for anchor in anchors)
    if not timesteps or not 1 <= len(anchors) <= 1000:
        raise ValueError(f"{path}: expected `anchors` as a list of 1 to 1000 timesteps, got {brief(anchors)}.")
    if config.get("activation", "output") not in ACTIVATIONS:
        raise ValueError(
            f"{path}: expected `activation` as one of {list(ACTIVATIONS)}, got {brief(config['activation'])}."
        )
    return config


@contextlib.contextmanager
def open_tensors(path: Path, framework: str = "pt"):
    """A safetensors file, open; what is wrong with it is an `OSError`."""
    try:
        with safe_open(path, framework) as file:
            yield file
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{path} is damaged or no safetensors file: {line(error)}") from None
