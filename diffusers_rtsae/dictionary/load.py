"""Dictionaries are loaded: from a folder, the Hub or memory, this package's own or other people's."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from ..files import brief
from ..formats import check_pickles, choose, find, read, walk
from ..models import LinearMap, SparseDictionary
from .contents import locate, read_contents
from .dictionary import Dictionary
from .format import CONFIG_NAME, MAPS_NAME, choose_sites
from .hub import known_dictionaries
from .weights import DTYPES, load_maps, load_site


def load_dictionary(
    source: str | os.PathLike | dict[str, SparseDictionary] | Dictionary,
    layers: list[str] | None = None,
    dtype: torch.dtype | None = None,
    *,
    site: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Dictionary:
    """
    Open a dictionary from a local folder, the Hub, or memory. Its rows are read from disk when they are used. Files of
    SDLens, Concept Steerers, sparsify (SAeUron, SAEmnesia), SAELens, dictionary_learning, DifFRACT and overcomplete
    are read too, if they are safetensors. These say nothing about how active latents are (a warning says so): strength
    1.0 is then an activation of 1, and the end of the range of the training data is not known.

    Args:
        source (`str`, `os.PathLike`, `dict` or `Dictionary`): Hub id, folder, or `{site: dictionary of it}`.
        layers (`list[str]`, *optional*): sites to load; all by default. Others are not downloaded. Of what others
            published, a site is what the folder (or for DifFRACT the file) is named after: `unet.mid_block_k10…` is of
            `mid_block`. Of several of one site the one nearest to the root is taken; `subfolder` chooses another.
        dtype (`torch.dtype`, *optional*): of the weights in memory: `torch.float16`, `torch.bfloat16` or
            `torch.float32`; as they are stored by default. Statistics and arithmetic are always float32.
        site (`str`, *optional*): the site of the one autoencoder that somebody else published, where no name says it.
        subfolder (`str`, *optional*): of the dictionary inside the folder or repository.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        token (`str` or `bool`, *optional*): of the Hub, for private and gated repositories.
        cache_dir (`str` or `os.PathLike`, *optional*): of what is downloaded.
        force_download (`bool`, defaults to `False`): download what is in the cache again.
        local_files_only (`bool`, defaults to `False`): use what is in the cache, and no network.

    Raises:
        `OSError`: nothing readable there. `ValueError`: readable, but not what was asked for.
    """
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"Expected `dtype` to be one of {list(DTYPES.values())}, got {dtype!r}.")
    if isinstance(source, Dictionary | dict):
        if any(option is not None for option in (site, subfolder, revision, dtype)):
            raise ValueError(
                "`site`, `subfolder`, `revision` and `dtype` are for folders and the Hub, but a dictionary was passed."
            )
        dictionary = source if isinstance(source, Dictionary) else Dictionary(source)
        chosen = {site: dictionary.sites[site] for site in choose_sites(dictionary.sites, layers)}
        return replace(dictionary, sites=chosen)
    options = {"site": site, "subfolder": subfolder, "revision": revision, "token": token, "cache_dir": cache_dir}
    options |= {"force_download": force_download, "local_files_only": local_files_only}
    return _open(source, locate(source, layers, **options), subfolder, layers, dtype, site=site)


def convertible(
    source: str | os.PathLike,
    layers: list[str] | None = None,
    *,
    site: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Dictionary:
    """
    Open what others published, as `load_dictionary` does, from pickles too, of which only tensors are read: for
    `diffusers-rtsae convert`, and for nothing else.
    """
    folder = locate(source, layers, pickles=True, site=site, subfolder=subfolder, revision=revision, token=token)
    return _open(source, folder, subfolder, layers, None, pickles=True, site=site)


def _open(
    source: str | os.PathLike,
    folder: Path,
    subfolder: str | None,
    layers: list[str] | None,
    dtype: torch.dtype | None,
    pickles: bool = False,
    site: str | None = None,
) -> Dictionary:
    """Read a folder with a dictionary, this package's or other people's."""
    if (folder / CONFIG_NAME).is_file() and site is not None:
        raise ValueError(f"`site` says what somebody else's files are of, but {source} says it itself.")
    if (folder / CONFIG_NAME).is_file() or not folder.is_dir():
        return _read(folder, layers, dtype)
    local = Path(source).is_dir()
    around = folder.absolute().parts[-2:] if local else Path(subfolder or "").parts  # names in the cache say nothing
    published = find(walk(folder), around)
    if not published:
        return _read(folder, layers, dtype)
    chosen = choose(published, layers, str(source), site, told=pickles)
    chosen = {site: chosen[site] for site in choose_sites(chosen, layers)}
    check_pickles(chosen, str(source), pickles)
    sites = {site: read(folder, entry, site, dtype) for site, entry in chosen.items()}
    if not pickles:
        warnings.warn(
            f"{source} does not say how active its latents are: strength 1.0 is an activation of 1. `diffusers-rtsae "
            "convert` measures it, with --pipeline and --prompts.",
            stacklevel=3,
        )
    config = {"layout": ", ".join(sorted({entry.format for entry in chosen.values()}))}
    if not local:
        known = next((entry for entry in known_dictionaries() if entry["id"] == source), {})
        config |= {name: known[name] for name in ("base_model", "license") if known.get(name)} | {"source": source}
    return Dictionary(sites, config=config)


def _read(folder: Path, layers: list[str] | None, dtype: torch.dtype | None) -> Dictionary:
    """Read a local folder with its tensors."""
    contents = read_contents(folder, layers)
    sites = {site: load_site(folder, site, dtype) for site in contents.sites}
    maps = load_maps(folder / MAPS_NAME) if (folder / MAPS_NAME).is_file() else {}
    for name, label in contents.labels.items():
        for entry in label["features"]:
            sae = sites.get(entry["site"])
            needed = LinearMap.shapes(len(sae.config.anchors), sae.config.in_channels) if sae else []
            if "map" in entry and sae and maps[entry["map"]].shape[1:] not in needed:
                raise ValueError(f"The map of {brief(name)} has another shape than {entry['site']} needs.")
    return Dictionary(sites, contents.labels, contents.config, contents.presets, maps, names=contents.names)
