"""What a dictionary's folder says besides its tensors: sites, labels and presets, and what they name. Needs no
torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

from ..files import brief, closest, open_tensors, read_json
from ..formats import find, unknown_weights, walk
from .format import (
    CONFIG_NAME,
    FORMAT_VERSION,
    LABELS_NAME,
    MAPS_NAME,
    NAMES_NAME,
    PRESETS_NAME,
    check_files,
    check_label,
    check_names,
    check_preset,
    check_site_config,
    check_sites,
    choose_sites,
)


@dataclass
class Contents:
    """
    Args:
        sites (`Mapping`): by path of the site, each with its settings as `config`.
        labels (`dict[str, dict]`): for each label its `features` (site, latents, weights, where), the edit options it
            was verified with and what was measured.
        config (`dict`): `base_model`, `signature` of its denoiser, and how the trajectories were made.
        presets (`dict[str, dict]`): named edits: `features`, a list of `[feature, strength]`, and `options` of them.
        names (`dict[str, dict]`): for each site, by index as a string, the word that a latent makes, or what it does
            to the look of pictures (`by`), with its `effect` and `confidence`; found by [`analysis.names`] and, unlike
            labels, verified in predictions only.
    """

    sites: Mapping
    labels: dict[str, dict] = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    presets: dict[str, dict] = field(default_factory=dict)
    names: dict[str, dict] = field(default_factory=dict, kw_only=True)

    def name_of(self, site: str, index: int) -> str | None:
        """The word that a latent makes, or what it does to pictures; `None` if it has no name."""
        return self.names.get(site, {}).get(str(index), {}).get("name")

    def features(self, name: str | int | tuple[str, int], operation: str | None = None) -> tuple[list[dict], dict]:
        """
        The `(site, latents, weights, where)` entries a label, an index or a `(site, index)` stands for, and its
        options.

        Args:
            operation (`str`, *optional*): that is asked for. What a fitted label adds need not be what is active where
                its concept is: all but `"add"` is done to the latents it is `seen` by.
        """
        if isinstance(name, str):
            if name not in self.labels and name.isdecimal():
                raise ValueError(
                    f"The dictionary has no feature labelled {name!r}; the feature of that index is {int(name)}, "
                    "without quotes."
                )
            if name not in self.labels:
                raise ValueError(f"The dictionary has no feature labelled {name!r}. {closest(name, self.labels)}")
            label = self.labels[name]
            parts = label["features"] if operation in (None, "add") else label.get("seen", label["features"])
            entries = [entry for entry in parts if entry["site"] in self.sites]
            if operation in ("ablate", "ablate_to_mean"):
                entries = [entry | {"weights": [1.0] * len(entry["latents"])} for entry in entries]
            if not entries:
                wanted = [entry["site"] for entry in label["features"]]
                raise ValueError(
                    f"{name!r} lives at {wanted}, of which none is loaded; loaded are {list(self.sites)}."
                )
            return entries, label.get("edit", {})
        if isinstance(name, Integral) and not isinstance(name, bool):
            if len(self.sites) > 1:
                raise ValueError(
                    f"Several sites are loaded, so feature {name} needs one: use (site, {name}) with a site of "
                    f"{list(self.sites)}."
                )
            name = (next(iter(self.sites)), name)
        if not isinstance(name, tuple) or len(name) != 2:
            raise ValueError(f"Expected a label, an index or (site, index) as a feature, got {name!r}.")
        site, index = name
        if site not in self.sites:
            raise ValueError(f"The dictionary has no site {site!r}. {closest(site, self.sites)}")
        count = self.sites[site].config.num_latents
        if not isinstance(index, Integral) or isinstance(index, bool) or not 0 <= index < count:
            raise ValueError(
                f"Feature {index!r} does not exist: the dictionary of {site} has features 0 to {count - 1}."
            )
        return [{"site": site, "latents": [int(index)], "weights": [1.0], "where": None}], {}

    def seen(self, name: str | int | tuple[str, int]) -> list[dict]:
        """The entries of the latents that are active where a feature is."""
        return self.features(name, operation="set")[0]

    def preset(self, name: str) -> tuple[dict, dict]:
        """The features with their strengths, and the options, of a preset."""
        if name not in self.presets:
            raise ValueError(f"The dictionary has no preset {name!r}. {closest(name, self.presets)}")
        check_preset(Path(PRESETS_NAME), name, self.presets[name])

        def named(feature):  # JSON has no tuples
            return tuple(feature) if isinstance(feature, list) and feature[0] in self.sites else feature

        options = dict(self.presets[name].get("options", {}))
        options |= {key: named(options[key]) for key in ("where", "source") if options.get(key)}
        return {named(feature): strength for feature, strength in self.presets[name]["features"]}, options


def parse_feature(text: str, dictionary: Contents) -> str | int | tuple[str, int]:
    """A label of the dictionary, an index, or `site:index`, as it was typed."""
    site, _, index = text.rpartition(":")
    if text in dictionary.labels or not index.isdigit():
        return text
    return (site, int(index)) if site else int(index)


def search_labels(dictionary: Contents, text: str) -> list[str]:
    """The labels of a dictionary that contain `text`; raises `ValueError` with those that resemble it if none does."""
    found = [label for label in dictionary.labels if text.lower() in label.lower()]
    if not found:
        raise ValueError(f"No label contains {text!r}. {closest(text, dictionary.labels)}")
    return found


def search_names(dictionary: Contents, text: str | None = None) -> list[tuple[str, int, dict]]:
    """The site, index and entry of the latents whose name or a synonym contains `text`, or is part of it, as "red" is
    of "reddish"; all without `text`. The surest first."""
    matches = [
        (site, int(index), name)
        for site, names in dictionary.names.items()
        for index, name in names.items()
        if text is None or any(_within(text.lower(), w.lower()) for w in (name["name"], *name.get("synonyms", ())))
    ]
    return sorted(matches, key=lambda match: -match[2]["confidence"])


def _within(one: str, other: str) -> bool:
    return one in other or other in one


def locate(
    source: str | os.PathLike,
    layers: list[str] | None = None,
    *,
    weights: bool = True,
    pickles: bool = False,
    site: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Path:
    """The folder of a dictionary: a local one, or that in which it lies once it has been fetched from the Hub, with or
    without its `weights`, of others' `pickles` too; see [`load_dictionary`]."""
    if not isinstance(source, str | os.PathLike) or not str(source):
        found = "an empty string" if isinstance(source, str) else type(source).__name__
        raise ValueError(f"Expected a Hub id, a folder or a dict of dictionaries by site, got {found}.")
    inside = PureWindowsPath(subfolder or "")  # knows the separators, drives and roots of every system
    if inside.anchor or ".." in inside.parts:
        raise ValueError(f"`subfolder` must lie inside the folder or repository, got {subfolder!r}.")
    folder = Path(source)
    if folder.is_file():
        raise OSError(f"{folder} is a file: expected the folder of a dictionary, or a Hub id.")
    if not folder.is_dir():
        if force_download and local_files_only:
            raise ValueError("`force_download` and `local_files_only` exclude each other.")
        from .hub import LIBRARY_NAME, fetch

        folder = fetch(
            str(source), inside.as_posix(), layers, revision, force_download, weights, pickles, site,
            token=token, cache_dir=cache_dir, local_files_only=local_files_only, library_name=LIBRARY_NAME,
        )  # fmt: skip
    elif revision is not None:
        raise ValueError(f"`revision` is for the Hub, but {str(source)!r} is a folder here.")
    return folder / inside.as_posix()


