"""Pickles, of which nothing is imported or called: their tensors, and plain attributes of the objects they name."""

from __future__ import annotations

from pathlib import Path

import torch

from ..files import line


def unpickled(path: Path, classes: tuple[str, ...] = ()) -> tuple[dict[str, torch.Tensor], dict]:
    """
    The tensors of a pickle by name, as a state dict names them, and the plain attributes of its objects.

    Args:
        classes (`tuple[str, ...]`): how the names of classes and functions begin that it may have beside tensors. In
            their place stand empty classes of this module.

    Raises:
        `OSError`: it is damaged, or names anything else.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path) if classes else []
        stand_ins = [(type(n.rpartition(".")[2], (_StandIn,), {}), n) for n in names if n.startswith(classes)]
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise OSError(f"{path} is damaged, or holds more than tensors: {line(error)}") from None
    if isinstance(content, _StandIn):
        tensors, attributes = {}, {"class": type(content).__name__}
        _collect(content, "", tensors, attributes)
        return tensors, attributes
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    content = content if isinstance(content, dict) else {"": content}
    return {str(name): value for name, value in content.items() if torch.is_tensor(value)}, {}


class _StandIn:
    """In the place of a class or function that a pickle names."""


def _collect(module: _StandIn, prefix: str, tensors: dict[str, torch.Tensor], attributes: dict) -> None:
    """Gather the tensors and attributes of a pickled `torch.nn.Module` and of those inside it."""
    for name, value in vars(module).items():
        inner = value if name in ("_parameters", "_buffers", "_modules") and isinstance(value, dict) else {name: value}
        for key, one in inner.items():
            if torch.is_tensor(one) and inner is value:
                tensors[f"{prefix}{key}"] = one.detach()
            elif torch.is_tensor(one) and one.numel() == 1:
                attributes[f"{prefix}{key}"] = one.item()
            elif isinstance(one, _StandIn):
                attributes[f"{prefix}{key}"] = type(one).__name__
                _collect(one, f"{prefix}{key}.", tensors, attributes)
            elif isinstance(one, type) and issubclass(one, _StandIn):
                attributes[f"{prefix}{key}"] = one.__name__
            elif isinstance(one, bool | int | float | str):
                attributes[f"{prefix}{key}"] = one
