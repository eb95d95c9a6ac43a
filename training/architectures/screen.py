"""
Which entries of a float32 product may be large, told by a product in bfloat16, and these entries alone in float32.

Processors with units for bfloat16 multiply it several times as fast. Its error is bounded: with rounded rows x̂, ŵ,

    x·w − x̂·ŵ = x̂·(w − ŵ) + (x − x̂)·w ≤ (|x| + |x − x̂|) |w − ŵ| + |x − x̂| |w|        (Cauchy-Schwarz)

The norms, rounded up, are two more columns of the factors, as is the bias, so that one product gives an upper bound of
each entry. What lies above a threshold is among the entries whose bound does; a few more than that must be computed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from .matrix import products_at

_LEAST = 384  # columns, and latents; of smaller factors the product in float32 is as fast
_ALIGNED = 32  # products with a multiple of so many columns are the fastest
_FEW = 24  # one in so many entries may be computed alone: each costs some twenty times its part of the product
_MORE = 4  # columns of the bound: two of norms, two of the bias


@cache
def has_bfloat16_units() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32. Before `torch` could tell, no."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def worthwhile(centred: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether `centred @ weight.T`, which is wanted in `dtype`, should be screened."""
    if centred.device.type != "cpu" or {dtype, centred.dtype, weight.dtype} != {torch.float32}:
        return False
    return min(weight.shape) >= _LEAST and has_bfloat16_units()


def true_entries(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of the true entries of `mask (rows, columns)`. Few are true, so eight are tested at a time."""
    flat = mask.flatten()
    whole = len(flat) // 8 * 8
    words = flat[:whole].view(torch.int64).nonzero()[:, 0]
    word, byte = flat[:whole].view(-1, 8)[words].nonzero(as_tuple=True)
    at = torch.cat([words[word] * 8 + byte, flat[whole:].nonzero()[:, 0] + whole])
    return at // mask.shape[1], at % mask.shape[1]


def _up(norms: torch.Tensor) -> torch.Tensor:
    """In bfloat16, no smaller."""
    return (norms * (1 + 2**-7)).bfloat16()


def _rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows in bfloat16, with room for more columns, and the norms of the rows and of their errors."""
    count, columns = rows.shape
    rounded = rows.new_empty(count, -(-(columns + _MORE) // _ALIGNED) * _ALIGNED, dtype=torch.bfloat16)
    rounded[:, columns:] = 0
    norms = rows.new_empty(2, count)
    size = max(1, 2**17 // columns)  # small enough for the processor's cache
    for start in range(0, count, size):
        part, into = rows[start : start + size], rounded[start : start + size, :columns]
        into.copy_(part)
        torch.linalg.vector_norm(part, dim=1, out=norms[0, start : start + size])
        torch.linalg.vector_norm(into.float().sub_(part), dim=1, out=norms[1, start : start + size])
    return rounded, *norms


class Screen:
    """
    Upper bounds of `centred (rows, d) @ weight (latents, d).T + bias (latents,)`, and the entries found by them.

    Its methods return None where more entries would have to be computed than the whole product is worth.
    """

    def __init__(self, centred: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, rows_at_once: int):
        self.factors, self.bias, self.step = (centred, weight), bias, rows_at_once
        columns = centred.shape[1]
        self.rows, norm, error = _rounded(centred)
        self.latents, length, lost = _rounded(weight)
        error = error + norm * (4 * columns * 2**-24)  # and what sums in float32 lose
        norm = norm + error
        coarse = bias.bfloat16()
        fine = _up(torch.where(bias > -1e30, (bias - coarse).abs(), 0.0))  # below that nothing is active
        by_row = [_up(norm), _up(error), torch.ones_like(error), torch.ones_like(error)]
        by_latent = [_up(lost), _up(length), coarse, fine]
        self.rows[:, columns : columns + _MORE] = torch.stack(by_row, 1)
        self.latents[:, columns : columns + _MORE] = torch.stack(by_latent, 1)
        # how much higher than its entry a bound may be, but for the last rounding, and how much higher it mostly is
        self.slack = 2 * (_up(norm) * _up(lost).max() + _up(error) * _up(length).max() + fine.max()).float()
        self.excess = norm * lost.mean() + error * length.mean()

    def above(self, threshold: torch.Tensor | float | Callable[[torch.Tensor], float]):
        """
        Rows, latents and values of all entries above a threshold: one for all, one for each latent, or a function of
        some rows of the product, as exact as bfloat16 is.
        """
        found = []
        for start in range(0, len(self.rows), self.step):
            bounds = F.linear(self.rows[start : start + self.step], self.latents)
            if callable(threshold):
                some = slice(None, None, len(bounds) // 16 or 1)
                threshold = threshold(bounds[some] - self.excess[start : start + self.step][some, None])
            candidates = bounds >= torch.as_tensor(threshold, dtype=torch.bfloat16)  # rounding keeps the order
            if self._too_many(candidates):
                return None
            rows, latents = true_entries(candidates)
            found.append((rows + start, latents))
            del bounds, candidates  # before the next are made
        rows, latents = map(torch.cat, zip(*found, strict=True))
        values = self._values(0, len(self.rows), rows, latents)
        above = values > torch.as_tensor(threshold).expand(len(self.latents))[latents]
        return rows[above], latents[above], values[above]

    def largest(self, k: int):
        """The `k` largest entries of each row and their latents, `(rows, k)` each."""
        found = []
        for start in range(0, len(self.rows), self.step):
            bounds = F.linear(self.rows[start : start + self.step], self.latents)
            last = bounds.topk(k, dim=1, sorted=False).values.amin(1).float()
            # the k largest entries are no smaller than the k largest bounds, less what these may be too high by
            least = last - self.slack[start : start + self.step] - 2**-6 * last.abs()
            candidates = bounds >= least.bfloat16()[:, None]
            if self._too_many(candidates):
                return None
            rows, latents = true_entries(candidates)
            del bounds, candidates  # before the next are made
            counts = torch.bincount(rows, minlength=len(least))
            place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
            values = self.slack.new_full((len(least), int(counts.max())), -torch.inf)
            values[rows, place] = self._values(start, len(least), rows, latents)
            of_place = torch.zeros(values.shape, dtype=torch.int64)
            of_place[rows, place] = latents
            values, place = values.topk(k, dim=1)
            found.append((values, of_place.gather(1, place)))
        values, latents = map(torch.cat, zip(*found, strict=True))
        return values, latents

    def _too_many(self, candidates: torch.Tensor) -> bool:
        return bool(torch.count_nonzero(candidates) > candidates.numel() / _FEW)

    def _values(self, start: int, count: int, rows: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The entries in float32 at `rows`, which are sorted and counted from row `start`, and `latents`."""
        centred, weight = self.factors
        return products_at(rows, latents, centred[start : start + count], weight) + self.bias[latents]
