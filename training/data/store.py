"""Trajectories on disk: float16 safetensors shards, written under a temporary name and renamed when complete."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import fsspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffusers_rtsae.files import whole

from ..common.differences import differences

NOWHERE = -1.0  # row and column of a token that lies on no grid


def metadata_name(site: str) -> str:
    """The name of the tensor that holds row, column and guidance of each trajectory of a site."""
    return f"{site}/told"


def check_finite(tensors: dict[str, torch.Tensor]) -> None:
    """Raise `ValueError` if a site's trajectories cannot be trained on."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: the activations hold NaN or inf, or overflow float16; nothing was written.")


def checksum(tensors: dict[str, torch.Tensor], readings: str) -> str:
    """A digest of the tensors and readings of a shard."""
    digest = hashlib.blake2b(readings.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Rows:
    """
    Trajectories `(rows, G, d)` of many shards as one tensor, which is read from disk where it is indexed.

    Index it with a tensor of row numbers. Memory does not grow with the number of shards.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self.tensors = tensors
        self.starts = torch.tensor([0, *(len(t) for t in tensors)]).cumsum(0)
        self.dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
        self.shape = (len(self), *tensors[0].shape[1:])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(rows), *self.shape[1:], dtype=self.dtype)
        rows, order = rows.sort()
        bounds = torch.searchsorted(rows, self.starts).tolist()
        for i, (low, high) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if low < high:
                out[order[low:high]] = self.tensors[i][rows[low:high] - self.starts[i]].to(out)
        return out


class Damaged(OSError):
    """A shard that differs from what was written."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} is damaged ({reason}). Run the same command again, which collects it anew.")
        self.reason = reason


class TrajectoryStore:
    """
    Shards of trajectories of one or more sites.

    A shard holds for each site

    - `<site> (tokens, G, d)` float16, the trajectories;
    - `<site>/image (tokens,)`, the index of the prompt that each comes from;
    - `<site>/token (tokens,)`, the index of the token, row by row;
    - `<site>/told (tokens, 3)`, row, column and guidance of each, from 0 to 1, or `NOWHERE`;

    and a scorer's readings of the images, if there is a scorer, and a checksum, which is verified when the shard is
    opened for the first time.

    Args:
        folder (`Path | str`): of the shards; a folder, or any URL that fsspec knows.
        fingerprint (`str`): what the trajectories depend on. Shards with another fingerprint are refused.
        cache (`Path`, *optional*): a folder for copies of shards that are at a URL.
    """

    def __init__(self, folder: Path | str, fingerprint: str, cache: Path | None = None):
        self.fingerprint, self.remote, self._verified = fingerprint, None, set()
        if "://" in str(folder):
            if cache is None:
                raise ValueError(f"Shards at {folder} need a local `cache` folder to be read from.")
            self.remote, self.root = fsspec.core.url_to_fs(str(folder))
            self.remote.makedirs(self.root, exist_ok=True)
            folder = cache
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"

    def shards(self) -> list[Path]:
        """The complete shards, in order."""
        if self.remote is None:
            return sorted(self.folder.glob("shard-*.safetensors"))
        names = [found.rpartition("/")[2] for found in self.remote.ls(self.root, detail=False)]
        return [
            self.folder / name for name in sorted(names) if name.startswith("shard-") and not name.endswith(".partial")
        ]

    def write(self, index: int, tensors: dict[str, torch.Tensor], readings: list[dict] | None = None) -> None:
        check_finite(tensors)
        path = self.path(index)
        text = json.dumps(readings or [])
        metadata = {"fingerprint": self.fingerprint, "readings": text, "checksum": checksum(tensors, text)}
        self._verified.discard(path)
        try:
            with whole(path) as partial:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
            if self.remote is not None:
                target = f"{self.root}/{path.name}"
                self.remote.put_file(str(path), target + ".partial")
                self.remote.mv(target + ".partial", target)
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"{path} could not be written ({error}). Make room or choose another folder, then run the same "
                "command again: the shards before it are kept."
            ) from None

    def _open(self, path: Path):
        if self.remote is not None and not path.exists():
            with whole(path, os.getpid()) as partial:  # several processes may download it at once
                self.remote.get_file(f"{self.root}/{path.name}", str(partial))
        try:
            file = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise Damaged(path, str(error)) from None
        metadata = file.metadata() or {}
        if metadata.get("fingerprint") != self.fingerprint:
            changed = differences(metadata.get("fingerprint"), self.fingerprint)
            if changed is None:
                why = "is of an earlier version, which did not note all that trajectories depend on. Delete"
            else:
                why = f"was collected otherwise: {'; '.join(changed)}. Restore that, or delete"
            raise ValueError(f"{path} {why} {self.folder} to collect again.")
        if path not in self._verified:
            found = checksum({name: file.get_tensor(name) for name in file.keys()}, metadata["readings"])
            if found != metadata["checksum"]:
                raise Damaged(path, "its checksum differs")
            self._verified.add(path)
        return file

    def check(self, index: int) -> bool:
        """Whether shard `index` exists, is complete, and belongs to this run. A damaged shard is deleted."""
        path = self.path(index)
        if not (self.remote.exists(f"{self.root}/{path.name}") if self.remote is not None else path.exists()):
            return False
        try:
            with self._open(path):
                return True
        except Damaged as error:
            warnings.warn(f"{path} is damaged ({error.reason}): it is collected again.", stacklevel=2)
            path.unlink()
            return False

    def load(self, path: Path, site: str) -> torch.Tensor:
        """Trajectories `(tokens, G, d)` float16 of one shard, mapped from the file."""
        with self._open(path) as file:
            if site not in file.keys():
                raise ValueError(
                    f"{path} holds no site {site!r}, it holds {sorted(key for key in file.keys() if '/' not in key)}."
                )
            return file.get_tensor(site)

    def rows(self, paths: Sequence[Path], site: str) -> Rows:
        """The trajectories of many shards."""
        return Rows([self.load(path, site) for path in paths])

    def load_origin(self, path: Path, site: str) -> tuple[torch.Tensor, torch.Tensor, list[dict]]:
        """Prompt index and token index of each trajectory of a site, and the scorer's readings of the images."""
        with self._open(path) as file:
            origin = file.get_tensor(f"{site}/image"), file.get_tensor(f"{site}/token")
            return *origin, json.loads(file.metadata()["readings"])
