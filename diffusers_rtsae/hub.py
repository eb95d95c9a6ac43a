"""Dictionaries: loaded from a folder, the Hub or memory, and saved or pushed there."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tempfile
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path, PureWindowsPath

import torch
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .card import CARD_NAME, LIBRARY_NAME, is_generated, model_card
from .files import (
    CONFIG_NAME,
    DTYPES,
    LABELS_NAME,
    MAPS_NAME,
    PRESETS_NAME,
    WEIGHTS_NAME,
    brief,
    check_label,
    check_preset,
    check_sites,
    closest,
    is_site,
    load_maps,
    load_site,
    read_json,
    save_site,
    save_tensors,
    write_json,
)
from .models import SparseDictionary

__all__ = [
    "CONFIG_NAME",
    "LABELS_NAME",
    "WEIGHTS_NAME",
    "Dictionary",
    "list_pretrained",
    "load_dictionary",
    "signature",
    "write_json",
]

FORMAT_VERSION = 1
_HUB_ERRORS = (HTTPError, HFValidationError, OSError)


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
        sites (`dict[str, SparseDictionary]`): by path of the site.
        labels (`dict[str, dict]`): for each label its `features` (site, latents, weights, where), the edit options it
            was verified with and what was measured.
        config (`dict`): `base_model`, `signature` of its denoiser, and how the trajectories were made.
        presets (`dict[str, dict]`): named edits: `features`, a list of `[feature, strength]`, and `options` of them.
        maps (`dict[str, torch.Tensor]`): rows of the linear maps that fitted labels have of their own.
    """

    sites: dict[str, SparseDictionary]
    labels: dict[str, dict] = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    presets: dict[str, dict] = field(default_factory=dict)
    maps: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self):
        if not self.sites:
            raise ValueError("A dictionary needs at least one site.")
        for site, sae in self.sites.items():
            if not isinstance(sae, SparseDictionary) or sae.config.site != site:
                found = sae.config.site if isinstance(sae, SparseDictionary) else type(sae).__name__
                raise ValueError(f"Expected a dictionary of site {site!r} under that name, got {found!r}.")
            if not is_site(site):
                raise ValueError(f"A site is the path of a module, got {brief(site)}.")

        for name, label in self.labels.items():
            for entry in label["features"]:
                if "map" in entry and entry["map"] not in self.maps:
                    raise ValueError(f"The label {brief(name)} has a map of its own, which is not there.")

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

    def add_label(self, name: str, label: dict, maps: dict[str, torch.Tensor]) -> None:
        """Add or replace a label, with the maps that its parts name; raises `ValueError` if it cannot be used."""
        sizes = {site: sae.config.num_latents for site, sae in self.sites.items()}
        own = {f"{name}.{part}": rows for part, rows in maps.items()}
        features = [
            entry | ({"map": f"{name}.{entry['map']}"} if "map" in entry else {}) for entry in label["features"]
        ]
        label = label | {"features": features}
        check_label(Path(LABELS_NAME), name, label, sizes, own)
        replaced = {e["map"] for e in self.labels.get(name, {}).get("features", []) if "map" in e}
        self.maps = {key: rows for key, rows in self.maps.items() if key not in replaced} | own
        self.labels[name] = label

    @torch.no_grad()
    def trajectory(self, name: str | int | tuple[str, int]) -> torch.Tensor:
        """The path `(G, d)` of a feature through activation space at strength 1, at its first site; of a label with a
        map of its own, which has none, that of the latents it is seen by."""
        entry = next((e for e in [*self.features(name)[0], *self.seen(name)] if "map" not in e), None)
        if entry is None:
            raise ValueError(f"The label {brief(name)} moves no latents and is seen by none.")
        sae, latents = self.sites[entry["site"]], entry["latents"]
        amounts = sae.typical_activation[latents].cpu() * torch.tensor(entry["weights"])
        return torch.einsum("n,ngd->gd", amounts, sae.feature_trajectories(latents).cpu())

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

    def check(self, denoiser: torch.nn.Module) -> None:
        """Raise `ValueError` unless the dictionary was made for a denoiser like this one."""
        wanted, found = self.config.get("signature", {}), signature(denoiser)
        if not isinstance(wanted, dict):
            raise ValueError(f"The `signature` in {CONFIG_NAME} must be an object, got {brief(wanted)}.")
        if wanted and wanted != found:
            different = {k: (wanted.get(k), found.get(k)) for k in wanted | found if wanted.get(k) != found.get(k)}
            details = ", ".join(f"{name} {brief(a)} there, {b!r} here" for name, (a, b) in different.items())
            raise ValueError(
                f"The dictionary is for {self.config.get('base_model', 'another model')}, which is no match for this "
                f"pipeline: {details}."
            )

    def save(self, folder: str | os.PathLike) -> None:
        """
        Write the folder, with a model card: encoder and decoder rows as float16, statistics as float32.

        All is written beside it first and then moved in, the configuration last, so that readers (and this dictionary
        itself, whose rows may still lie in the old files) never see a part. A card without the comment that calls it
        generated is somebody's own and stays.

        Args:
            folder (`str` or `os.PathLike`): where to; created if need be.

        Raises:
            `ValueError`: a weight is NaN or inf, or a label cannot be used.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for site in self.sites:
            if (folder / site).is_symlink():
                raise OSError(f"{folder / site} is a link, and nothing is written through one.")
        with tempfile.TemporaryDirectory(dir=folder, prefix="saving-", suffix=".partial") as partial:
            files = self._write(Path(partial))
            if not is_generated(folder / CARD_NAME):
                files.remove(CARD_NAME)
            (folder / CONFIG_NAME).unlink(missing_ok=True)  # a folder without it is no dictionary
            for name in (PRESETS_NAME, MAPS_NAME):
                (folder / name).unlink(missing_ok=True)
            for name in files:
                (folder / name).parent.mkdir(exist_ok=True)
                os.replace(Path(partial) / name, folder / name)

    def _write(self, folder: Path, repo_id: str | None = None) -> list[str]:
        """Write everything into a new folder; returns the files, the configuration last."""
        sizes = dict.fromkeys(self.config.get("sites", ())) | {s: r.config.num_latents for s, r in self.sites.items()}
        labels = {}
        for name, label in self.labels.items():
            check_label(folder / LABELS_NAME, name, label, sizes, self.maps)
            kept = [entry for entry in label["features"] if entry["site"] in self.sites]
            labels |= {name: label | {"features": kept}} if kept else {}
        config = {"format_version": FORMAT_VERSION, "sites": list(self.sites)}
        config |= {name: value for name, value in self.config.items() if name not in config}
        for name, preset in self.presets.items():
            check_preset(folder / PRESETS_NAME, name, preset)
        write_json(folder / LABELS_NAME, labels)
        used = {entry["map"] for label in labels.values() for entry in label["features"] if "map" in entry}
        if used:
            save_tensors({name: self.maps[name] for name in sorted(used)}, folder / MAPS_NAME)
        if self.presets:
            write_json(folder / PRESETS_NAME, self.presets)
        write_json(folder / CONFIG_NAME, config)
        card = model_card(self.sites, labels, config, repo_id)
        (folder / CARD_NAME).write_text(card, encoding="utf-8", errors="replace")
        for site, sae in self.sites.items():
            save_site(folder, site, sae)
        inner = [f"{site}/{name}" for site in self.sites for name in ("config.json", WEIGHTS_NAME)]
        optional = [PRESETS_NAME] * bool(self.presets) + [MAPS_NAME] * bool(used)
        return [*inner, LABELS_NAME, *optional, CARD_NAME, CONFIG_NAME]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """
        Upload the dictionary with a model card, in one commit. A card that somebody made their own there stays, and so
        do presets if the dictionary has none.

        Args:
            repo_id (`str`): `"user/name"`; created if need be.
            private (`bool`, *optional*): of a new repository; what the account is set to by default.
            token (`str` or `bool`, *optional*): of the Hub; that of `hf auth login` by default.
            revision (`str`, *optional*): a branch that exists, `"main"` by default.
            commit_message (`str`, *optional*): names the sites by default.
            create_pr (`bool`, defaults to `False`): open a pull request instead.

        Returns:
            `str`: URL of the commit.

        Raises:
            `OSError`: the Hub did not take it. `ValueError`: the dictionary cannot be saved.
        """
        api = HfApi(token=token, library_name=LIBRARY_NAME)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "dictionary")
            folder.mkdir()
            files = self._write(folder, repo_id)
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                if not is_generated(_card_there(repo_id, revision, token, Path(temporary, "cache"))):
                    files.remove(CARD_NAME)
                commit = api.create_commit(
                    repo_id,
                    [CommitOperationAdd(name, folder / name) for name in files],
                    commit_message=commit_message or f"Upload dictionary of {', '.join(self.sites)}",
                    revision=revision,
                    create_pr=create_pr,
                )
            except (*_HUB_ERRORS, ValueError, RuntimeError) as error:
                raise OSError(f"{repo_id!r} could not be pushed to the Hub: {_reason(error, revision)}") from error
        return commit.commit_url


def _card_there(repo_id: str, revision: str | None, token: str | bool | None, cache: Path) -> Path:
    """The card a repository has, or a path where none is."""
    try:
        return Path(hf_hub_download(repo_id, CARD_NAME, revision=revision, token=token, cache_dir=cache))
    except LocalEntryNotFoundError:  # the Hub could not be asked
        raise
    except EntryNotFoundError:
        return cache / "none"


def list_pretrained(refresh: bool = False, token: str | bool | None = None) -> list[dict]:
    """
    The dictionaries that are known to exist.

    Args:
        refresh (`bool`, defaults to `False`): also ask the Hub for repositories tagged `diffusers-rtsae`.
        token (`str` or `bool`, *optional*): of the Hub, to see private ones.

    Returns:
        `list[dict]`: of each its `id` (what `load_rtsae` takes), `base_model`, `sites` and `description`.

    Raises:
        `OSError`: the Hub did not answer.
    """
    known = json.loads(Path(__file__).with_name("pretrained.json").read_text(encoding="utf-8"))
    if not refresh:
        return known
    try:
        found = list(HfApi(token=token, library_name=LIBRARY_NAME).list_models(filter=LIBRARY_NAME, cardData=True))
    except _HUB_ERRORS as error:
        raise OSError(f"The Hub could not be asked for dictionaries: {_reason(error)}") from error
    listed = {entry["id"] for entry in known}
    for model in found:
        card = model.card_data.to_dict() if model.card_data else {}  # anybody's: it may say anything
        base_model, sites = card.get("base_model"), card.get("sites")
        entry = {
            "id": model.id,
            "base_model": base_model if isinstance(base_model, str) else None,
            "sites": [site for site in sites if is_site(site)] if isinstance(sites, list) else [],
            "description": str(card.get("description") or ""),
        }
        known += [entry] if model.id not in listed else []
    return known


def load_dictionary(
    source: str | os.PathLike | dict[str, SparseDictionary] | Dictionary,
    layers: list[str] | None = None,
    dtype: torch.dtype | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Dictionary:
    """
    Open a dictionary from a local folder, the Hub, or memory. Its rows are read from disk when they are used.

    Args:
        source (`str`, `os.PathLike`, `dict` or `Dictionary`): Hub id, folder, or `{site: dictionary of it}`.
        layers (`list[str]`, *optional*): sites to load; all by default. Others are not downloaded.
        dtype (`torch.dtype`, *optional*): of the weights in memory: `torch.float16`, `torch.bfloat16` or
            `torch.float32`; as they are stored by default. Statistics and arithmetic are always float32.
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
        if any(option is not None for option in (subfolder, revision, dtype)):
            raise ValueError(
                "`subfolder`, `revision` and `dtype` are for folders and the Hub, but a dictionary was passed."
            )
        dictionary = source if isinstance(source, Dictionary) else Dictionary(source)
        chosen = {site: dictionary.sites[site] for site in _choose(dictionary.sites, layers)}
        return Dictionary(chosen, dictionary.labels, dictionary.config, dictionary.presets, dictionary.maps)
    if not isinstance(source, str | os.PathLike) or not str(source):
        found = "an empty string" if isinstance(source, str) else type(source).__name__
        raise ValueError(f"Expected a Hub id, a folder or a dict of dictionaries by site, got {found}.")
    inside = PureWindowsPath(subfolder or "")  # knows the separators, drives and roots of every system
    if inside.anchor or ".." in inside.parts:
        raise ValueError(f"`subfolder` must lie inside the folder or repository, got {subfolder!r}.")
    folder = Path(source)
    if not folder.is_dir():
        if force_download and local_files_only:
            raise ValueError("`force_download` and `local_files_only` exclude each other.")
        folder = _fetch(
            str(source), inside.as_posix(), layers, revision, force_download,
            token=token, cache_dir=cache_dir, local_files_only=local_files_only, library_name=LIBRARY_NAME,
        )  # fmt: skip
    elif revision is not None:
        raise ValueError(f"`revision` is for the Hub, but {str(source)!r} is a folder here.")
    return _read(folder / inside.as_posix(), layers, dtype)


