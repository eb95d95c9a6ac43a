"""Trajectories of anybody: of any process that goes on in steps, in files or in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from diffusers_rtsae.dictionary.format import is_site

from ..recipe import Train
from .split import MEASURED_TOKENS, Data
from .store import NOWHERE, Rows, checksum, metadata_name

SHAPE = "(samples, steps, width)"
MOST_STEPS = 1000  # of a dictionary
_CHUNK = 8192  # trajectories whose second moments are computed at once


class Sequences:
    """
    Trajectories by the name of what they are of.

    Args:
        parts (`dict[str, list[torch.Tensor]]`): for each name tensors `(samples, …, steps, width)`, in order; all
            dimensions between samples and steps count as further trajectories of a sample.
        mark (`str`): fingerprint, as JSON.
    """

    def __init__(self, parts: dict[str, list[torch.Tensor]], mark: str):
        self.parts, self.mark = parts, mark

    def steps(self, name: str) -> int:
        return self.parts[name][0].shape[-2]

    def split(self, train: Train, seed: int) -> tuple[Data, dict[str, tuple[list, list]]]:
        """
        The last samples are held out, a share of `train.validation`: the trajectories of every other one of them set
        thresholds, those of the rest are measured on.

        Returns:
            the data, and for each name the parts to fit dynamics to and those to measure R² on.

        Raises:
            `ValueError`: there are fewer than three samples.
        """
        generator, rows, halves, moments = torch.Generator().manual_seed(seed), {}, ({}, {}), {}
        for name, parts in self.parts.items():
            count = sum(map(len, parts))
            held = max(2, round(train.validation * count))
            if held >= count:
                raise ValueError(f"Expected 3 samples of {name!r} or more, two of them to be held out, got {count}.")
            kept, sides, start = [], ([], []), 0
            for part in parts:
                first = min(max(count - held - start, 0), len(part))  # held out
                kept.append(part[:first])
                for side in range(2):
                    sides[side].append(part[first + (start + first + side) % 2 :: 2])
                start += len(part)
            kept, *sides = ([p.flatten(0, -3) for p in some if len(p)] for some in (kept, *sides))
            rows[name] = Rows(kept)
            rows[metadata_name(name)] = torch.full((1, 3), NOWHERE).expand(len(rows[name]), 3)
            for half, side in zip(halves, map(Rows, sides), strict=True):
                half[name] = side[torch.randperm(len(side), generator=generator)[:MEASURED_TOKENS]]
            moments[name] = tuple([c for p in some for c in p.split(_CHUNK)] for some in (kept, sides[0] + sides[1]))
        return Data(rows, *halves), moments


def read_folder(folder: str | Path, names: Sequence[str] | None = None) -> Sequences:
    """
    The trajectories in the safetensors files of a folder, in the order of their names.

    Args:
        names (`Sequence[str]`, *optional*): of tensors; all by default. Each becomes a dictionary of its own.

    Raises:
        `ValueError`: there are no files, or one of them holds something else than trajectories of the same kind as the
            first. `OSError`: there is no such folder, or a file is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: expected one of safetensors, with tensors {SHAPE}.")
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        found = sorted(path.name for path in folder.iterdir())[:8] or "nothing"
        raise ValueError(f"Expected files *.safetensors in {folder}, with tensors {SHAPE}, found {found}.")
    parts: dict[str, list[torch.Tensor]] = {}
    digests, is_asked = {}, names is not None
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                present = sorted(file.keys())
                names = _checked_names(names or present)
                if missing := [name for name in names if name not in present]:
                    raise ValueError(f"{path}: expected a tensor {missing[0]!r}, it holds {present}.")
                if len(present) > len(names) and not is_asked:
                    raise ValueError(f"{path}: expected the tensors {names}, as in {paths[0]}, it holds {present}.")
                tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise OSError(f"{path}: expected safetensors, found a damaged file ({error}).") from None
        for name, tensor in tensors.items():
            _check(tensor, str(path), name, parts.get(name), str(paths[0]))
            parts.setdefault(name, []).append(tensor)
        digests[path.name] = checksum(tensors, "")
    return Sequences(parts, json.dumps({"trajectories": digests}))


def read_tensors(tensors: Iterable[torch.Tensor], name: str) -> Sequences:
    """
    Trajectories in memory, one tensor `(samples, …, steps, width)` or several.

    Raises:
        `ValueError`: there are none, or one is something else than trajectories of the same kind as the first.
    """
    (name,), parts = _checked_names([name]), []
    for i, part in enumerate([tensors] if torch.is_tensor(tensors) else tensors):
        tensor = torch.as_tensor(part).detach().cpu()
        _check(tensor, f"part {i} of the trajectories", name, parts, "the first part")
        parts.append(tensor)
    if not parts:
        raise ValueError(f"Expected trajectories {SHAPE}, got none.")
    whole = {name: torch.cat(parts)}
    return Sequences({name: [whole[name]]}, json.dumps({"trajectories": checksum(whole, "")}))


def _checked_names(names: Sequence[str]) -> list[str]:
    for name in names:
        if not is_site(name):
            raise ValueError(f"Expected trajectories with a name like 'states' or 'layers.3', got {name!r}.")
    return list(names)


def _check(tensor: torch.Tensor, where: str, name: str, before: list[torch.Tensor] | None, first: str) -> None:
    """Raise `ValueError` unless these are trajectories like those `before`, of which the first is called `first`."""
    shape = tuple(tensor.shape)
    if tensor.ndim < 3 or not tensor.numel() or not tensor.is_floating_point():
        raise ValueError(f"{where}: expected {name!r} as floats {SHAPE}, got {shape} of {tensor.dtype}.")
    if not 2 <= shape[-2] <= MOST_STEPS:
        raise ValueError(f"{where}: expected {name!r} {SHAPE} with 2 to {MOST_STEPS} steps, got {shape}.")
    if before and shape[1:] != (expected := tuple(before[0].shape[1:])):
        raise ValueError(f"{where}: expected {name!r} as (samples, {str(expected)[1:]}, as in {first}, got {shape}.")
    finite = tensor.isfinite().flatten(1).all(1)
    if not finite.all():
        sample = int((~finite).nonzero()[0])
        raise ValueError(f"{where}: expected finite numbers in {name!r}, got NaN or inf in sample {sample}.")
