"""The dictionaries of a model's sites with their labels: looked into, saved, exported and pushed to the Hub."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..files import brief, write_json
from ..formats import FORMATS, Format
from ..models import SparseDictionary, is_of_steps
from .card import CARD_NAME, is_generated, model_card
from .contents import Contents
from .format import (
    CONFIG_NAME,
    FORMAT_VERSION,
    LABELS_NAME,
    MAPS_NAME,
    NAMES_NAME,
    PRESETS_NAME,
    WEIGHTS_NAME,
    check_label,
    check_names,
    check_preset,
    is_site,
)
from .hub import HUB_ERRORS, LIBRARY_NAME, reason
from .weights import save_site, save_tensors, write_tensors


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
            raise ValueError("A dictionary needs at least one site, got none.")
        for site, sae in self.sites.items():
            if not isinstance(sae, SparseDictionary) or sae.config.site != site:
                actual = sae.config.site if isinstance(sae, SparseDictionary) else type(sae).__name__
                raise ValueError(f"Expected a dictionary of site {site!r} under that name, got {actual!r}.")
            if not is_site(site):
                raise ValueError(f"A site is the path of a module, got {brief(site)}.")

        for name, label in self.labels.items():
            for entry in label["features"]:
                if "map" in entry and entry["map"] not in self.maps:
                    raise ValueError(f"The label {brief(name)} has a map of its own, which is missing.")

    def add_label(self, name: str, label: dict, maps: dict[str, torch.Tensor]) -> None:
        """Add or replace a label, with the maps that its parts name; raises `ValueError` if it cannot be used."""
        sizes = {site: sae.config.num_latents for site, sae in self.sites.items()}
        new = {f"{name}.{part}": rows for part, rows in maps.items()}
        features = [
            entry | ({"map": f"{name}.{entry['map']}"} if "map" in entry else {}) for entry in label["features"]
        ]
        label = label | {"features": features}
        check_label(Path(LABELS_NAME), name, label, sizes, new)
        replaced = {e["map"] for e in self.labels.get(name, {}).get("features", []) if "map" in e}
        self.maps = {key: rows for key, rows in self.maps.items() if key not in replaced} | new
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

    def check(self, denoiser: torch.nn.Module) -> None:
        """Raise `ValueError` unless the dictionary was made for a denoiser like this one."""
        for site, sae in self.sites.items():
            if is_of_steps(sae.config.anchors):
                raise ValueError(
                    f"Expected a dictionary of denoising, but {site} is of another process, with the steps 0 to "
                    f"{len(sae.config.anchors) - 1}: no pipeline can be steered with it, but `load_dictionary` opens "
                    "it, and it encodes and decodes."
                )
        expected, actual = self.config.get("signature", {}), signature(denoiser)
        if not isinstance(expected, dict):
            raise ValueError(f"The `signature` in {CONFIG_NAME} must be an object, got {brief(expected)}.")
        if expected and expected != actual:
            names = [name for name in expected | actual if expected.get(name) != actual.get(name)]
            details = ", ".join(
                f"{name} {brief(expected.get(name))} there, {actual.get(name)!r} here" for name in names
            )
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
            for name in (PRESETS_NAME, NAMES_NAME, MAPS_NAME):
                (folder / name).unlink(missing_ok=True)
            for name in files:
                (folder / name).parent.mkdir(exist_ok=True)
                os.replace(Path(partial) / name, folder / name)

    def _write(self, folder: Path, repo_id: str | None = None) -> list[str]:
        """Write everything into a new folder; returns the files, the configuration last."""
        sizes = dict.fromkeys(self.config.get("sites", ())) | {
            site: sae.config.num_latents for site, sae in self.sites.items()
        }
        labels = {}
        for name, label in self.labels.items():
            check_label(folder / LABELS_NAME, name, label, sizes, self.maps)
            parts = [entry for entry in label["features"] if entry["site"] in self.sites]
            labels |= {name: label | {"features": parts}} if parts else {}
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
        names = {site: of_site for site, of_site in self.names.items() if site in self.sites}
        check_names(folder / NAMES_NAME, names, sizes)
        if names:
            write_json(folder / NAMES_NAME, names)
        write_json(folder / CONFIG_NAME, config)
        card = model_card(self.sites, labels, config, repo_id, names)
        (folder / CARD_NAME).write_text(card, encoding="utf-8", errors="replace")
        for site, sae in self.sites.items():
            save_site(folder, site, sae)
        inner = [f"{site}/{name}" for site in self.sites for name in ("config.json", WEIGHTS_NAME)]
        optional = [PRESETS_NAME] * bool(self.presets) + [NAMES_NAME] * bool(names) + [MAPS_NAME] * bool(used)
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
        formats = {name.lower(): one for name, one in FORMATS.items() if type(one).export is not Format.export}
        if layout not in formats:
            raise ValueError(f"`layout` must be one of {list(formats)}, got {layout!r}.")
        to, base_model = formats[layout], self.config.get("base_model")
        exported = {site: to.export(sae, base_model) for site, sae in self.sites.items()}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = f"{to.weights}.safetensors"
        with tempfile.TemporaryDirectory(dir=folder, prefix="saving-", suffix=".partial") as partial:
            for site, (config, tensors) in exported.items():
                (folder / site).mkdir(exist_ok=True)
                write_tensors(tensors, Path(partial, weights))
                write_json(Path(partial, to.config), config)
                Path(partial, weights).chmod(0o644)
                for name in (weights, to.config):
                    os.replace(Path(partial, name), folder / site / name)

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
                if not is_generated(_existing_card(repo_id, revision, token, Path(temporary, "cache"))):
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


def _existing_card(repo_id: str, revision: str | None, token: str | bool | None, cache: Path) -> Path:
    """The card a repository has, or a path where none is."""
    try:
        return Path(hf_hub_download(repo_id, CARD_NAME, revision=revision, token=token, cache_dir=cache))
    except LocalEntryNotFoundError:  # the Hub could not be asked
        raise
    except EntryNotFoundError:
        return cache / "none"