def _fetch(
    repo_id: str, subfolder: str, layers: list[str] | None, revision: str | None, force_download: bool, **options
) -> Path:
    """Download what is needed of a repository; returns the folder that mirrors it."""
    prefix = "" if subfolder == "." else f"{subfolder}/"

    def download(names: list[str], revision: str | None, force_download: bool) -> Path:
        patterns = [glob.escape(prefix + name) for name in names]
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=patterns, force_download=force_download, **options
            )
        )

    try:
        folder = download([CONFIG_NAME, LABELS_NAME, PRESETS_NAME, MAPS_NAME], revision, force_download)
        config = folder / prefix / CONFIG_NAME
        if not config.is_file():
            raise OSError(f"it has no {prefix}{CONFIG_NAME}.")
        sites = _choose(check_sites(read_json(config).get("sites"), config), layers)
        names = [f"{site}/{name}" for site in sites for name in ("config.json", WEIGHTS_NAME)]
        new = [name for name in names if force_download or not (folder / prefix / name).is_file()]
        download(names, folder.name, force_download)  # of the same commit, whatever is pushed meanwhile
        for name in new:
            _check_sum(folder / prefix / name)
    except _HUB_ERRORS as error:
        raise OSError(
            f"{repo_id!r} is no folder here, and no dictionary that could be fetched from the Hub: "
            f"{_reason(error, revision)}"
        ) from error
    return folder


