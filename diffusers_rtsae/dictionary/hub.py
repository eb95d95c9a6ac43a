"""The Hub: what is known to be there, and downloads of what is needed. Needs no torch."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import threading
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from ..files import read_json
from ..formats import check_pickles, choose, find, unknown_weights, walk
from .format import (
    CONFIG_NAME,
    LABELS_NAME,
    MAPS_NAME,
    NAMES_NAME,
    PRESETS_NAME,
    WEIGHTS_NAME,
    check_sites,
    choose_sites,
    is_site,
)

LIBRARY_NAME = "diffusers-rtsae"
HUB_ERRORS = (HTTPError, HFValidationError, OSError)
_PATIENCE = 3.0  # seconds for a first answer; the client itself tries for half a minute and more


def unreachable() -> Exception | None:
    """Why the Hub does not answer at all, `None` if it does. Resolving its name has no time limit that one could set,
    so the question is asked in a thread."""
    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
            answer.append(None)
        except HUB_ERRORS as error:
            answer.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_PATIENCE)
    return answer[0] if answer else TimeoutError(f"{constants.ENDPOINT} has not answered in {_PATIENCE:g} s.")


def is_cached(repo_id: str, name: str) -> bool:
    """Whether a file of a repository has been downloaded before."""
    return isinstance(try_to_load_from_cache(repo_id, name), str)


def check_available(repo_id: str, name: str) -> None:
    """Raise `OSError`, and soon, if a file of a repository is not in the cache and the Hub does not answer."""
    if not is_cached(repo_id, name) and (error := unreachable()) is not None:
        raise OSError(f"{repo_id!r} is no folder here, not in the cache, and the Hub does not answer: {reason(error)}")


def known_dictionaries() -> list[dict]:
    """The published dictionaries that `pretrained.json` lists; see [`list_pretrained`]."""
    return json.loads(Path(__file__).with_name("pretrained.json").read_text(encoding="utf-8"))


def list_pretrained(refresh: bool = False, token: str | bool | None = None) -> list[dict]:
    """
    The dictionaries that are known to exist.

    Args:
        refresh (`bool`, defaults to `False`): also ask the Hub for repositories tagged `diffusers-rtsae`.
        token (`str` or `bool`, *optional*): of the Hub, to see private ones.

    Returns:
        `list[dict]`: of each its `id` (what `load_rtsae` takes, or `diffusers-rtsae convert` if it is pickled),
        `base_model`, `sites`, `size` (latents × channels), `license`, `description`, and whether it is `ours`, made
        with this package. What its page does not say is `None`.

    Raises:
        `OSError`: the Hub did not answer.
    """
    known = known_dictionaries()
    if not refresh:
        return known
    error, models = unreachable(), []
    if error is None:
        try:
            api = HfApi(token=token, library_name=LIBRARY_NAME)
            models = list(api.list_models(filter=LIBRARY_NAME, cardData=True))
        except HUB_ERRORS as failed:
            error = failed
    if error is not None:
        raise OSError(f"The Hub could not be asked for dictionaries: {reason(error)}") from error
    listed = {entry["id"] for entry in known}
    for model in models:
        card = model.card_data.to_dict() if model.card_data else {}  # anybody's: it may say anything
        base_model, sites = card.get("base_model"), card.get("sites")
        entry = {
            "id": model.id,
            "base_model": base_model if isinstance(base_model, str) else None,
            "sites": [site for site in sites if is_site(site)] if isinstance(sites, list) else [],
            "size": None,
            "license": card["license"] if isinstance(card.get("license"), str) else None,
            "description": str(card.get("description") or ""),
            "ours": True,
        }
        known += [entry] if model.id not in listed else []
    return known


def fetch(
    repo_id: str,
    subfolder: str,
    layers: list[str] | None,
    revision: str | None,
    force_download: bool,
    weights: bool = True,
    pickles: bool = False,
    site: str | None = None,
    **options,
) -> Path:
    """
    Download what is needed of a repository; returns the folder that mirrors it.

    Args:
        subfolder (`str`): of the dictionary in it, `"."` if it is at the root.
        layers (`list[str]`, *optional*): sites to download; all by default.
        weights (`bool`): with the tensors, or what describes them only.
        pickles (`bool`): whether other people's formats may be pickles.
        site (`str`, *optional*): the site of somebody else's autoencoder, where no name says it.
        options: as of `huggingface_hub.snapshot_download`.

    Raises:
        `OSError`: there is no such repository, no dictionary in it, or the Hub does not answer.
    """
    prefix = "" if subfolder == "." else f"{subfolder}/"

    def download(names: list[str], revision: str | None, force_download: bool) -> Path:
        patterns = [glob.escape(prefix + name) for name in names]
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=patterns, force_download=force_download, **options
            )
        )

    try:
        folder = download([CONFIG_NAME, LABELS_NAME, PRESETS_NAME, NAMES_NAME, MAPS_NAME], revision, force_download)
        config = folder / prefix / CONFIG_NAME
        if config.is_file():
            sites = choose_sites(check_sites(read_json(config).get("sites"), config), layers)
            needed = ("config.json", WEIGHTS_NAME) if weights else ("config.json",)
            names = [f"{site}/{name}" for site in sites for name in needed]
        else:
            listed = _names(repo_id, prefix, folder, **options)
            foreign = find(listed, PurePosixPath(subfolder).parts)
            if not foreign:
                more = unknown_weights(listed)
                raise OSError(f"it has no {prefix}{CONFIG_NAME}, and no files of a format that is read here.{more}")
            chosen = choose(foreign, layers, repo_id, site, told=pickles)
            chosen = {site: chosen[site] for site in choose_sites(chosen, layers)}
            check_pickles(chosen, repo_id, pickles)
            names = [name for one in chosen.values() for name in one.files]
        new = [name for name in names if force_download or not (folder / prefix / name).is_file()]
        download(names, folder.name, force_download)  # of the same commit, whatever is pushed meanwhile
        for name in new:
            _check_sum(folder / prefix / name)
    except HUB_ERRORS as error:
        raise OSError(
            f"{repo_id!r} is no folder here, and no dictionary that could be fetched from the Hub: "
            f"{reason(error, revision)}"
        ) from error
    return folder


def _names(
    repo_id: str, prefix: str, folder: Path, token: str | bool | None, local_files_only: bool, **_
) -> list[str]:
    """The files under a prefix of a repository; of what is in the cache if the Hub is not to be or cannot be asked."""
    names = list(walk(folder)) if folder.is_dir() else []
    if not local_files_only:
        try:
            names = HfApi(token=token, library_name=LIBRARY_NAME).list_repo_files(repo_id, revision=folder.name)
        except (HTTPError, OfflineModeIsEnabled):
            if not find(names):
                raise
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


def _check_sum(path: Path) -> None:
    """Raise `OSError` if a download is not what the Hub has: the cache names large files by their SHA-256."""
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    if not re.fullmatch("[0-9a-f]{64}", name):
        return
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != name:
        path.resolve().unlink()
        path.unlink()
        raise OSError(f"{path.name} arrived damaged: its SHA-256 is {digest[:12]}… instead of {name[:12]}… .")


def reason(error: Exception, revision: str | None = None) -> str:
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
