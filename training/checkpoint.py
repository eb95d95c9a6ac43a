"""Checkpoints as safetensors files, written atomically, enough to continue bit for bit.

Batches are drawn from a generator seeded by (seed, step), so the step number is all there is to know about the data.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffusers_rtsae.files import whole

from .fingerprint import differences
from .processes import ALONE, Processes

if TYPE_CHECKING:  # a stream draws prompts of worlds, whose own trainings keep checkpoints
    from .dictionary import DictionaryTrainer
    from .stream import Stream


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The source of all randomness of one training step."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def save_checkpoint(
    path: Path, step: int, tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, fingerprint: str
) -> None:
    """Write `tensors` and the optimizer's moments; `fingerprint` names the run they belong to."""
    flat = {f"state.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for i, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            flat[f"optimizer.{i}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        save_file(flat, partial, metadata={"step": str(step), "fingerprint": fingerprint})


def load_checkpoint(
    path: Path, tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, fingerprint: str
) -> int:
    """Copy a checkpoint into `tensors` and `optimizer`; returns the number of steps done, 0 if there is none.

    Raises:
        `ValueError`: if the checkpoint was written by a run with other settings.
    """
    if not path.exists():
        return 0
    try:
        opened = safe_open(path, "pt")
    except SafetensorError as error:
        raise OSError(f"{path} is damaged ({error}). Delete it to train from the beginning.") from None
    with opened as file:
        metadata = file.metadata()
        if metadata["fingerprint"] != fingerprint:
            changed = differences(metadata["fingerprint"], fingerprint)
            what = "; ".join(changed) if changed else metadata["fingerprint"]
            raise ValueError(
                f"{path} belongs to a run with other settings ({what}). Delete it to start again, or restore them."
            )
        for name, tensor in tensors.items():
            tensor.data.copy_(file.get_tensor(f"state.{name}"))
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key in file.keys():
            if key.startswith("optimizer."):
                _, i, name = key.split(".", 2)
                state.setdefault(int(i), {})[name] = file.get_tensor(key)
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"])


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
