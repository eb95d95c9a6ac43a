"""Checkpoints of several dictionaries, and of the buffer they are trained on, at one step."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from ..common.checkpoint import load_checkpoint, save_checkpoint
from ..common.processes import ALONE, Processes
from ..data.stream import Stream
from .trainer import DictionaryTrainer


class Checkpoints:
    """
    Everything at one step in one folder, which appears whole or not at all; the latest few are kept.

    Args:
        folder (`Path`): where they lie.
        kept (`int`): how many.
        processes (`Processes`): that each write and read their share.
    """

    def __init__(self, folder: Path, kept: int, processes: Processes = ALONE):
        self.folder, self.kept, self.processes = folder, kept, processes

    def _whole(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if not path.name.endswith(".partial"))

    def latest(self) -> Path | None:
        return self._whole()[-1] if self._whole() else None

    def _share(self, name: str) -> str:
        return f"{name}-{self.processes.rank + 1}-of-{self.processes.count}.safetensors"

    def save(self, step: int, trainers: dict[str, DictionaryTrainer], marks: dict[str, str], stream: Stream | None):
        path = self.folder / f"step-{step:08d}"
        partial = path.with_name(path.name + ".partial")
        if self.processes.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.processes.wait()
        try:
            for name, trainer in trainers.items():
                file = partial / self._share(name)
                save_checkpoint(file, trainer.done, trainer.state, trainer.optimizer, marks[name])
            if stream is not None:
                stream.save(partial / "stream.safetensors")
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"{path} could not be written ({error}). Make room, then run the same command again: it continues "
                "from the checkpoint before."
            ) from None
        self.processes.wait()
        if self.processes.rank > 0:
            return
        os.replace(partial, path)
        for old in self._whole()[: -self.kept]:
            shutil.rmtree(old)

    def load(self, trainers: dict[str, DictionaryTrainer], marks: dict[str, str], stream: Stream | None) -> int:
        """The number of steps done, 0 if there is no checkpoint."""
        path = self.latest()
        if path is None:
            return 0
        for name, trainer in trainers.items():
            file = path / self._share(name)
            if not file.exists():
                raise ValueError(
                    f"{path} holds no {file.name}: this run was started without it, or on another number of "
                    "processes. Use another --work."
                )
            trainer.done = load_checkpoint(file, trainer.state, trainer.optimizer, marks[name])
        if stream is not None:
            stream.load(path / "stream.safetensors")
        return int(path.name.removeprefix("step-"))
