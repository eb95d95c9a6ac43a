"""The format of a dictionary's folder: names of its files, and checks of what they say. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from pathlib import Path

from ..files import brief, closest

CONFIG_NAME, LABELS_NAME, PRESETS_NAME = "rtsae_config.json", "labels.json", "presets.json"
MAPS_NAME = "maps.safetensors"
NAMES_NAME = "names.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
FORMAT_VERSION = 1
#: The words that the options of an edit are chosen from, as files spell them.
CHOICES = {
    "operation": ("add", "set", "scale", "clamp", "ablate", "ablate_to_mean", "transfer", "replace", "erase"),
    "apply_to": ("cond", "all", "contrast"),
    "injection": ("trajectory", "residual"),
}
_FLAGS = ("clip", "renormalise")
# A site is also a folder, and must not lead out of its own. `a.b+c.d` joins sites of several text encoders.
_MODULE_PATH = re.compile(r"\w+(\.\w+)*(\+\w+(\.\w+)+)*", re.ASCII)


def is_site(name) -> bool:
    """Whether this is a site's name: the path of a module, as hookpoints are named elsewhere, which is a folder's name
    too."""
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


def _is_int(value, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # which NaN and inf are not


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
        if not all(_is_number(weight) for weight in weights):
            raise ValueError(f"{path}: the weights of {name} must be finite numbers, got {brief(weights)}.")
        if where == []:
            raise ValueError(f"{path}: `where` of {name} names no latent, so the edit would act nowhere.")
    check_edit(path, name, edit)


def _check_part(path: Path, name: str, entry: dict, maps: Container[str]) -> bool:
    """Check what only parts of fitted labels have; whether this one is a map of its own."""
    if not entry.keys() & {"bounds", "operation", "map"}:
        return False
    bounds, map_name = entry.get("bounds"), entry.get("map")
    numbers = isinstance(bounds, list) and len(bounds) == 2 and all(map(_is_number, bounds))
    if not numbers or not bounds[0] <= 0 <= bounds[1]:
        raise ValueError(f"{path}: the `bounds` of {name} must be two numbers around 0, got {brief(bounds)}.")
    if entry.get("operation", "add") not in ("add", "ablate"):
        raise ValueError(f"{path}: a part of {name} must 'add' or 'ablate', got {brief(entry['operation'])}.")
    if map_name is None:
        return False
    if not isinstance(map_name, str) or map_name not in maps or entry.get("latents") or "operation" in entry:
        raise ValueError(f"{path}: {name} must name one of the maps and no latents, got {brief(map_name)}.")
    return True


def check_edit(path: Path, name: str, options: dict) -> None:
    """Raise `ValueError` unless these are options of an edit that a file may hold; `name` is of the label or preset as
    messages show it. Which feature `where` and `source` name is not looked at."""
    wrong = None
    for option, value in options.items():
        if option in CHOICES and value not in CHOICES[option]:
            wrong = f"`{option}` must be one of {list(CHOICES[option])}, got {brief(value)}."
        elif option in _FLAGS and not isinstance(value, bool):
            wrong = f"`{option}` must be true or false, got {brief(value)}."
        elif option not in (*CHOICES, *_FLAGS, "start", "end"):
            wrong = f"an edit has no option {brief(option)}."
    start, end = options.get("start", 0.0), options.get("end", 1.0)
    if not _is_number(start) or not _is_number(end) or not 0 <= start <= end <= 1:
        wrong = f"Expected 0 <= start <= end <= 1, got start={brief(start)}, end={brief(end)}."
    if wrong:
        raise ValueError(f"{path}: {name} cannot be used: {wrong}")


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
        if not many or not all(map(_is_number, many)):
            raise ValueError(
                f"{path}: {name} has strength {brief(strength)}, expected a finite number or a list of them."
            )
    check_edit(path, name, {key: value for key, value in options.items() if key not in ("where", "source")})


def check_names(path: Path, names, sizes: dict[str, int | None]) -> None:
    """Raise `ValueError` unless the names of latents are well formed, and of latents that a dictionary has."""
    for site, of_site in names.items() if isinstance(names, dict) else [(None, None)]:
        if site not in sizes or not isinstance(of_site, dict):
            raise ValueError(
                f"{path}: expected an object with names for each site of {list(sizes)}, got {brief(site)}."
            )
        for index, name in of_site.items():
            size = sizes[site] or 2**31
            if not index.isdecimal() or not int(index) < size:
                raise ValueError(f"{path}: expected latents 0 to {size - 1} of {site}, got {brief(index)}.")
            numbers = isinstance(name, dict) and all(_is_number(name.get(key)) for key in ("effect", "confidence"))
            if not numbers or not isinstance(name.get("name"), str) or not _is_strings(name.get("synonyms", [])):
                raise ValueError(
                    f"{path}: expected for latent {index} a string `name`, numbers `effect` and `confidence`, and, if "
                    f"any, a list of strings `synonyms`, got {brief(name)}."
                )
            place = name.get("place")
            if name.get("by", "word") not in ("word", "look") or place is not None and not _is_place(place):
                raise ValueError(
                    f'{path}: expected for latent {index} "word" or "look" as `by`, and three numbers as `place`, got '
                    f"{brief(name)}."
                )


def _is_place(value) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))


def _is_strings(value) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def check_files(folder: Path, *names: str) -> None:
    """Raise `OSError` unless these files of a site are there."""
    if not all((folder / name).is_file() for name in names):
        existing = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "nothing"
        raise OSError(f"Expected config.json and {WEIGHTS_NAME} (safetensors only) in {folder}, found {existing}.")


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
    if not isinstance(config.get("activation", "output"), str):
        raise ValueError(f"{path}: expected `activation` as a string, got {brief(config['activation'])}.")
    return config
