"""Other people's dictionaries, recognised by names of files, in a folder or in a repository. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from ..files import brief
from .base import PICKLES, Published
from .registry import FORMATS

_DEPTH, _FILES = 5, 20_000  # how far a folder is searched
_MODULE_PATH = re.compile(r"\w+(\.\w+)*(\+\w+(\.\w+)+)*", re.ASCII)  # `a.b+c.d` joins sites of text encoders


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
    names, published = set(names), {}
    for name in sorted(names, key=lambda name: not name.endswith(".safetensors")):
        path = PurePosixPath(name)
        for one in FORMATS.values():
            config = str(path.with_name(one.config)) if one.config else None
            if config not in names and not one.needs_config:
                config = None
            complete = config is None or config in names
            if complete and path.suffix in (".safetensors", *PICKLES) and re.fullmatch(one.weights, path.stem):
                site = one.site(path.stem) or _site_of([one.folder(part) for part in (*around, *path.parts[:-1])])
                if not one.is_of(site):
                    continue
                more = [str(path.with_name(other)) for other in one.more if path.suffix in PICKLES]
                entry = Published(site, one.name, name, config, tuple(other for other in more if other in names))
                published.setdefault((path.parent, path.stem), entry)  # as safetensors rather than as a pickle
    return sorted(published.values(), key=lambda entry: entry.weights)


def unknown_weights(names: Iterable[str]) -> str:
    """How a message goes on where there are weights that no format knows by the names of their files; empty where
    there are none."""
    if not any(name.endswith((".safetensors", *PICKLES)) for name in names):
        return ""
    owners: dict[str, list[str]] = {}
    for one in FORMATS.values():
        owners.setdefault(one.weights, []).append(one.name)
    known = ", ".join(f"{name} ({' or '.join(own)})" for name, own in owners.items() if name.isidentifier())
    return (
        f" Weights of others are known by the names of their files, {known}: give them theirs. A pickled model of "
        "overcomplete is overcomplete.pt."
    )


def _site_of(folders: Sequence[str]) -> str | None:
    """The site that the innermost folder with the name of a module is of, like
    `unet.down_blocks.2.attentions.1_k10_hidden5120`."""
    for folder in reversed(folders):
        name = re.split(r"_k\d", folder)[0]
        site = re.sub(r"^(unet|transformer)\.", "", name)
        is_path = _MODULE_PATH.fullmatch(site) and not re.search(r"\d\.\d", site)  # a version, as in sae_v1.5
        if is_path and (site != name or "." in site or site == "mid_block"):
            return site
    return None


def choose(
    published: list[Published],
    layers: list[str] | None,
    source: str,
    site: str | None = None,
    told: bool = False,
) -> dict[str, Published]:
    """
    The autoencoders to read by site: of each of `layers`, or of every site that is named, the one nearest to the root.

    Args:
        source (`str`): the folder or repository, for messages.
        site (`str`, *optional*): the site of the only one there is, whatever names say.
        told (`bool`): whether one of `layers` is such a site too, as --site of `convert` is.

    Raises:
        `ValueError`: names do not say which is of which site.
    """
    folders = sorted({str(PurePosixPath(entry.weights).parent) for entry in published})
    if site is None and len(published) == 1 and layers and len(layers) == 1:
        site = layers[0] if told or published[0].site is None else None
    if site is not None and len(folders) > 1:
        raise ValueError(
            f"`site` says what one autoencoder is of, but {source} has several: choose one of {brief(folders)} by "
            "`subfolder`."
        )
    if site is not None:
        published = [_at(entry, site) for entry in published]
    if all(entry.site is None for entry in published):
        raise ValueError(
            f"No name in {source} says which site it is of: name the site by `site` (--site of diffusers-rtsae "
            f"convert), and if there are several, one folder of {brief(folders)} by `subfolder`."
        )
    sites: dict[str, list[Published]] = {}
    for entry in published:
        if entry.site is not None and (not layers or entry.site in layers):
            sites.setdefault(entry.site, []).append(entry)
    chosen = {}
    for site, candidates in sites.items():
        least = min(entry.weights.count("/") for entry in candidates)
        nearest = [entry for entry in candidates if entry.weights.count("/") == least]
        if len(nearest) > 1:
            folders = sorted({PurePosixPath(entry.weights).parts[0] for entry in nearest})
            raise ValueError(f"{source} has several of {site}: choose one of {folders[:12]} by `subfolder`.")
        chosen[site] = nearest[0]
    return chosen or {entry.site: entry for entry in published if entry.site is not None}


def _at(entry: Published, site: str) -> Published:
    """An autoencoder as one of another site, of which files of these names may be of another format."""
    own = FORMATS[entry.format]
    alike = (one for one in FORMATS.values() if (one.weights, one.config) == (own.weights, own.config))
    return entry._replace(site=site, format=next(one.name for one in (own, *alike) if one.is_of(site)))


def check_pickles(chosen: dict[str, Published], source: str, allowed: bool) -> None:
    """Raise `ValueError` if weights are pickled, unless that is allowed."""
    pickled = [entry.weights for entry in chosen.values() if entry.is_pickled]
    if pickled and not allowed:
        raise ValueError(
            f"{source} has pickles, {brief(pickled[0])}, which are not loaded; this makes safetensors of them: "
            f"diffusers-rtsae convert {source} OUT"
        )
