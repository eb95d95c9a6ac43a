"""Dictionaries on disk and on the Hub: one folder a site, `rtsae_config.json` and `labels.json` at the root."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from .models import RTSAE

CONFIG_NAME, LABELS_NAME = "rtsae_config.json", "labels.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
FORMAT_VERSION = 1
_MODULE_PATH = re.compile(r"\w+(\.\w+)*", re.ASCII)  # a site is also a folder, and must not lead out of its own


def signature(denoiser: torch.nn.Module) -> dict:
    """What of a denoiser must agree for a dictionary to fit: its class and the shape of its blocks."""
    names = (
        "in_channels",
        "block_out_channels",
        "cross_attention_dim",
        "layers_per_block",
        "num_layers",
        "num_attention_heads",
    )
    config = {name: denoiser.config[name] for name in names if denoiser.config.get(name) is not None}
    return json.loads(json.dumps({"class": type(denoiser).__name__, **config}))


@dataclass
class Dictionary:
    """
    The dictionaries of one base model's sites with their labels.

    Args:
        sites (`dict[str, RTSAE]`): by path of the site.
        labels (`dict[str, dict]`): for each label its `features` (site, latents, weights, where), the edit options it
            was verified with and what was measured.
        config (`dict`): `base_model`, `signature` of its denoiser, and how the trajectories were made.
    """

    sites: dict[str, RTSAE]
    labels: dict[str, dict] = field(default_factory=dict)
    config: dict = field(default_factory=dict)

    def __post_init__(self):
        if not self.sites:
            raise ValueError("A dictionary needs at least one site.")
        for site, rtsae in self.sites.items():
            if not isinstance(rtsae, RTSAE) or rtsae.config.site != site:
                found = rtsae.config.site if isinstance(rtsae, RTSAE) else type(rtsae).__name__
                raise ValueError(f"Expected an RTSAE of site {site!r} under that name, got {found!r}.")

    def features(self, name: str | int | tuple[str, int]) -> tuple[list[dict], dict]:
        """The `(site, latents, weights, where)` entries a label, an index or a `(site, index)` stands for, and its
        options."""
        if isinstance(name, str):
            if name not in self.labels:
                near = difflib.get_close_matches(name, self.labels, n=3, cutoff=0.4)
                hint = f"Did you mean {near}?" if near else f"It has {sorted(self.labels)}."
                raise ValueError(f"The dictionary has no feature labelled {name!r}. {hint}")
            label = self.labels[name]
            entries = [entry for entry in label["features"] if entry["site"] in self.sites]
            if not entries:
                wanted = [entry["site"] for entry in label["features"]]
                raise ValueError(
                    f"{name!r} lives at {wanted}, of which none is loaded; loaded are {list(self.sites)}."
                )
            return entries, label.get("edit", {})
        if type(name) is int:
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
            raise ValueError(f"The dictionary has no site {site!r}; it has {list(self.sites)}.")
        count = self.sites[site].config.num_latents
        if type(index) is not int or not 0 <= index < count:
            raise ValueError(
                f"Feature {index!r} does not exist: the dictionary of {site} has features 0 to {count - 1}."
            )
        return [{"site": site, "latents": [index], "weights": [1.0], "where": None}], {}

    def check(self, denoiser: torch.nn.Module) -> None:
        """Raise `ValueError` unless the dictionary was made for a denoiser like this one."""
        wanted, found = self.config.get("signature", {}), signature(denoiser)
        if not isinstance(wanted, dict):
            raise ValueError(f"The `signature` in {CONFIG_NAME} must be an object, got {wanted!r}.")
        if wanted and wanted != found:
            different = {k: (wanted.get(k), found.get(k)) for k in wanted | found if wanted.get(k) != found.get(k)}
            details = ", ".join(f"{name} {a} there, {b} here" for name, (a, b) in different.items())
            raise ValueError(
                f"The dictionary is for {self.config.get('base_model', 'another model')}, which is no match for this "
                f"pipeline: {details}."
            )

    def save(self, folder: str | os.PathLike) -> None:
        """Write the folder; encoder and decoder rows as float16, statistics as float32."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).unlink(missing_ok=True)  # written last: a folder without it is no dictionary
        for site, rtsae in self.sites.items():
            stored = RTSAE(**{k: v for k, v in rtsae.config.items() if not k.startswith("_")})
            stored.load_state_dict(rtsae.state_dict())
            for tensor in (stored.encoder, stored.decoder, stored.dynamics.transition):
                tensor.data = tensor.data.half()
            stored.save_pretrained(folder / site)
        write_json(folder / LABELS_NAME, self.labels)
        config = {"format_version": FORMAT_VERSION, "sites": list(self.sites)} | self.config
        write_json(folder / CONFIG_NAME, config)


