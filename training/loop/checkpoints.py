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
    Folders that each hold everything at one step. A folder appears when it is complete; old ones are deleted.

    Args:
        folder (`Path`): of all checkpoints.
        kept (`int`): how many of the latest are kept.
        processes (`Processes`): each writes and reads its share.
    """

    def __init__(self, folder: Path, kept: int, processes: Processes = ALONE):
        self.folder, self.kept, self.processes = folder, kept, processes

    def _complete(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if not path.name.endswith(".partial"))

    def latest(self) -> Path | None:
        """The folder of the latest checkpoint, if there is one."""
        return self._complete()[-1] if self._complete() else None

    def _share(self, name: str) -> str:
        return f"{name}-{self.processes.rank + 1}-of-{self.processes.count}.safetensors"

    def save(self, step: int, trainers: dict[str, DictionaryTrainer], marks: dict[str, str], stream: Stream | None):
        """Write a checkpoint; `marks` are the fingerprints of the trainers, by the same names."""
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
        for old in self._complete()[: -self.kept]:
            shutil.rmtree(old)

    def load(self, trainers: dict[str, DictionaryTrainer], marks: dict[str, str], stream: Stream | None) -> int:
        """Load the latest checkpoint. Returns the number of finished steps, 0 if there is none."""
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