def read_contents(folder: Path, layers: list[str] | None = None) -> Contents:
    """Read all but the tensors of a local folder. No name in its files leads out of it. Links in it are followed,
    since caches are made of them, but only to regular files; nothing is ever written."""
    for name in (CONFIG_NAME, LABELS_NAME):
        if not (folder / name).is_file():
            others = sorted({entry.format for entry in find(walk(folder))}) if folder.is_dir() else []
            if others:
                raise OSError(
                    f"{folder} holds files of {', '.join(others)}, which say neither labels nor how active latents "
                    f"are; this makes a dictionary of them: diffusers-rtsae convert {folder} OUT"
                )
            found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "nothing"
            near = [str(path.parent) for path in _near(folder)]
            meant = f" Did you mean {near}?" if near else unknown_weights(walk(folder)) if folder.is_dir() else ""
            raise OSError(f"{folder} is no dictionary: expected {name} in it, found {found}.{meant}")
    path = folder / CONFIG_NAME
    config = read_json(path)
    if config.get("format_version") != FORMAT_VERSION:
        version = brief(config.get("format_version"))
        raise ValueError(f"{path} has format version {version}, this version reads {FORMAT_VERSION}.")
    if not isinstance(config.get("base_model", ""), str):
        raise ValueError(f"{path} must name its `base_model`, got {brief(config['base_model'])}.")
    known, sites = check_sites(config.get("sites"), path), {}
    for site in choose_sites(known, layers):
        check_files(folder / site, "config.json")
        file = folder / site / "config.json"
        content = read_json(file)
        config_of_site = check_site_config(file, content, site)
        sites[site] = SimpleNamespace(kind=content.get("_class_name"), config=SimpleNamespace(**config_of_site))
    sizes = {site: sites[site].config.num_latents if site in sites else None for site in known}
    labels = read_json(folder / LABELS_NAME)
    maps: list[str] = []
    if (folder / MAPS_NAME).is_file():
        with open_tensors(folder / MAPS_NAME, "np") as file:
            maps = list(file.keys())
    for name, label in labels.items():
        check_label(folder / LABELS_NAME, name, label, sizes, maps)
    presets = read_json(folder / PRESETS_NAME) if (folder / PRESETS_NAME).is_file() else {}
    for name, preset in presets.items():
        check_preset(folder / PRESETS_NAME, name, preset)
    names = read_json(folder / NAMES_NAME) if (folder / NAMES_NAME).is_file() else {}
    check_names(folder / NAMES_NAME, names, sizes)
    names = {site: of_site for site, of_site in names.items() if site in sites}
    return Contents(sites, labels, config, presets, names=names)


def _near(folder: Path) -> list[Path]:
    """Dictionaries around a folder that is none: above it, if it is a site's, or in it, if several were trained."""
    if not folder.is_dir():
        return []
    return [
        path for path in (folder.parent / CONFIG_NAME, *sorted(folder.glob(f"*/{CONFIG_NAME}"))[:8]) if path.is_file()
    ]
