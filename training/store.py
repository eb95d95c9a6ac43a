"""Trajectories on disk: float16 safetensors shards, each written under a temporary name and renamed when whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class TrajectoryStore:
    """
    Shards of trajectories of one or more sites.

    A shard holds, for each site, `(tokens, G, d)` float16; `<site>/image (tokens,)`, the index of the prompt each
    token comes from; `<site>/token (tokens,)`, its place in the site's grid, row by row; and what a scorer read in the
    shard's images, if one was used.

    Args:
        folder (`Path`): where the shards lie.
        fingerprint (`str`): the settings the trajectories were made with; shards of other settings are refused.
    """

    def __init__(self, folder: Path, fingerprint: str):
        self.folder, self.fingerprint = Path(folder), fingerprint
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, index: int) -> Path:
        return self.folder / f"shard-{index:05d}.safetensors"

    def shards(self) -> list[Path]:
        """The shards that are whole, in order."""
        return sorted(self.folder.glob("shard-*.safetensors"))

    def write(self, index: int, tensors: dict[str, torch.Tensor], readings: list[dict] | None = None) -> None:
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name}: the activations hold NaN or inf, or overflow float16; nothing was written.")
        partial = self.path(index).with_suffix(".partial")
        metadata = {"fingerprint": self.fingerprint, "readings": json.dumps(readings or [])}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata=metadata)
        os.replace(partial, self.path(index))

    def _open(self, path: Path):
        try:
            file = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"{path} is damaged ({error}). Delete it and run the same command again to make it anew."
            ) from None
        metadata = file.metadata() or {}
        if metadata.get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"{path} was collected with other settings than the recipe has now. Restore the recipe, or delete "
                f"{self.folder} to collect again. It was made with: {metadata.get('fingerprint')}"
            )
        return file

    def check(self, index: int) -> bool:
        """Whether shard `index` is there and belongs to this run."""
        if not self.path(index).exists():
            return False
        with self._open(self.path(index)):
            return True

    def load(self, path: Path, site: str) -> torch.Tensor:
        """Trajectories `(tokens, G, d)` float16 of one shard."""
        with self._open(path) as file:
            if site not in file.keys():
                raise ValueError(
                    f"{path} holds no site {site!r}, it holds {sorted(key for key in file.keys() if '/' not in key)}."
                )
            return file.get_tensor(site)

    def load_origin(self, path: Path, site: str) -> tuple[torch.Tensor, torch.Tensor, list[dict]]:
        """Prompt index and token position of each trajectory of a site, and the readings of the shard's images."""
        with self._open(path) as file:
            origin = file.get_tensor(f"{site}/image"), file.get_tensor(f"{site}/token")
            return *origin, json.loads(file.metadata()["readings"])