def write_json(path: Path, content) -> None:
    """Write a JSON file so that readers see the old or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(partial, path)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def _load_site(folder: Path, site: str, dtype: torch.dtype | None) -> RTSAE:
    path = folder / site
    weights = path / WEIGHTS_NAME
    if not (path / "config.json").is_file() or not weights.is_file():
        found = sorted(p.name for p in path.iterdir()) if path.is_dir() else "nothing"
        raise OSError(f"Expected config.json and {WEIGHTS_NAME} (safetensors only) in {path}, found {found}.")
    config = {name: value for name, value in _read_json(path / "config.json").items() if not name.startswith("_")}
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise OSError(f"{weights} is damaged or no safetensors file: {error}") from None
    try:
        rtsae = RTSAE(**config)
        rtsae.load_state_dict(tensors)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The weights in {weights} do not fit its config.json, or that is none of ours: {reason}"
        ) from None
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError(f"{weights} holds NaN or inf.")
    if dtype is not None:  # statistics stay float32
        for tensor in (rtsae.encoder, rtsae.decoder, rtsae.dynamics.transition):
            tensor.data = tensor.data.to(dtype)
    return rtsae


def _check_label(path: Path, name: str, label, sizes: dict[str, int]) -> None:
    """Raise `ValueError` unless a label is well formed and names rows that its dictionary has."""
    features = label.get("features") if isinstance(label, dict) else None
    if not isinstance(features, list) or not features or not isinstance(label.get("edit", {}), dict):
        raise ValueError(f"{path}: label {name!r} must have a list of `features`.")
    for entry in features:
        size = sizes.get(entry.get("site"), None) if isinstance(entry, dict) else None
        rows, weights = (entry.get("latents"), entry.get("weights")) if isinstance(entry, dict) else (None, None)
        known = isinstance(entry, dict) and (entry.get("site") in sizes)
        if (
            not known
            or not isinstance(rows, list)
            or not isinstance(weights, list)
            or not 0 < len(rows) == len(weights)
        ):
            raise ValueError(
                f"{path}: each feature of {name!r} needs a site of {list(sizes)}, and as many weights as latents."
            )
        for row in rows + (entry.get("where") or []):
            if size is not None and not (type(row) is int and 0 <= row < size):
                raise ValueError(f"{path}: {name!r} names latent {row!r}, but {entry['site']} has 0 to {size - 1}.")
        if not all(isinstance(w, int | float) and math.isfinite(w) for w in weights):
            raise ValueError(f"{path}: the weights of {name!r} must be finite numbers, got {weights}.")


def load_dictionary(
    source: str | os.PathLike | dict[str, RTSAE] | Dictionary,
    layers: list[str] | None = None,
    dtype: torch.dtype | None = None,
    subfolder: str | None = None,
    **hub_kwargs,
) -> Dictionary:
    """
    Read a dictionary from a local folder, the Hub, or memory.

    Args:
        source (`str`, `os.PathLike`, `dict` or `Dictionary`): Hub id, folder, or `{site: RTSAE}`.
        layers (`list[str]`, *optional*): sites to load; all by default. Others are not downloaded.
        dtype (`torch.dtype`, *optional*): of the weights in memory, float32 by default. Arithmetic is always float32.
        subfolder (`str`, *optional*): of the dictionary inside the repository.
        hub_kwargs: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

    Raises:
        `OSError`: nothing readable there. `ValueError`: readable, but not what was asked for.
    """
    if isinstance(source, Dictionary | dict):
        dictionary = source if isinstance(source, Dictionary) else Dictionary(source)
        chosen = {site: dictionary.sites[site] for site in _choose(dictionary.sites, layers)}
        return Dictionary(chosen, dictionary.labels, dictionary.config)
    if not isinstance(source, str | os.PathLike) or not str(source):
        raise ValueError(f"Expected a Hub id, a folder or a dict of RTSAE by site, got {source!r}.")
    prefix = f"{subfolder}/" if subfolder else ""
    folder = Path(source)
    if not folder.is_dir():
        try:
            names = [prefix + CONFIG_NAME, prefix + LABELS_NAME]
            folder = Path(snapshot_download(str(source), allow_patterns=names, **hub_kwargs))
            config = folder / prefix / CONFIG_NAME
            if config.is_file():
                wanted = [f"{prefix}{site}/*" for site in _choose(_sites(_read_json(config), config), layers)]
                folder = Path(snapshot_download(str(source), allow_patterns=names + wanted, **hub_kwargs))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise OSError(
                f"{source!r} is no folder here, and no dictionary that could be fetched from the Hub: {reason}"
            ) from error
    folder = folder / (subfolder or "")
    config_path = folder / CONFIG_NAME
    if not config_path.is_file():
        found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "nothing"
        raise OSError(f"{folder} is no dictionary: expected {CONFIG_NAME} in it, found {found}.")
    config = _read_json(config_path)
    if config.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{config_path} has format version {config.get('format_version')!r}, this version reads {FORMAT_VERSION}."
        )
    known = _sites(config, config_path)
    sites = {site: _load_site(folder, site, dtype) for site in _choose(known, layers)}
    labels = _read_json(folder / LABELS_NAME) if (folder / LABELS_NAME).is_file() else {}
    sizes = {site: sites[site].config.num_latents if site in sites else None for site in known}
    for name, label in labels.items():
        _check_label(folder / LABELS_NAME, name, label, sizes)
    return Dictionary(sites, labels, config)


def _sites(config: dict, path: Path) -> list[str]:
    sites = config.get("sites")
    if (
        not isinstance(sites, list)
        or not sites
        or not all(isinstance(site, str) and _MODULE_PATH.fullmatch(site) for site in sites)
    ):
        raise ValueError(f"{path} must list its `sites` as module paths, got {sites!r}.")
    return sites


def _choose(sites, layers: list[str] | None) -> list[str]:
    if isinstance(layers, str):
        raise ValueError(f"Expected `layers` as a list of sites, got the string {layers!r}.")
    unknown = [layer for layer in layers or () if layer not in sites]
    if unknown:
        raise ValueError(f"The dictionary has no site {unknown[0]!r}; it has {list(sites)}.")
    return list(layers or sites)
