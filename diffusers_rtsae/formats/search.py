"""What others published: recognised by the names of its files, in a folder or in a repository. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .files import brief, is_site

_PICKLES = (".pt", ".pth", ".bin")
_DEPTH, _FILES = 5, 20_000  # how far a folder is searched


class Published(NamedTuple):
    """
    One autoencoder in a folder or a repository.

    site (`str`, *optional*): path of the module it is of, as the names say it.
    layout (`str`): whose files these are.
    weights, config (`str`): paths of its files in the folder; some have no configuration.
    more (`tuple[str, ...]`): other files of it.
    """

    site: str | None
    layout: str
    weights: str
    config: str | None
    more: tuple[str, ...]

    @property
    def files(self) -> list[str]:
        return [self.weights, *([self.config] if self.config else []), *self.more]

    @property
    def is_pickled(self) -> bool:
        return PurePosixPath(self.weights).suffix in _PICKLES


class _Layout(NamedTuple):
    """What the weights are called, without their ending; the configuration beside them; what says the site, if the
    folder does not; and other files."""

    name: str
    stem: str
    config: str | None
    site: Callable[[str], str] | None = None
    more: tuple[str, ...] = ()


def _diffract_site(stem: str) -> str:
    _, stream, layer = stem.split("_")
    return f"transformer_blocks.{layer}.ff" + ("_context" if stream == "txt" else "")


_LAYOUTS = (
    _Layout("sparsify", "sae", "cfg.json"),
    _Layout("SAELens", "sae_weights", "cfg.json"),
    _Layout("SDLens", "state_dict", "config.json", more=("mean.pt", "std.pt")),
    _Layout("dictionary_learning", "ae", "config.json"),
    _Layout("DifFRACT", r"(sae|transcoder)_(img|txt)_\d{1,4}", None, _diffract_site),
)


def walk(folder: Path) -> Iterator[str]:
    """Names of the files in a folder, as a repository lists them."""
    level, count = [folder], 0
    for _ in range(_DEPTH):
        entries = [entry for path in level for entry in sorted(path.iterdir())]
        for entry in entries:
            if entry.is_file():
                yield entry.relative_to(folder).as_posix()
        count += len(entries)
        level = [] if count > _FILES else [e for e in entries if e.is_dir() and not e.is_symlink()]


def find(names: Iterable[str], around: Sequence[str] = ()) -> list[Published]:
    """
    The autoencoders among the names of files.

    Args:
        names (`Iterable[str]`): paths in a folder or repository.
        around (`Sequence[str]`): names of the folders that it lies in, outermost first.
    """
    names, found = set(names), {}
    for name in sorted(names, key=lambda name: not name.endswith(".safetensors")):
        path = PurePosixPath(name)
        for layout in _LAYOUTS:
            config = str(path.with_name(layout.config)) if layout.config else None
            whole = path.suffix in (".safetensors", *_PICKLES) and (config is None or config in names)
            if whole and re.fullmatch(layout.stem, path.stem):
                site = layout.site(path.stem) if layout.site else _site_of((*around, *path.parts[:-1]))
                more = [str(path.with_name(other)) for other in layout.more if path.suffix in _PICKLES]
                one = Published(site, layout.name, name, config, tuple(other for other in more if other in names))
                found.setdefault((path.parent, path.stem), one)  # as safetensors rather than as a pickle
    return sorted(found.values(), key=lambda one: one.weights)


def _site_of(folders: Sequence[str]) -> str | None:
    """The site that the innermost folder with the name of a module is of, like
    `unet.down_blocks.2.attentions.1_k10_hidden5120`."""
    for folder in reversed(folders):
        name = re.split(r"_k\d", folder)[0]
        site = re.sub(r"^(unet|transformer)\.", "", name)
        if is_site(site) and (site != name or "." in site or site == "mid_block"):
            return site
    return None


def choose(found: list[Published], layers: list[str] | None, source: str) -> dict[str, Published]:
    """
    The autoencoders to read by site: of each of `layers`, or of every site that is named, the one nearest to the root.

    Raises:
        `ValueError`: names do not say which is of which site.
    """
    if len(found) == 1 and found[0].site is None and layers is not None and len(layers) == 1:
        found = [found[0]._replace(site=layers[0])]
    if all(one.site is None for one in found):
        raise ValueError(
            f"No name in {source} says which site it is of: name the site by `layers`, and if there are several, one "
            f"folder of {brief(sorted({str(PurePosixPath(one.weights).parent) for one in found}))} by `subfolder`."
        )
    sites: dict[str, list[Published]] = {}
    for one in found:
        if one.site is not None and (not layers or one.site in layers):
            sites.setdefault(one.site, []).append(one)
    chosen = {}
    for site, all_of_it in sites.items():
        least = min(one.weights.count("/") for one in all_of_it)
        nearest = [one for one in all_of_it if one.weights.count("/") == least]
        if len(nearest) > 1:
            folders = sorted({PurePosixPath(one.weights).parts[0] for one in nearest})
            raise ValueError(f"{source} has several of {site}: choose one of {folders[:12]} by `subfolder`.")
        chosen[site] = nearest[0]
    return chosen or {one.site: one for one in found if one.site is not None}


def check_pickles(chosen: dict[str, Published], source: str, allowed: bool) -> None:
    """Raise `ValueError` if something is pickled, unless that is allowed."""
    pickled = [one.weights for one in chosen.values() if one.is_pickled]
    if pickled and not allowed:
        raise ValueError(
            f"{source} has pickles, {brief(pickled[0])}, which are not loaded; this makes safetensors of them: "
            f"diffusers-rtsae convert {source} OUT"
        )
