"""What a format of somebody else is to this package: how its files are recognised, and what they say in its own terms.
Needs no torch until tensors are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from ..files import brief

if TYPE_CHECKING:
    import torch

    from ..models import SparseDictionary

PICKLES = (".pt", ".pth", ".bin")


class Published(NamedTuple):
    """
    One autoencoder in a folder or a repository.

    site (`str`, *optional*): path of the module it is of, as the names of folders or files say it.
    format (`str`): the name of its format.
    weights, config (`str`): paths of its files in the folder; some formats have no configuration.
    more (`tuple[str, ...]`): other files of it.
    """

    site: str | None
    format: str
    weights: str
    config: str | None
    more: tuple[str, ...]

    @property
    def files(self) -> list[str]:
        return [self.weights, *([self.config] if self.config else []), *self.more]

    @property
    def is_pickled(self) -> bool:
        return PurePosixPath(self.weights).suffix in PICKLES


class Description(NamedTuple):
    """
    What files say in this package's terms.

    kind (`str`): the class of `diffusers_rtsae.models` it becomes.
    options (`dict`): arguments of that class, without site, channels and number of latents, which the tensors say;
        `k` and `anchors` where the files have them.
    tensors (`dict[str, torch.Tensor]`): by their names there: `encoder` and `decoder` `(m, d)`, and at least the
        biases. Statistics that are left out are those of latents about which nothing is known.
    """

    kind: str
    options: dict
    tensors: dict[str, torch.Tensor]


class Format(ABC):
    """
    Somebody else's format for sparse autoencoders. A new one is a subclass in a module of its own, and a line in
    `FORMATS`.

    Attributes:
        name (`str`): of the library or publication.
        weights (`str`): regular expression of the file with the weights, without its suffix.
        config (`str`, *optional*): name of the JSON file beside it; without one, the weights must say it all.
        needs_config (`bool`): whether weights without their JSON file are none of this format.
        more (`tuple[str, ...]`): names of other files with tensors, which may lie beside pickled weights.
        pickled_classes (`tuple[str, ...]`): how the classes and functions begin that a pickle may name beside tensors.
            Of those, nothing is imported or called: only attributes are read, into the settings.
    """

    name: str
    weights: str
    config: str | None = None
    needs_config: bool = True
    more: tuple[str, ...] = ()
    pickled_classes: tuple[str, ...] = ()

    def site(self, stem: str) -> str | None:
        """The site (hookpoint) that the name of the weights, without its suffix, says; else the folder says it."""
        return None

    def folder(self, name: str) -> str:
        """The name of a folder as the path of a module, where this format spells it otherwise."""
        return name

    def is_of(self, site: str | None) -> bool:
        """Whether files of these names are of this format at such a site, `None` if no name says it."""
        return True

    @abstractmethod
    def describe(self, config: Settings, tensors: Tensors) -> Description:
        """
        What the files say in this package's terms.

        Raises:
            `ValueError`: they say what no dictionary here can be.
        """

    def export(self, sae: SparseDictionary, base_model: str | None) -> tuple[dict, dict[str, torch.Tensor]]:
        """
        The configuration and the tensors with which this format stands for a dictionary.

        Raises:
            `ValueError`: the format has nothing like it, or is only read.
        """
        raise ValueError(f"{self.name} is read, and not written.")


class Settings:
    """Somebody else's configuration file, with each value checked as it is taken."""

    def __init__(self, path: Path, content: dict):
        self.path, self.content = path, content

    def get(self, name: str, default=None):
        return self.content.get(name, default)

    def count(self, name: str) -> int:
        """A positive int."""
        value = self.content.get(name)
        if type(value) is not int or not 0 < value < 2**31:
            raise ValueError(f"{self.path} must have {name!r} as a positive int, got {brief(value)}.")
        return value

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.content.get(name)
        if type(value) not in (int, float) or not abs(value) < 1e30:
            raise ValueError(f"{self.path} must have {name!r} as a number, got {brief(value)}.")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.content.get(name)
        if type(value) is not bool:
            raise ValueError(f"{self.path} must have {name!r} as true or false, got {brief(value)}.")
        return value

    def section(self, name: str) -> Settings:
        """An object inside, empty if there is none."""
        value = self.content.get(name)
        return Settings(self.path, value if isinstance(value, dict) else {})

    def expect(self, name: str, known: Collection, why: str) -> None:
        """Raise `ValueError`, which ends with `why`, unless a value is one of `known` or left out."""
        value = self.content.get(name)
        if value is not None and value not in list(known):
            raise ValueError(f"{self.path} says {name} = {brief(value)}, and {why}.")

    def require(self, name: str, known: Collection, why: str) -> None:
        """Raise `ValueError`, which ends with `why`, unless a value is one of `known`."""
        value = self.content.get(name)
        if value not in list(known):
            raise ValueError(f"{self.path} says {name} = {brief(value)}, and {why}.")


class Tensors:
    """Somebody else's tensors by name, with type and shape checked as each is taken."""

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor]):
        self.path, self.tensors = path, tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def size(self, name: str) -> tuple[int, int]:
        """The shape of a matrix."""
        return tuple(self(name, None, None).shape)

    def __call__(self, name: str, *shape: int | None) -> torch.Tensor:
        """A tensor of floats of this shape, in which `None` stands for any size."""
        tensor = self.tensors.get(name)
        sizes = None if tensor is None else tuple(tensor.shape)
        fits = sizes is not None and len(sizes) == len(shape) and tensor.is_floating_point() and 0 not in sizes
        if not fits or any(size not in (None, actual) for size, actual in zip(shape, sizes, strict=True)):
            what = "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} of shape {sizes}"
            expected = tuple("any" if size is None else size for size in shape)
            raise ValueError(f"{self.path} must hold {name!r} as floats of shape {expected}, found {what}.")
        return tensor if tensor.dtype.itemsize in (2, 4) else tensor.float()

    def threshold(self, name: str, count: int) -> torch.Tensor:
        """One for each latent, given so or as one for all."""
        shape = () if name in self.tensors and self.tensors[name].ndim == 0 else (count,)
        return self(name, *shape).float().expand(count).clone()


def gated(
    encoder: torch.Tensor, gate: torch.Tensor, magnitude: torch.Tensor, scale: torch.Tensor, decoder: torch.Tensor,
    bias: torch.Tensor,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """A gated autoencoder (2404.16014) as one above a threshold: w x + b_gate > 0 where eʳ w x + b_mag > b_mag − eʳ
    b_gate."""
    scale = scale.float().exp()
    return {
        "encoder": encoder.float() * scale[:, None],
        "encoder_bias": magnitude,
        "threshold": magnitude.float() - scale * gate.float(),
        "decoder": decoder,
        "decoder_bias": bias,
    }


def unit_rows(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same autoencoder with decoder rows of length 1, and activations as large as what they add."""
    length = tensors["decoder"].float().norm(dim=1).clamp(min=1e-20)
    scaled = {"encoder": tensors["encoder"].float() * length[:, None], "decoder": tensors["decoder"] / length[:, None]}
    for name in ("encoder_bias", "threshold"):
        if name in tensors:
            scaled[name] = tensors[name].float() * length
    return tensors | scaled


def signed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An autoencoder of m latents that may be negative, with the k largest by absolute value, as one of 2 m latents
    that may not: latent j + m is active where latent j is negative, and points the other way."""
    import torch

    parts = ("encoder", "encoder_bias", "decoder")
    return tensors | {name: torch.cat([tensors[name], -tensors[name]]) for name in parts}
