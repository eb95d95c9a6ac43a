"""The arguments of a denoiser call by name, and the values in them that belong to each row of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

_TIMESTEPS = ("timestep", "timesteps", "t", "timestep_ratio", "r", "timestep_img", "bb_ca_time", "decoder_noise_time")


class Arguments:
    """
    The arguments of a denoiser call by name, whether they were passed by position or by keyword.

    Args:
        names (`list[str]`): names of the parameters of the denoiser's `forward`, in order.
        args (`tuple`): positional arguments of the call.
        kwargs (`dict`): keyword arguments of the call.
        channels (`int`, *optional*): number of channels of the denoiser's sample.
    """

    def __init__(self, names: list[str], args: tuple, kwargs: dict, channels: int | None = None):
        self.names, self.args, self.kwargs, self.channels = names, args, kwargs, channels
        self.by_name = {**dict(zip(names, args, strict=False)), **kwargs}
        self.sample_name = next((name for name in names if self.by_name.get(name) is not None), None)
        if self.sample_name is None:
            raise ValueError("The denoiser is called without a sample.")

    @property
    def sample(self) -> torch.Tensor | list:
        """The noisy latents: a tensor `(rows, ...)`, or a list with one tensor per row."""
        return self.by_name[self.sample_name]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the sample; of a list, its length and then the shape of its first tensor."""
        return _shape(self.sample)

    @property
    def timestep(self) -> torch.Tensor | float | None:
        """The timestep that the denoiser is called with, in its own unit."""
        return next((self.by_name[name] for name in _TIMESTEPS if self.by_name.get(name) is not None), None)

    def with_sample(self, sample) -> tuple[tuple, dict]:
        """`(args, kwargs)` of the same call with another sample."""
        return self._with(self.sample_name, sample)

    def with_timestep(self, timestep) -> tuple[tuple, dict]:
        """`(args, kwargs)` of the same call with another timestep."""
        return self._with(next(name for name in _TIMESTEPS if self.by_name.get(name) is not None), timestep)

    def _with(self, name: str, value) -> tuple[tuple, dict]:
        place = self.names.index(name)
        if place < len(self.args):
            return (*self.args[:place], value, *self.args[place + 1 :]), self.kwargs
        return self.args, {**self.kwargs, name: value}

    def texts(self) -> dict[str, list]:
        """The arguments that may hold text, each as a list with one value per row of the sample. These are all that
        have a value for each row or one for all rows, but the sample, timesteps and masks."""
        skipped, rows = {self.sample_name, *_TIMESTEPS}, len(self.sample)
        texts = {}
        for name, value in named(self.by_name):
            per_row = None if name in skipped or "mask" in name else _rows(value, rows)
            if per_row is not None:
                texts[name] = per_row
        return texts


def _shape(sample) -> tuple[int, ...]:
    return tuple(sample.shape) if torch.is_tensor(sample) else (len(sample), *_shape(sample[0]))


def named(values: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Arguments and their names, which have dots for arguments inside of dictionaries."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from named(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _rows(value, rows: int) -> list | None:
    """The value of an argument for each row; if it has one for each frame, that of the row's first frame. `None` if it
    has no values per row."""
    if torch.is_tensor(value) and value.ndim > 1 and len(value) == 1:
        return [value[0]] * rows
    if torch.is_tensor(value) and value.ndim and len(value) and len(value) % rows == 0:
        return [value[row * (len(value) // rows)] for row in range(rows)]
    if isinstance(value, list | tuple) and len(value) == rows and any(True for _ in flat(value)):
        return list(value)
    return None


def flat(values) -> Iterator[torch.Tensor | list]:
    """The tensors and the lists of tensors in nested values."""
    for value in values:
        if torch.is_tensor(value) and value.ndim:
            yield value
        elif isinstance(value, dict):
            yield from flat(value.values())
        elif isinstance(value, list | tuple) and value:
            if all(torch.is_tensor(one) for one in value):
                yield list(value)
            yield from flat(value)


def same(row, other) -> bool:
    """Whether the values of two rows are equal, up to a cast of the second."""
    if not torch.is_tensor(row) or not torch.is_tensor(other):
        ours, others = (list(flat([value])) if not torch.is_tensor(value) else [value] for value in (row, other))
        ours, others = ([one for one in values if torch.is_tensor(one)] for values in (ours, others))
        return bool(ours) and len(ours) == len(others) and all(map(same, ours, others))
    return row.shape == other.shape and torch.equal(row, other.to(row))


def same_part(text: list, start: int, stop: int, other, first: int, last: int) -> bool:
    """Whether the first and the last row of the part `start` to `stop` equal rows `first` and `last` of `other`."""
    return same(text[start], other[first]) and same(text[stop - 1], other[last])
