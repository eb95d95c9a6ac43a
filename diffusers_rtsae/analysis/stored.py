"""What is kept of activations: whole ones on disk for a while, and the few latents that are active in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch


class Shelf:
    """Tensors in a temporary file, read a few rows at a time. Closing deletes them."""

    def __init__(self):
        self._file, self._entries = tempfile.TemporaryFile(), {}

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *error) -> None:
        self._file.close()

    def put(self, key: tuple, values: torch.Tensor) -> None:
        """Store a tensor `(rows, ...)`. One that is stored under this key already is overwritten, and has the same
        shape."""
        host = values.detach().to("cpu").contiguous()
        if key not in self._entries:
            self._entries[key] = self._file.seek(0, 2), host.shape, host.dtype, values.device
        self._file.seek(self._entries[key][0])
        self._file.write(host.flatten().view(torch.uint8).numpy().data)

    def get(self, key: tuple, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop`, or all, on the device that they came from."""
        offset, shape, dtype, device = self._entries[key]
        stop = shape[0] if stop is None else stop
        row = shape[1:].numel() * dtype.itemsize
        self._file.seek(offset + start * row)
        buffer = bytearray((stop - start) * row)
        self._file.readinto(buffer)
        return torch.frombuffer(buffer, dtype=dtype).view(stop - start, *shape[1:]).to(device)


@dataclass
class Codes:
    """
    The active latents of a site on the tokens of some rows, as a sparse tensor.

    Args:
        rows, tokens, count (`int`): the number of rows, of tokens in a row, and of latents of the dictionary.
        places, latents (`torch.Tensor`): for each active entry its token, numbered through all rows, and its latent.
        values (`torch.Tensor`): for each active entry its activation.
    """

    rows: int
    tokens: int
    count: int
    places: torch.Tensor
    latents: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, rows: int, tokens: int, count: int, parts: list[tuple[torch.Tensor, ...]]) -> Codes:
        """Join parts `(places, latents, values)`."""
        places, latents, values = (torch.cat(column) for column in zip(*parts, strict=True))
        dtypes = (torch.int16 if bound < 2**15 else torch.int32 for bound in (rows * tokens, count))
        places, latents = (index.to(dtype) for index, dtype in zip((places, latents), dtypes, strict=True))
        return cls(rows, tokens, count, places, latents, values)

    def dense(self, latents: Sequence[int]) -> torch.Tensor:
        """The activations of some latents, `(rows, N, latents)`."""
        column = torch.full((self.count,), -1, device=self.values.device)
        column[list(latents)] = torch.arange(len(latents), device=self.values.device)
        columns = column[self.latents.long()]
        selected = columns >= 0
        dense = torch.zeros(self.rows * self.tokens, len(latents), device=self.values.device)
        dense[self.places[selected].long(), columns[selected]] = self.values[selected]
        return dense.view(self.rows, self.tokens, -1)

    def sums(self, weights: torch.Tensor, active: bool = False) -> torch.Tensor:
        """
        The weighted sum over tokens of each latent's activation, `(m,)`, on the CPU.

        Args:
            weights (`torch.Tensor`): of the tokens, `(rows, N or 1)`.
            active (`bool`): count each active entry as 1 instead of its activation.
        """
        weights = weights.to(self.values).expand(self.rows, self.tokens).flatten()[self.places.long()]
        values = weights if active else weights * self.values
        return torch.zeros(self.count, device=values.device).index_add_(0, self.latents.long(), values).cpu()
