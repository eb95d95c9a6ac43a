"""Sparse autoencoding with sparse gradients: no tensor as wide as the dictionary is kept between forward and backward.

A code is a list of (row, latent, value), sorted by row. Decoding and all gradients are weighted sums over the active
latents (`embedding_bag`), where a dense formulation has matrix products over all latents. Only the encoder's forward
product is dense; it is made in pieces of a few rows, and in bfloat16 where that tells which entries matter (`screen`).
The gradients of the two large matrices are left as terms of a sum (`matrix`).

On a CPU a code has one entry for each active latent. On other devices the host would have to wait to learn their
number, so a code has as many entries as may be active. Entries of value 0 fill it up; they carry no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..common.processes import ALONE, Processes
from .matrix import Matrix, products_at, sum_by
from .screen import Screen, true_entries, worthwhile

_PIECE = 10_500_000  # entries of the encoder's product held at once


class Code(NamedTuple):
    """
    A sparse code of a batch, sorted by row.

    rows (`torch.Tensor`): `(active,)` int64, which element of the batch.
    latents (`torch.Tensor`): `(active,)` int64.
    values (`torch.Tensor`): `(active,)`.
    """

    rows: torch.Tensor
    latents: torch.Tensor
    values: torch.Tensor

    def where(self, kept: torch.Tensor) -> Code:
        """The entries where `kept (active,)` is true."""
        if self.values.device.type == "cpu":
            return Code(self.rows[kept], self.latents[kept], self.values[kept])
        return self._replace(values=self.values.masked_fill(~kept, 0.0))


class Gates(NamedTuple):
    """
    Factors of pre-activations, the same for all latents of a group.

    shares (`torch.Tensor`): the factor of each row and group, `(rows, groups)`, not negative.
    group (`torch.Tensor`): the group of each latent, `(latents,)` int64.
    """

    shares: torch.Tensor
    group: torch.Tensor

    def of(self, code: Code) -> torch.Tensor:
        """The factor of each entry of a code, `(active,)`, with gradients to the shares."""
        return self.shares[code.rows, self.group[code.latents]]


def _rows_at_once(weight: torch.Tensor) -> int:
    return max(1, _PIECE // max(1, len(weight)))


def products(
    centred: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype, gates: Gates | None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """
    `centred @ weight.T` computed in `dtype`, in pieces of a few rows.

    Yields:
        index of the first row of a piece, the piece, and what is still to be added to it: the bias. With gates, which
        multiply the bias too, that is 0; behind a closed gate there is -inf.
    """
    centred, weight, step = centred.to(dtype), weight.to(dtype), _rows_at_once(weight)
    for start in range(0, len(centred), step):
        rows = centred[start : start + step]
        if gates is None:
            yield start, F.linear(rows, weight), bias
        else:
            shares = gates.shares[start : start + step].to(dtype)[:, gates.group]
            gated = ((F.linear(rows, weight) + bias.to(dtype)) * shares).masked_fill_(shares == 0, -torch.inf)
            yield start, gated, torch.zeros_like(bias)


def _once(guess: Callable[[torch.Tensor], float]) -> Callable[[torch.Tensor], float]:
    """A function that is called once, and then returns the same: processes that guess together do so equally often."""
    guessed: list[float] = []

    def first(piece: torch.Tensor) -> float:
        if not guessed:
            guessed.append(guess(piece))
        return guessed[0]

    return first


@torch.no_grad()
def above(
    centred: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    threshold: torch.Tensor | float | Callable[[torch.Tensor], float],
    dtype: torch.dtype = torch.float32,
    gates: Gates | None = None,
) -> Code:
    """All pre-activations that exceed `threshold`: a number, one per latent, or a function of the first piece."""
    if callable(threshold):
        threshold = _once(threshold)
    if gates is None and worthwhile(centred, weight, dtype):
        if screened := Screen(centred, weight, bias, _rows_at_once(weight)).above(threshold):
            return Code(*screened)
    found = []
    for start, piece, rest in products(centred, weight, bias, dtype, gates):
        if callable(threshold):
            threshold = threshold(piece[:: len(piece) // 16 or 1] + rest)
        rows, latents = true_entries(piece > (threshold - rest).to(dtype))
        found.append((rows + start, latents, piece[rows, latents].float() + rest[latents]))
        del piece  # before the next is made
    return Code(*map(torch.cat, zip(*found, strict=True)))


@torch.no_grad()
def most_above(
    centred: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    threshold: torch.Tensor,
    count: int,
    dtype: torch.dtype = torch.float32,
    gates: Gates | None = None,
) -> Code:
    """
    The `count` pre-activations of the batch that exceed `threshold (latents,)` by most. If fewer exceed it, a CPU
    returns fewer; other devices fill up with pre-activations that do not.
    """
    if centred.device.type == "cpu":
        code = above(centred, weight, bias, threshold, dtype, gates)
        if len(code.values) <= count:
            return code
        return code.where(_largest((code.values - threshold[code.latents])[None], count, ALONE)[0])
    found = []
    for start, piece, rest in products(centred, weight, bias, dtype, gates):
        values = (piece.float() + rest).flatten()
        over = (values.view_as(piece) - threshold).flatten()
        at = over.topk(min(count, len(over)), sorted=False).indices
        found.append((over[at], at + start * len(weight), values[at]))
    over, at, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    chosen = over.topk(min(count, len(over)), sorted=False).indices
    at, order = at[chosen].sort()
    return Code(at // len(weight), at % len(weight), values[chosen][order])


def _largest(values: torch.Tensor, k: int, processes: Processes) -> torch.Tensor:
    """Which of `values (rows, n)` are among the `k` largest of their row over all processes, bool."""
    all_values = processes.gather(values).transpose(0, 1)
    kept = all_values.flatten(1).topk(min(k, all_values[0].numel()), sorted=False).indices
    largest = torch.zeros_like(all_values, dtype=torch.bool)
    return largest.flatten(1).scatter_(1, kept, True).view_as(largest)[:, processes.rank]


@torch.no_grad()
def topk(
    centred: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    k: int,
    dtype: torch.dtype = torch.float32,
    processes: Processes = ALONE,
    gates: Gates | None = None,
) -> Code:
    """The `k` largest positive pre-activations of each row (TopK, 2406.04093) over all processes."""
    screened = None
    if gates is None and worthwhile(centred, weight, dtype):
        screened = Screen(centred, weight, bias, _rows_at_once(weight)).largest(min(k, len(weight)))
    if screened is None:
        pieces = (piece + rest for _, piece, rest in products(centred, weight, bias, dtype, gates))
        found = [piece.topk(min(k, len(weight)), dim=1) for piece in pieces]
        screened = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    values, latents = screened
    rows = torch.arange(len(values), device=values.device)[:, None].expand_as(values)
    kept = values > 0
    if processes.count > 1:
        kept &= _largest(F.pad(values, (0, k - values.shape[1])), k, processes)[:, : values.shape[1]]
    return Code(rows.flatten(), latents.flatten(), values.flatten().float()).where(kept.flatten())


@torch.no_grad()
def batch_topk(
    centred: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    k: int,
    dtype: torch.dtype = torch.float32,
    processes: Processes = ALONE,
    gates: Gates | None = None,
) -> Code:
    """
    The `k * rows` largest positive pre-activations of the batch (BatchTopK, 2412.06410) over all processes, exactly.

    A threshold is guessed from a few rows, so that about twice as many exceed it; it is lowered if too few do.
    """
    count, threshold = k * len(centred), 0.0
    if centred.device.type != "cpu":
        code = most_above(centred, weight, bias, torch.zeros_like(bias), count, dtype, gates)
        kept = code.values > 0
        if processes.count > 1:
            values = F.pad(code.values, (0, count - len(code.values)))
            kept &= _largest(values[None], count, processes)[0, : len(code.values)]
        return code.where(kept)

    def guess(piece: torch.Tensor) -> float:
        nonlocal threshold
        few = piece.float()
        share = min(2 * k * len(few) // processes.count, few.numel())
        lowest = few.flatten().topk(share, sorted=False).values.min()
        threshold = max(0.0, processes.gather(lowest).min().item())
        return threshold

    def found() -> torch.Tensor:
        return processes.gather(torch.tensor(len(code.values), device=bias.device))

    code = above(centred, weight, bias, guess, dtype, gates)
    lowest = threshold / 100
    while (counts := found()).sum() < count and threshold > 0:
        threshold = threshold / 2 if threshold > lowest else 0.0
        code = above(centred, weight, bias, threshold, dtype, gates)
    if counts.sum() <= count:
        return code
    values = F.pad(code.values, (0, counts.max() - len(code.values)))
    return code.where(_largest(values[None], count, processes)[0, : len(code.values)])


class _Encode(torch.autograd.Function):
    """The values of a code of pre-activations `(x - centre) @ weight.T + bias`."""

    @staticmethod
    def forward(ctx, centred, centre, bias, matrix, rows, latents, values):
        ctx.save_for_backward(centred, rows, latents, values == 0)
        ctx.matrix = matrix
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        centred, rows, latents, filling = ctx.saved_tensors
        on_centred, weight, gradient = None, ctx.matrix.weight, gradient.masked_fill(filling, 0.0)
        ctx.matrix.add(latents, rows, gradient, centred)
        if ctx.needs_input_grad[0]:
            on_centred = sum_by(rows, len(centred), latents, gradient, weight)
        on_bias = torch.zeros(len(weight), device=weight.device).index_add_(0, latents, gradient)
        return on_centred, -(on_bias @ weight), on_bias, None, None, None, None


class _Decode(torch.autograd.Function):
    """The sum of `values * weight[latents]` of each row."""

    @staticmethod
    def forward(ctx, values, matrix, rows, latents, count):
        ctx.save_for_backward(values, rows, latents)
        ctx.matrix = matrix
        return sum_by(rows, count, latents, values, matrix.weight)

    @staticmethod
    def backward(ctx, gradient):
        values, rows, latents = ctx.saved_tensors
        gradient = gradient.contiguous()
        on_values = products_at(rows, latents, gradient, ctx.matrix.weight)
        ctx.matrix.add(latents, rows, values, gradient, on_values)
        return on_values, None, None, None, None


def encode(
    centred: torch.Tensor,
    centre: torch.Tensor,
    matrix: Matrix,
    bias: torch.Tensor,
    code: Code,
    gates: Gates | None = None,
) -> Code:
    """
    A code that carries gradients to the encoder.

    Args:
        centred (`torch.Tensor`): `(rows, d)`, the input minus the detached `centre (d,)`; gets a gradient if it
            requires one.
        matrix (`Matrix`): the weight, `(latents, d)`.
        bias (`torch.Tensor`): `(latents,)`.
        code (`Code`): chosen among the pre-activations `centred @ weight.T + bias`, times the gates.
    """
    if gates is not None:
        shares = gates.of(code)
        alone = code._replace(values=code.values / shares.detach().clamp(min=torch.finfo(shares.dtype).tiny))
        return code._replace(values=_Encode.apply(centred, centre, bias, matrix, *alone) * shares)
    return code._replace(values=_Encode.apply(centred, centre, bias, matrix, *code))


def decode(code: Code, matrix: Matrix, count: int, processes: Processes = ALONE) -> torch.Tensor:
    """
    `(count, d)`: the sum of `values * weight[latents]` of each row over all processes, with gradients to the values
    and the matrix of this process.
    """
    return processes.sum(_Decode.apply(code.values, matrix, code.rows, code.latents, count))
