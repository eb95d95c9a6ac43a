"""Checkpoint files: safetensors that are written whole, and hold enough to continue bit for bit.

Batches are drawn from a generator seeded by (seed, step), so the number of steps is all there is to know of the data.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from diffusers_rtsae.files import whole

from .differences import differences


def save_checkpoint(
    path: Path, step: int, tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, fingerprint: str
) -> None:
    """Write `tensors` and the optimizer's moments; `fingerprint` describes the run that they belong to."""
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
    """Copy a checkpoint into `tensors` and `optimizer`. Returns the number of finished steps, 0 if there is no file.

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
