"""Linear maps of activations by least squares, from second moments that are summed up as pictures are drawn."""

from __future__ import annotations

import torch

from ..models import LinearMap, SparseDictionary, TokenGrid, interpolate, waves

_THERE = 0.5  # how much it counts that a map leaves alone what is as it should be
_TOKENS = 4096  # multiplied at once


class Moments:
    """
    Sums over tokens of a site for least squares, from its activation with the "from" prompt, a constant and, on a
    grid, the place, c inputs in all, to the change to that with the "to" prompt. A step lies between two anchors, so
    that of the G² blocks of all sums only those of neighbours are not zero: `own` and `next` hold the G on the
    diagonal and the G − 1 beside it, of the inputs with themselves `(c, c)`, of the inputs with the changes `(c, d)`,
    and of the changes with themselves `(d, d)`, in float64 on the CPU.

    Each state counts by the root of the size of its change, so that late steps, in which little changes, are not lost.
    """

    def __init__(self, sae: SparseDictionary, tokens: int, size: TokenGrid | None):
        self.spread, self.one = sae.spread.detach().cpu(), float(sae.spread.mean())
        self.anchors, self.width = len(sae.config.anchors), sae.config.in_channels
        self._told = torch.cat([torch.ones(tokens, 1), *(() if size is None else (waves(size),))], 1)
        self.inputs = self.width + self._told.shape[1]
        shapes = (self.inputs, self.inputs), (self.inputs, self.width), (self.width, self.width)
        self.own, self.next = (
            [[torch.zeros(shape, dtype=torch.float64) for shape in shapes] for _ in range(count)]
            for count in (self.anchors, self.anchors - 1)
        )

    def weight(self, coordinate: float, changes: torch.Tensor) -> float:
        """What rows of a step count whose tokens change this far, `(rows, N)`."""
        moved = changes.square().sum(1).mean() / interpolate(self.spread, coordinate) ** 2
        return float(moved.clamp(min=1e-6)) ** -0.5

    def add(self, coordinate: float, weight: float, present: torch.Tensor, goal: torch.Tensor) -> None:
        """
        Add a row.

        Args:
            coordinate (`float`): of its step, in units of anchors.
            weight (`float`): what it counts.
            present, goal (`torch.Tensor`): its activation with both prompts, `(N, d)`.
        """
        low = min(int(coordinate), self.anchors - 1)
        share = coordinate - low
        blocks = [(self.own[low], (1 - share) ** 2)]
        if share:
            blocks += [(self.own[low + 1], share**2), (self.next[low], share * (1 - share))]
        scale = float(interpolate(self.spread, coordinate))
        for first in range(0, len(present), _TOKENS):
            some = slice(first, first + _TOKENS)
            sums = self._products(present[some], goal[some], first, scale)
            for block, amount in blocks:
                for total, own in zip(block, sums, strict=True):
                    total.add_(own, alpha=weight * amount)

    def _products(self, before: torch.Tensor, after: torch.Tensor, first: int, scale: float) -> list[torch.Tensor]:
        """Of some tokens, from the `first` one on, where the activation is."""
        told = self.one / scale * self._told[first : first + len(before)].to(before.device)
        before, after = before.float() / scale, after.float() / scale
        inputs, change = torch.cat([before, told], 1), after - before
        return [product.cpu() for product in (inputs.T @ inputs, inputs.T @ change, change.T @ change)]

    def reversed(self) -> Reversed:
        """With the prompts exchanged."""
        return Reversed(self)

    def square(self, block: list[torch.Tensor]) -> torch.Tensor:
        """Of the inputs of a block with themselves, those that are to be left alone too, `(c, c)`."""
        inputs, product, change = block
        total = (1 + _THERE**2) * inputs
        total[:, : self.width] += _THERE**2 * product
        total[: self.width] += _THERE**2 * product.T
        total[: self.width, : self.width] += _THERE**2 * change
        return total

    def product(self, block: list[torch.Tensor]) -> torch.Tensor:
        """Of the inputs of a block with the changes, `(c, d)`."""
        return block[1]


class Reversed:
    """The moments with the prompts exchanged: what was the goal is there, and changes the other way."""

    def __init__(self, moments: Moments):
        self.moments, self.own, self.next = moments, moments.own, moments.next
        self.one, self.width, self.inputs, self.anchors = (
            moments.one, moments.width, moments.inputs, moments.anchors,
        )  # fmt: skip

    def reversed(self) -> Moments:
        return self.moments

    def square(self, block: list[torch.Tensor]) -> torch.Tensor:
        inputs, product, change = block
        total = (1 + _THERE**2) * inputs
        total[:, : self.width] += product
        total[: self.width] += product.T
        total[: self.width, : self.width] += change
        return total

    def product(self, block: list[torch.Tensor]) -> torch.Tensor:
        total = -block[1]
        total[: self.width] -= block[2]
        return total


def solve(moments: Moments | Reversed, ridge: float) -> torch.Tensor:
    """
    What takes the inputs to the changes, with `ridge` in units of the inputs' mean square: `(G, c, d)`. The normal
    equations are block-tridiagonal, which one elimination from anchor to anchor makes use of; of (G c)² numbers there
    are never more than G blocks.
    """
    squares = sum(float(moments.square(block).diagonal().sum()) for block in moments.own)
    shift = ridge * squares / (moments.anchors * moments.inputs)
    factors, found = [], []
    for anchor, block in enumerate(moments.own):
        square = moments.square(block)
        square.diagonal().add_(shift)
        right = moments.product(block).clone()
        if anchor:
            right += moments.product(moments.next[anchor - 1])
            across = moments.square(moments.next[anchor - 1])
            carried = torch.cholesky_solve(across, factors[-1])
            square -= across.T @ carried
            right -= carried.T @ found[-1]
        if anchor < moments.anchors - 1:
            right += moments.product(moments.next[anchor])
        factors.append(torch.linalg.cholesky(square))
        found.append(right)
    for anchor in reversed(range(moments.anchors)):
        if anchor < moments.anchors - 1:
            found[anchor] -= moments.square(moments.next[anchor]) @ found[anchor + 1]
        found[anchor] = torch.cholesky_solve(found[anchor], factors.pop())
    return torch.stack(found)


def low_rank(moments: Moments | Reversed, ridge: float, rank: int) -> torch.Tensor:
    """The rows of the linear map of a rank that misses least in the squares that `solve` makes smallest."""
    solution = solve(moments, ridge)
    right = [moments.product(block).clone() for block in moments.own]
    for anchor, block in enumerate(moments.next):
        right[anchor] += moments.product(block)
        right[anchor + 1] += moments.product(block)
    changed = torch.linalg.eigh(sum(s.T @ r for s, r in zip(solution, right, strict=True))).eigenvectors
    kept = changed[:, -rank:].flip(1)  # along which it changes most
    readers = (solution @ kept).permute(2, 0, 1).float()
    offsets, places = (moments.one * readers[..., at] for at in (moments.width, slice(moments.width + 1, None)))
    return LinearMap.rows(readers[..., : moments.width], offsets, kept.T.float().contiguous(), places)


def scaled(rows: torch.Tensor, factor: float) -> torch.Tensor:
    """Rows of a map that moves by `factor` times as much."""
    own = LinearMap(rows)
    return own.with_directions(factor * own.directions.paths[:, 0])
