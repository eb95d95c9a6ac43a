"""The tensors in a dictionary's folder: opened with every claim checked, and written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..files import brief, line, open_tensors, read_json, write_json
from ..models import KINDS, SparseDictionary, with_tensors, without_weights
from .format import WEIGHTS_NAME, check_files, check_site_config

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def load_site(folder: Path, site: str, dtype: torch.dtype | None) -> SparseDictionary:
    """Open the dictionary of one site. Its file is mapped: rows are read from disk when they are used. So it may be
    replaced meanwhile, as saving does, but not cut short."""
    path, weights = folder / site, folder / site / WEIGHTS_NAME
    check_files(path, "config.json", WEIGHTS_NAME)
    sae = _described(path / "config.json", site)
    expected = sae.state_dict()
    with open_tensors(weights) as file:
        _check_header(weights, {name: file.get_slice(name) for name in file.keys()}, expected, sae.matrices)
        tensors = {name: file.get_tensor(name) for name in expected}  # mapped: neither read nor copied
    return with_tensors(sae, tensors, str(weights), dtype)


def _described(path: Path, site: str) -> SparseDictionary:
    """The dictionary that a site's config.json describes, without memory for its weights."""
    content = read_json(path)
    kind = content.get("_class_name")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{path} must name its kind as one of {list(KINDS)}, got {brief(kind)}.")
    config = check_site_config(path, content, site)
    try:
        return without_weights(kind, config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} describes no dictionary: {line(error)}") from None


def _check_header(path: Path, found: dict, expected: dict[str, torch.Tensor], matrices: tuple[str, ...]) -> None:
    """Raise `ValueError` unless the slices of a file are the tensors that its config.json promises."""
    wrong = [f"{name!r} is missing" for name in expected if name not in found]
    wrong += [f"{brief(name)} is none of ours" for name in found if name not in expected]
    for name in [name for name in expected if name in found]:
        shape, dtype = list(expected[name].shape), found[name].get_dtype()
        if found[name].get_shape() != shape:
            wrong.append(f"{name!r} has shape {brief(found[name].get_shape())} instead of {shape}")
        elif dtype not in (DTYPES if name in matrices else ("F32",)):
            wrong.append(f"{name!r} is {dtype} instead of {' or '.join(DTYPES) if name in matrices else 'F32'}")
    if wrong:
        raise ValueError(f"The weights in {path} do not fit its config.json: {', '.join(wrong[:8])}.")


def load_maps(path: Path) -> dict[str, torch.Tensor]:
    """The linear maps of fitted labels by name, each the rows `(r, G, 2 d + 1)` of one, float32."""
    with open_tensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        for name, found in slices.items():
            if len(found.get_shape()) != 3 or found.get_dtype() not in DTYPES:
                raise ValueError(f"{path}: {brief(name)} is no map: expected (rank, anchors, 2 channels + 1) floats.")
        maps = {name: file.get_tensor(name).float() for name in slices}
    for name, rows in maps.items():
        if not rows.isfinite().all():
            raise ValueError(f"{path} holds NaN or inf in {brief(name)}.")
    return maps


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a new safetensors file, as float16; raises `ValueError` if something does not fit that."""
    halves = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in tensors.items()}
    for name, tensor in halves.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{brief(name)} holds NaN, inf, or what is too large for float16.")
    write_tensors(halves, path)
    path.chmod(0o644)


def save_site(folder: Path, site: str, sae: SparseDictionary) -> None:
    """Write the dictionary of one site into a new folder: encoder and decoder rows as float16, statistics as
    float32."""
    path = folder / site
    path.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in sae.state_dict().items():
        tensor = tensor.detach().to("cpu", torch.float16 if name in sae.matrices else torch.float32).contiguous()
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name!r} of {site} holds NaN, inf, or what is too large for {tensor.dtype}.")
        is_shared = any(tensor.data_ptr() == other.data_ptr() for other in tensors.values())  # as of tied rows
        tensors[name] = tensor.clone() if is_shared else tensor
    write_json(path / "config.json", json.loads(sae.to_json_string()))
    write_tensors(tensors, path / WEIGHTS_NAME)
    shutil.copymode(path / "config.json", path / WEIGHTS_NAME)  # safetensors makes it unreadable for others


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a new safetensors file; `OSError` if that fails."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # as when the disk is full
        raise OSError(f"{path} could not be written: {line(error)}") from None
