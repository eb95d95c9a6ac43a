"""Dictionaries: loaded from a folder, the Hub or memory, and saved or pushed there."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from .card import CARD_NAME, is_generated, model_card
from .contents import FORMAT_VERSION, Contents, locate, read_contents
from .fetch import HUB_ERRORS, LIBRARY_NAME, known_ones, list_pretrained, reason
from .files import (
    CONFIG_NAME,
    LABELS_NAME,
    MAPS_NAME,
    PRESETS_NAME,
    WEIGHTS_NAME,
    brief,
    check_label,
    check_preset,
    choose_sites,
    is_site,
    line,
    write_json,
)
from .layouts import check_pickles, choose, find, walk
from .models import LinearMap, SparseDictionary
from .published import read, saelens
from .steering import OPERATIONS, Edit
from .weights import DTYPES, load_maps, load_site, save_site, save_tensors, write_tensors

__all__ = [
    "CONFIG_NAME",
    "LABELS_NAME",
    "WEIGHTS_NAME",
    "Dictionary",
    "convertible",
    "list_pretrained",
    "load_dictionary",
    "signature",
    "write_json",
]


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
class Dictionary(Contents):
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

    def add_label(self, name: str, label: dict, maps: dict[str, torch.Tensor]) -> None:
        """Add or replace a label, with the maps that its parts name; raises `ValueError` if it cannot be used."""
        sizes = {site: sae.config.num_latents for site, sae in self.sites.items()}
        own = {f"{name}.{part}": rows for part, rows in maps.items()}
        features = [
            entry | ({"map": f"{name}.{entry['map']}"} if "map" in entry else {}) for entry in label["features"]
        ]
        label = label | {"features": features}
        check_label(Path(LABELS_NAME), name, label, sizes, own)
        _try_label(Path(LABELS_NAME), name, label)
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
        """The features with their strengths, and the options, of a preset; raises `ValueError` if it is no edit."""
        found = super().preset(name)
        _try_preset(Path(PRESETS_NAME), name, self.presets[name])
        return found

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
            _try_label(folder / LABELS_NAME, name, label)
            kept = [entry for entry in label["features"] if entry["site"] in self.sites]
            labels |= {name: label | {"features": kept}} if kept else {}
        config = {"format_version": FORMAT_VERSION, "sites": list(self.sites)}
        config |= {name: value for name, value in self.config.items() if name not in config}
        for name, preset in self.presets.items():
            check_preset(folder / PRESETS_NAME, name, preset)
            _try_preset(folder / PRESETS_NAME, name, preset)
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

    def export(self, layout: str, folder: str | os.PathLike) -> None:
        """
        Write the autoencoders so that another library reads them, each in a subfolder that is named after its site.

        Args:
            layout (`str`): `"saelens"`, which `sae_lens.SAE.load_from_disk` reads. Labels and statistics have no
                place there.
            folder (`str` or `os.PathLike`): where to; created if need be.

        Raises:
            `ValueError`: the library has nothing like a dictionary of that kind.
        """
        if layout != "saelens":
            raise ValueError(f"`layout` must be 'saelens', got {layout!r}.")
        written = {site: saelens(sae, self.config.get("base_model")) for site, sae in self.sites.items()}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="saving-", suffix=".partial") as partial:
            for site, (config, tensors) in written.items():
                (folder / site).mkdir(exist_ok=True)
                new = Path(partial)
                write_tensors(tensors, new / "sae_weights.safetensors")
                write_json(new / "cfg.json", config)
                (new / "sae_weights.safetensors").chmod(0o644)
                for name in ("sae_weights.safetensors", "cfg.json"):
                    os.replace(new / name, folder / site / name)

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
            except (*HUB_ERRORS, ValueError, RuntimeError) as error:
                raise OSError(f"{repo_id!r} could not be pushed to the Hub: {reason(error, revision)}") from error
        return commit.commit_url


def _card_there(repo_id: str, revision: str | None, token: str | bool | None, cache: Path) -> Path:
    """The card a repository has, or a path where none is."""
    try:
        return Path(hf_hub_download(repo_id, CARD_NAME, revision=revision, token=token, cache_dir=cache))
    except LocalEntryNotFoundError:  # the Hub could not be asked
        raise
    except EntryNotFoundError:
        return cache / "none"


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
    Open a dictionary from a local folder, the Hub, or memory. Its rows are read from disk when they are used. Files of
    SDLens, sparsify (SAeUron), SAELens, dictionary_learning and DifFRACT are read too, if they are safetensors. These
    say nothing about how active latents are (a warning says so): strength 1.0 is then an activation of 1, and the end
    of the range of the training data is not known.

    Args:
        source (`str`, `os.PathLike`, `dict` or `Dictionary`): Hub id, folder, or `{site: dictionary of it}`.
        layers (`list[str]`, *optional*): sites to load; all by default. Others are not downloaded. Of what others
            published, a site is what the folder (or for DifFRACT the file) is named after: `unet.mid_block_k10…` is of
            `mid_block`. If nothing says it and there is but one, `layers` names it. Of several of one site the one
            nearest to the root is taken; `subfolder` chooses another.
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
        chosen = {site: dictionary.sites[site] for site in choose_sites(dictionary.sites, layers)}
        return Dictionary(chosen, dictionary.labels, dictionary.config, dictionary.presets, dictionary.maps)
    options = {"subfolder": subfolder, "revision": revision, "token": token, "cache_dir": cache_dir}
    options |= {"force_download": force_download, "local_files_only": local_files_only}
    return _open(source, locate(source, layers, **options), subfolder, layers, dtype)


def convertible(
    source: str | os.PathLike,
    layers: list[str] | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Dictionary:
    """
    Open what others published, as `load_dictionary` does, from pickles too, of which only tensors are read: for
    `diffusers-rtsae convert`, and for nothing else.
    """
    folder = locate(source, layers, pickles=True, subfolder=subfolder, revision=revision, token=token)
    return _open(source, folder, subfolder, layers, None, pickles=True)


def _open(
    source: str | os.PathLike,
    folder: Path,
    subfolder: str | None,
    layers: list[str] | None,
    dtype: torch.dtype | None,
    pickles: bool = False,
) -> Dictionary:
    """Read a folder, of ours or of what others published."""
    if (folder / CONFIG_NAME).is_file() or not folder.is_dir():
        return _read(folder, layers, dtype)
    local = Path(source).is_dir()
    around = (
        folder.absolute().parts[-2:] if local else Path(subfolder or "").parts
    )  # the cache's own names say nothing
    found = find(walk(folder), around)
    if not found:
        return _read(folder, layers, dtype)
    chosen = choose(found, layers, str(source))
    chosen = {site: chosen[site] for site in choose_sites(chosen, layers)}
    check_pickles(chosen, str(source), pickles)
    sites = {site: read(folder, one, site, dtype) for site, one in chosen.items()}
    if not pickles:
        warnings.warn(
            f"{source} does not say how active its latents are: strength 1.0 is an activation of 1. `diffusers-rtsae "
            "convert` measures it, with --pipeline and --prompts.",
            stacklevel=3,
        )
    config = {"layout": ", ".join(sorted({one.layout for one in chosen.values()}))}
    if not local:
        known = next((entry for entry in known_ones() if entry["id"] == source), {})
        config |= {name: known[name] for name in ("base_model", "license") if known.get(name)} | {"source": source}
    return Dictionary(sites, config=config)


def _read(folder: Path, layers: list[str] | None, dtype: torch.dtype | None) -> Dictionary:
    """Read a local folder with its tensors."""
    contents = read_contents(folder, layers)
    sites = {site: load_site(folder, site, dtype) for site in contents.sites}
    maps = load_maps(folder / MAPS_NAME) if (folder / MAPS_NAME).is_file() else {}
    for name, label in contents.labels.items():
        _try_label(folder / LABELS_NAME, name, label)
        for entry in label["features"]:
            sae = sites.get(entry["site"])
            needed = LinearMap.shapes(len(sae.config.anchors), sae.config.in_channels) if sae else []
            if "map" in entry and sae and maps[entry["map"]].shape[1:] not in needed:
                raise ValueError(f"The map of {brief(name)} has another shape than {entry['site']} needs.")
    for name, preset in contents.presets.items():
        _try_preset(folder / PRESETS_NAME, name, preset)
    return Dictionary(sites, contents.labels, contents.config, contents.presets, maps)


def _try_label(path: Path, name: str, label: dict) -> None:
    """Raise `ValueError` unless what a label moves, and its options, make an edit."""
    for entry in label["features"] + label.get("seen", []):
        if "map" not in entry:  # the options of a map are those of the label, its operation is its own
            where = None if entry.get("where") is None else tuple(entry["where"])
            moved = {"latents": tuple(entry["latents"]), "weights": tuple(entry["weights"]), "where": where}
            _try_edit(path, name, moved, label.get("edit", {}))


def _try_preset(path: Path, name: str, preset: dict) -> None:
    """Raise `ValueError` unless the options of a preset make an edit, whatever `where` and `source` name."""
    told = {key: value for key, value in preset.get("options", {}).items() if key not in ("where", "source")}
    _try_edit(path, name, {"latents": (0,), "weights": (1.0,)}, told)


def _try_edit(path: Path, name: str, moved: dict, options: dict) -> None:
    asked = options.get("operation", "add")
    takes = isinstance(asked, str) and asked in OPERATIONS and OPERATIONS[asked].takes
    source = (0,) if takes else None  # the caller's to choose
    try:
        Edit(strength=1.0, source=source, mask=None, **moved, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {brief(name)} cannot be used: {line(error)}") from None
