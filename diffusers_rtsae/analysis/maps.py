"""Fit linear maps of activations by least squares, from second moments that are summed up while pictures are drawn."""

from __future__ import annotations

import torch

from ..models import LinearMap, SparseDictionary, TokenGrid, interpolate, waves

_KEEP = 0.5  # weight of the second aim of a fit: leave the activation with the "to" prompt where it is
_TOKENS = 4096  # in one matrix product


class Moments:
    """
    Second moments over the tokens of a site, from which a linear map is fitted by least squares. The map's c inputs
    are the activation with the "from" prompt, a constant and, on a grid, the token's place. Its d outputs are the
    change to the activation with the "to" prompt.

    A step lies between two anchors and contributes to both, so of the G × G blocks of moments only those on and beside
    the diagonal are not zero. `own` holds the G blocks on the diagonal, `next` the G − 1 beside it. Each block has the
    products of inputs with inputs `(c, c)`, of inputs with changes `(c, d)` and of changes with changes `(d, d)`, in
    float64 on the CPU.

    The squares of a state are divided by the root of their mean, so that late steps, which change little, still count.
    """

    def __init__(self, sae: SparseDictionary, tokens: int, size: TokenGrid | None):
        self.spread, self.constant = sae.spread.detach().cpu(), float(sae.spread.mean())
        self.anchors, self.width = len(sae.config.anchors), sae.config.in_channels
        self._extras = torch.cat([torch.ones(tokens, 1), *(() if size is None else (waves(size),))], 1)
        self.inputs = self.width + self._extras.shape[1]
        shapes = (self.inputs, self.inputs), (self.inputs, self.width), (self.width, self.width)
        self.own, self.next = (
            [[torch.zeros(shape, dtype=torch.float64) for shape in shapes] for _ in range(count)]
            for count in (self.anchors, self.anchors - 1)
        )

    def weight(self, coordinate: float, changes: torch.Tensor) -> float:
        """The weight of rows of a step, from how far their tokens change, `(rows, N)`."""
        moved = changes.square().sum(1).mean() / interpolate(self.spread, coordinate) ** 2
        return float(moved.clamp(min=1e-6)) ** -0.5

    def add(self, coordinate: float, weight: float, present: torch.Tensor, goal: torch.Tensor) -> None:
        """
        Add one row of a step.

        Args:
            coordinate (`float`): the step's place among the anchors: 1.5 is halfway between anchors 1 and 2.
            weight (`float`): its weight.
            present, goal (`torch.Tensor`): its activation with the "from" and with the "to" prompt, `(N, d)`.
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
                for total, product in zip(block, sums, strict=True):
                    total.add_(product, alpha=weight * amount)

    def _products(self, before: torch.Tensor, after: torch.Tensor, first: int, scale: float) -> list[torch.Tensor]:
        """The three products of a block for some tokens, of which `first` is the first; computed on their device."""
        extras = self.constant / scale * self._extras[first : first + len(before)].to(before.device)
        before, after = before.float() / scale, after.float() / scale
        inputs, change = torch.cat([before, extras], 1), after - before
        return [product.cpu() for product in (inputs.T @ inputs, inputs.T @ change, change.T @ change)]

    def reversed(self) -> Reversed:
        """The moments with the prompts exchanged."""
        return Reversed(self)

    def square(self, block: list[torch.Tensor]) -> torch.Tensor:
        """Inputs with inputs of a block, including those that the map must leave alone, `(c, c)`."""
        inputs, product, change = block
        total = (1 + _KEEP**2) * inputs
        total[:, : self.width] += _KEEP**2 * product
        total[: self.width] += _KEEP**2 * product.T
        total[: self.width, : self.width] += _KEEP**2 * change
        return total

    def product(self, block: list[torch.Tensor]) -> torch.Tensor:
        """Inputs with changes of a block, `(c, d)`."""
        return block[1]


class Reversed:
    """[`Moments`] with the prompts exchanged: the "to" activation is the input, and the change has the other sign."""

    def __init__(self, moments: Moments):
        self.moments, self.own, self.next = moments, moments.own, moments.next
        self.constant, self.width, self.inputs, self.anchors = (
            moments.constant, moments.width, moments.inputs, moments.anchors,
        )  # fmt: skip

    def reversed(self) -> Moments:
        return self.moments

    def square(self, block: list[torch.Tensor]) -> torch.Tensor:
        inputs, product, change = block
        total = (1 + _KEEP**2) * inputs
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
    The ridge regression of the changes on the inputs, `(G, c, d)`. `ridge` is relative to the mean square of the
    inputs. The normal equations are block-tridiagonal, so one elimination from anchor to anchor solves them and the
    whole `(G c, G c)` matrix is never built.
    """
    squares = sum(float(moments.square(block).diagonal().sum()) for block in moments.own)
    shift = ridge * squares / (moments.anchors * moments.inputs)
    factors, solution = [], []
    for anchor, block in enumerate(moments.own):
        square = moments.square(block)
        square.diagonal().add_(shift)
        right = moments.product(block).clone()
        if anchor:
            right += moments.product(moments.next[anchor - 1])
            across = moments.square(moments.next[anchor - 1])
            carried = torch.cholesky_solve(across, factors[-1])
            square -= across.T @ carried
            right -= carried.T @ solution[-1]
        if anchor < moments.anchors - 1:
            right += moments.product(moments.next[anchor])
        factors.append(torch.linalg.cholesky(square))
        solution.append(right)
    for anchor in reversed(range(moments.anchors)):
        if anchor < moments.anchors - 1:
            solution[anchor] -= moments.square(moments.next[anchor]) @ solution[anchor + 1]
        solution[anchor] = torch.cholesky_solve(solution[anchor], factors.pop())
    return torch.stack(solution)


def low_rank(moments: Moments | Reversed, ridge: float, rank: int) -> torch.Tensor:
    """The rows of the linear map of this rank with the least error in the sum of squares that [`solve`] minimises."""
    solution = solve(moments, ridge)
    right = [moments.product(block).clone() for block in moments.own]
    for anchor, block in enumerate(moments.next):
        right[anchor] += moments.product(block)
        right[anchor + 1] += moments.product(block)
    changed = torch.linalg.eigh(sum(s.T @ r for s, r in zip(solution, right, strict=True))).eigenvectors
    directions = changed[:, -rank:].flip(1)  # of the largest changes
    readers = (solution @ directions).permute(2, 0, 1).float()
    offsets, places = (moments.constant * readers[..., at] for at in (moments.width, slice(moments.width + 1, None)))
    return LinearMap.rows(readers[..., : moments.width], offsets, directions.T.float().contiguous(), places)


def scaled(rows: torch.Tensor, factor: float) -> torch.Tensor:
    """The rows of a map with its output multiplied by `factor`."""
    linear = LinearMap(rows)
    return linear.with_directions(factor * linear.directions.paths[:, 0])
