"""Reads other people's autoencoders, as the module of their format says, into the kinds there are here."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ..files import line, open_tensors, read_json
from .base import Published, Settings, Tensors
from .registry import FORMATS

if TYPE_CHECKING:
    import torch

    from ..models import SparseDictionary

ANCHORS = [961, 721, 481, 241, 1]  # timesteps that stand for all, where nothing says which it was trained at
UNKNOWN = 3.4028234663852886e38  # the largest float32: of an activation that may be as large as it likes


def read(folder: Path, published: Published, site: str, dtype: torch.dtype | None = None) -> SparseDictionary:
    """
    Read an autoencoder; of safetensors, rows are read from disk when they are used.

    Args:
        folder (`Path`): that [`find`] searched.
        published (`Published`): one that it found there.
        site (`str`): path of the module that it is of.
        dtype (`torch.dtype`, *optional*): of the matrices; as they are stored by default.

    Raises:
        `OSError`: a file is damaged. `ValueError`: it says what no kind here can be.
    """
    import torch

    from ..models import with_tensors, without_weights
    from .pickles import unpickled

    weights = folder / published.weights
    config_path = folder / published.config if published.config else weights
    config = read_json(config_path) if published.config else {}
    format = FORMATS[published.format]
    if published.is_pickled:
        tensors, attributes = unpickled(weights, format.pickled_classes)
        config = attributes | config
    else:
        tensors = _mapped(weights)
    for other in published.more:
        tensors |= {PurePosixPath(other).stem: value for value in unpickled(folder / other)[0].values()}
    described = format.describe(Settings(config_path, config), Tensors(weights, tensors))
    count, width = described.tensors["encoder"].shape
    options = {"k": count, "anchors": ANCHORS} | described.options
    options |= {"site": site, "in_channels": width, "num_latents": count}
    try:
        sae = without_weights(described.kind, options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{config_path} describes no dictionary: {line(error)}") from None
    values = {
        "threshold": torch.zeros(count), "scale": torch.ones(len(options["anchors"])),
        "typical_activation": torch.ones(count), "max_activation": torch.full((count,), UNKNOWN),
        "mean_activation": torch.zeros(count), "density": torch.full((count,), min(1.0, options["k"] / count)),
    }  # fmt: skip
    values |= {n: tensor if n in sae.matrices else tensor.float() for n, tensor in described.tensors.items()}
    return with_tensors(sae, values, str(weights), dtype)


def _mapped(path: Path) -> dict[str, torch.Tensor]:
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}
