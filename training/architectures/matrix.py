"""A matrix with a row for each latent, whose gradient is made a few latents at a time, never as a whole.

The gradient is a sum of outer products: an active latent adds a multiple of a vector to its own row. The latents of a
row of the batch share the vector, so these terms are small, where their sum is as large as the matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

_PIECE = 2**18  # entries of a gradient that fit into a processor's cache, beside the weights and their moments
_STRIP = 128  # columns of a table that do


def sum_by(groups: torch.Tensor, count: int, members: torch.Tensor, weights: torch.Tensor, table: torch.Tensor):
    """`out[g] = Σ weights · table[members]` over the entries of each of `count` groups; `groups` is sorted."""
    starts = torch.searchsorted(groups, torch.arange(count, device=groups.device, dtype=groups.dtype))
    return F.embedding_bag(members, table, starts, mode="sum", per_sample_weights=weights)


def by_latent(latents: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order that sorts the entries of a code by latent, and where those of each start, `(count + 1,)`."""
    latents, order = torch.sort(latents.int(), stable=True)
    return order, torch.searchsorted(latents, torch.arange(count + 1, device=latents.device, dtype=latents.dtype))


@torch.no_grad()
def products_at(rows: torch.Tensor, latents: torch.Tensor, table: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`(table @ weight.T)[rows, latents]`, these entries alone; `rows` is sorted."""
    if table.device.type != "cpu":  # as the gradient of a sum, which is one kernel
        with torch.enable_grad():
            factors = torch.ones_like(rows, dtype=table.dtype).requires_grad_()
            return torch.autograd.grad(sum_by(rows, len(table), latents, factors, weight), factors, table)[0]
    # in the order of latents, so that weights, which fill no cache, are read but once
    order, starts = by_latent(latents, len(weight))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        zeros, size = table.new_zeros(len(rows)), (len(weight), len(table))
        at = torch.sparse_csr_tensor(starts, rows[order], zeros, size, check_invariants=False)
        found = torch.sparse.sampled_addmm(at, weight, table.T, beta=0.0).values()
    return torch.empty_like(found).scatter_(0, order, found)


class Gradient(NamedTuple):
    """
    The gradient of a matrix `(latents, d)`, as terms that are sorted by latent.

    weight (`torch.Tensor`): of the matrix.
    blocks (`torch.Tensor`, *optional*): the anchors that each latent is confined to, see `Matrix`.
    starts (`torch.Tensor`): `(latents + 1,)`, where the terms of each latent start.
    members, values (`torch.Tensor`): `(terms,)`: row `members` of the table, times `values`.
    table (`torch.Tensor`): `(rows, d)`.
    along (`torch.Tensor`, *optional*): `(latents,)`, the product of each latent's gradient and its weight, which has
        length 1. If given, the gradient is without that part of it, so that weights keep their length.
    """

    weight: torch.Tensor
    blocks: torch.Tensor | None
    starts: torch.Tensor
    members: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor
    along: torch.Tensor | None

    def square(self) -> torch.Tensor:
        """The sum of its squares. A few columns are made at a time, so that those of the table stay in the cache."""
        columns, found = self.table.shape[1], []
        size = _STRIP if self.table.is_cpu else columns
        for start in range(0, columns, size):
            table, starts = self.table[:, start : start + size].contiguous(), self.starts[:-1]
            strip = F.embedding_bag(self.members, table, starts, mode="sum", per_sample_weights=self.values)
            if self.blocks is not None:
                at = torch.arange(start, start + strip.shape[1], device=strip.device)
                strip.mul_(self.blocks[:, at * self.blocks.shape[1] // columns])
            found.append(torch.linalg.vector_norm(strip))
        square = torch.stack(found).square().sum()
        return square if self.along is None else (square - self.along.square().sum()).clamp(min=0)

    def pieces(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """
        Some latents after the other, as a slice, and their gradient `(latents, d)`. On a CPU they are few. Elsewhere,
        where the host would have to wait to learn which terms are theirs, they are all.
        """
        size, edges = len(self.weight), [0, len(self.members)]
        if self.table.is_cpu:
            size = max(1, _PIECE // self.table.shape[1])
            edges = [*self.starts[:-1:size].tolist(), len(self.members)]
        for start, (first, last) in zip(range(0, len(self.weight), size), pairwise(edges), strict=True):
            own = slice(start, min(start + size, len(self.weight)))
            piece = F.embedding_bag(
                self.members[first:last], self.table, self.starts[own] - first, mode="sum",
                per_sample_weights=self.values[first:last],
            )  # fmt: skip
            if self.blocks is not None:
                piece.unflatten(1, (self.blocks.shape[1], -1)).mul_(self.blocks[own, :, None])
            if self.along is not None:
                piece.addcmul_(self.weight[own], self.along[own, None], value=-1)
            yield own, piece


class Matrix:
    """
    Weights that autograd makes no gradient of, and the terms that it has in their place.

    Args:
        parameter (`torch.Tensor`): `(latents, *)`.
        blocks (`torch.Tensor`, *optional*): `(latents, anchors)`, 1 where a latent may have weights, 0 elsewhere.
    """

    def __init__(self, parameter: torch.Tensor, blocks: torch.Tensor | None = None):
        self.parameter, self.blocks, self.latents, self.terms = parameter, blocks, None, []

    @property
    def weight(self) -> torch.Tensor:
        """`(latents, d)`, for as many numbers as a latent has."""
        return self.parameter.detach().flatten(1)

    def part(self, latents: torch.Tensor | None = None, columns: int | None = None) -> Matrix:
        """Some of the latents, by their indices, or the first columns. Terms that are added to it are the whole's."""
        part = Matrix(self.weight[:, :columns] if latents is None else self.weight[latents, :columns])
        part.latents, part.terms = latents, self.terms
        return part

    def add(
        self, latents: torch.Tensor, members: torch.Tensor, values: torch.Tensor, table: torch.Tensor,
        products: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """
        Add `values · table[members]` to the gradient of the rows `latents`.

        Args:
            latents, members, values (`torch.Tensor`): `(terms,)`.
            table (`torch.Tensor`): `(rows, columns)`.
            products (`torch.Tensor`, *optional*): `(terms,)`, of `table[members]` and the weight of `latents`; either
                all terms of a matrix have them, or none.
        """
        whole = latents if self.latents is None else self.latents[latents]
        self.terms.append((whole, members, values, table.detach(), products))

    def gradient(self) -> Gradient:
        """The sum of all terms, which are forgotten."""
        count, width = self.weight.shape
        latents, members, values, tables, products = zip(*self.terms, strict=True)
        self.terms.clear()
        starts = accumulate(map(len, tables[:-1]), initial=0)
        members = torch.cat([own + start for own, start in zip(members, starts, strict=True)])
        tables = [F.pad(own, (0, width - own.shape[1])) if own.shape[1] < width else own for own in tables]
        latents, values, along = torch.cat(latents), torch.cat(values), None
        if products[0] is not None:
            along = values.new_zeros(count).index_add_(0, latents, values * torch.cat(products))
        order, starts = by_latent(latents, count)
        return Gradient(self.weight, self.blocks, starts, members[order], values[order], torch.cat(tables), along)