def _check_sum(path: Path) -> None:
    """Raise `OSError` if a download is not what the Hub has: the cache names large files by their SHA-256."""
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    if not re.fullmatch("[0-9a-f]{64}", name):
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != name:
        path.resolve().unlink()
        path.unlink()
        raise OSError(f"{path.name} arrived damaged: its SHA-256 is {found[:12]}… instead of {name[:12]}… .")


def _reason(error: Exception, revision: str | None = None) -> str:
    """One sentence on what went wrong between here and the Hub."""
    if isinstance(error, LocalEntryNotFoundError | RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # the client says "not in the cache" or "while uploading"; this is why
    if isinstance(error, GatedRepoError):
        return "its owner grants access on request: ask for it on its page, and pass a `token`."
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private and needs a `token`."
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {revision or 'main'!r}."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so there is only the cache."
    if isinstance(error, LocalEntryNotFoundError):
        return "it is not in the cache, or not all of it, and nothing may be downloaded."
    if isinstance(error, HfHubHTTPError):
        said = f" ({error.server_message})" if error.server_message else ""
        return f"the Hub answered {error.response.status_code}{said}."
    text = (str(error).strip().splitlines() or ["?"])[0]
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"


def _read(folder: Path, layers: list[str] | None, dtype: torch.dtype | None) -> Dictionary:
    """Read a local folder. No name in its files leads out of it. Links in it are followed, since caches are made of
    them, but only to regular files; nothing is ever written."""
    for name in (CONFIG_NAME, LABELS_NAME):
        if not (folder / name).is_file():
            found = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "nothing"
            raise OSError(f"{folder} is no dictionary: expected {name} in it, found {found}.")
    path = folder / CONFIG_NAME
    config = read_json(path)
    if config.get("format_version") != FORMAT_VERSION:
        version = brief(config.get("format_version"))
        raise ValueError(f"{path} has format version {version}, this version reads {FORMAT_VERSION}.")
    if not isinstance(config.get("base_model", ""), str):
        raise ValueError(f"{path} must name its `base_model`, got {brief(config['base_model'])}.")
    known = check_sites(config.get("sites"), path)
    sites = {site: load_site(folder, site, dtype) for site in _choose(known, layers)}
    sizes = {site: sites[site].config.num_latents if site in sites else None for site in known}
    labels = read_json(folder / LABELS_NAME)
    maps = load_maps(folder / MAPS_NAME) if (folder / MAPS_NAME).is_file() else {}
    for name, label in labels.items():
        check_label(folder / LABELS_NAME, name, label, sizes, maps)
        for entry in label["features"]:
            sae = sites.get(entry["site"])
            needed = sae and (len(sae.config.anchors), 2 * sae.config.in_channels + 1)
            if "map" in entry and sae and maps[entry["map"]].shape[1:] != needed:
                raise ValueError(f"The map of {brief(name)} has another shape than {entry['site']} needs.")
    presets = read_json(folder / PRESETS_NAME) if (folder / PRESETS_NAME).is_file() else {}
    for name, preset in presets.items():
        check_preset(folder / PRESETS_NAME, name, preset)
    return Dictionary(sites, labels, config, presets, maps)


def _choose(sites, layers: list[str] | None) -> list[str]:
    if isinstance(layers, str):
        raise ValueError(f"Expected `layers` as a list of sites, got the string {layers!r}.")
    unknown = [layer for layer in layers or () if layer not in sites]
    if unknown:
        raise ValueError(f"The dictionary has no site {unknown[0]!r}. {closest(unknown[0], sites)}")
    return list(layers or sites)
