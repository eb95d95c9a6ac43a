"""What lies in a dictionary's folder: read with every claim checked, written so that readers never see a part."""

from __future__ import annotations

import difflib
import json
import os
import re
import reprlib
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .models import KINDS, SparseDictionary
from .steering.edits import Edit

CONFIG_NAME, LABELS_NAME, PRESETS_NAME = "rtsae_config.json", "labels.json", "presets.json"
MAPS_NAME = "maps.safetensors"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_MODULE_PATH = re.compile(r"\w+(\.\w+)*", re.ASCII)  # a site is also a folder, and must not lead out of its own
_MAPPED = ("encoder", "decoder")  # too large to look through: who takes rows of these checks them
_JSON_BYTES, _JSON_DEPTH = 64 * 2**20, 32

_short = reprlib.Repr()  # what a file holds may be long, a message about it must not be
_short.maxstring = _short.maxother = 120
brief = _short.repr
_names = reprlib.Repr()
_names.maxlist, _names.maxstring = 30, 120


def closest(name, known: Iterable[str]) -> str:
    """How a message on an unknown name ends: with those that may have been meant, or else with what there is."""
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    return f"Did you mean {near}?" if near else f"It has {_names.repr(sorted(known))}."


def write_json(path: Path, content) -> None:
    """Write a JSON file so that readers see the old or the new one, never a part."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file so that readers see the old or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with open(partial, "x", encoding="utf-8") as file:  # a new file: a link of that name must not be followed
        file.write(text)
    os.replace(partial, path)


def read_json(path: Path) -> dict:
    """Read a JSON object of reasonable size and depth; `ValueError` otherwise."""
    if path.stat().st_size > _JSON_BYTES:
        raise ValueError(f"{path} is too large: expected at most {_JSON_BYTES >> 20} MB of JSON.")
    try:
        content = json.loads(path.read_bytes())
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
        raise ValueError(f"{path} cannot be read as JSON: {_line(error)}") from None
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


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _is_int(value, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def check_label(path: Path, name: str, label, sizes: dict[str, int | None], maps: dict[str, torch.Tensor]) -> None:
    """
    Raise `ValueError` unless a label can be used: well formed, and of rows and maps that its dictionary has.

    Args:
        sizes (`dict[str, int | None]`): latents of each site, `None` where that is not known.
        maps (`dict[str, torch.Tensor]`): of fitted labels, by name.
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
        if least == 0:  # a map: its options are those of the label, its operation is its own
            continue
        source = (0,) if edit.get("operation") in ("transfer", "replace") else None  # the caller's to choose
        where = None if where is None else tuple(where)
        try:
            Edit(
                latents=tuple(rows),
                weights=tuple(weights),
                strength=1.0,
                where=where,
                source=source,
                mask=None,
                **edit,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {name} cannot be used: {_line(error)}") from None


def _check_part(path: Path, name: str, entry: dict, maps: dict[str, torch.Tensor]) -> bool:
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
    try:
        source = (0,) if options.get("operation") in ("transfer", "replace") else None
        told = {key: value for key, value in options.items() if key not in ("where", "source")}
        Edit(latents=(0,), weights=(1.0,), strength=1.0, source=source, mask=None, **told)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {name} cannot be used: {_line(error)}") from None


def load_site(folder: Path, site: str, dtype: torch.dtype | None) -> SparseDictionary:
    """Open the dictionary of one site. Its file is mapped: rows are read from disk when they are used. So it may be
    replaced meanwhile, as saving does, but not cut short."""
    path, weights = folder / site, folder / site / WEIGHTS_NAME
    if not (path / "config.json").is_file() or not weights.is_file():
        found = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else "nothing"
        raise OSError(f"Expected config.json and {WEIGHTS_NAME} (safetensors only) in {path}, found {found}.")
    sae = _skeleton(path / "config.json", site)
    expected = sae.state_dict()
    try:
        with safe_open(weights, "pt") as file:
            _check_header(weights, {name: file.get_slice(name) for name in file.keys()}, expected, sae.matrices)
            tensors = {name: file.get_tensor(name) for name in expected}  # mapped: neither read nor copied
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{weights} is damaged or no safetensors file: {_line(error)}") from None
    for name, tensor in tensors.items():
        if name not in _MAPPED and not torch.isfinite(tensor).all():
            raise ValueError(f"{weights} holds NaN or inf in {name!r}.")
        if name in sae.matrices and dtype is not None:
            tensors[name] = tensor.to(dtype)
    sae.load_state_dict(tensors, assign=True)
    return sae.requires_grad_(False).eval()


def _skeleton(path: Path, site: str) -> SparseDictionary:
    """The dictionary that a config.json describes, without memory for its weights."""
    content = read_json(path)
    kind = content.get("_class_name")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{path} must name its kind as one of {list(KINDS)}, got {brief(kind)}.")
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
    if config.get("activation", "output") not in ("output", "update"):
        raise ValueError(f"{path}: expected `activation` 'output' or 'update', got {brief(config['activation'])}.")
    try:
        with torch.device("meta"):
            return KINDS[kind](**config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} describes no dictionary: {_line(error)}") from None


def _check_header(path: Path, found: dict, expected: dict[str, torch.Tensor], matrices: tuple[str, ...]) -> None:
    """Raise `ValueError` unless the slices of a file are the tensors that its config.json promises."""
    wrong = [f"{name!r} is missing" for name in expected if name not in found]
    wrong += [f"{brief(name)} is none of ours" for name in found if name not in expected]
    for name in [name for name in expected if name in found]:
        shape, dtype = list(expected[name].shape), found[name].get_dtype()
        if found[name].get_shape() != shape:
            wrong.append(f"{name!r} has shape {brief(found[name].get_shape())} instead of {shape}")
        elif dtype not in (DTYPES if name in matrices else ("F32",)):
            wrong.append(f"{name!r} is {dtype} instead of {' or '.join(DTYPES) if name in matrices else 'F32'}")
    if wrong:
        raise ValueError(f"The weights in {path} do not fit its config.json: {', '.join(wrong[:8])}.")


def load_maps(path: Path) -> dict[str, torch.Tensor]:
    """The linear maps of fitted labels by name, each the rows `(r, G, 2 d + 1)` of one, float32."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            for name, found in slices.items():
                if len(found.get_shape()) != 3 or found.get_dtype() not in DTYPES:
                    raise ValueError(
                        f"{path}: {brief(name)} is no map: expected (rank, anchors, 2 channels + 1) floats."
                    )
            maps = {name: file.get_tensor(name).float() for name in slices}
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{path} is damaged or no safetensors file: {_line(error)}") from None
    for name, rows in maps.items():
        if not rows.isfinite().all():
            raise ValueError(f"{path} holds NaN or inf in {brief(name)}.")
    return maps


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a new safetensors file, as float16; raises `ValueError` if something does not fit that."""
    halves = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in tensors.items()}
    for name, tensor in halves.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{brief(name)} holds NaN, inf, or what is too large for float16.")
    save_file(halves, path, metadata={"format": "pt"})
    path.chmod(0o644)


def save_site(folder: Path, site: str, sae: SparseDictionary) -> None:
    """Write the dictionary of one site into a new folder: encoder and decoder rows as float16, statistics as
    float32."""
    path = folder / site
    path.mkdir()
    tensors = {}
    for name, tensor in sae.state_dict().items():
        tensor = tensor.detach().to("cpu", torch.float16 if name in sae.matrices else torch.float32).contiguous()
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name!r} of {site} holds NaN, inf, or what is too large for {tensor.dtype}.")
        tensors[name] = tensor
    write_json(path / "config.json", json.loads(sae.to_json_string()))
    save_file(tensors, path / WEIGHTS_NAME, metadata={"format": "pt"})
    shutil.copymode(path / "config.json", path / WEIGHTS_NAME)  # safetensors makes it unreadable for others
