"""How several processes train one dictionary: each has a share of the latents, and all see every row.

Weights, gradients and the optimizer's moments never travel. What does is a batch's rows, the values of its codes, and
its reconstruction, so that the result is that of one process, to rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F


class Processes(NamedTuple):
    """Which of how many processes this is. All of them must make the same calls in the same order."""

    rank: int
    count: int

    def start(self, length: int) -> int:
        """Where this process' share of so many elements begins; the last ones may have fewer than the others."""
        return self.rank * -(-length // self.count)

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """What this process has of a tensor's first dimension."""
        return tensor[self.start(len(tensor)) :][: -(-len(tensor) // self.count)]

    def whole(self, share: torch.Tensor, length: int) -> torch.Tensor:
        """The tensor of so many elements that every process has its share of."""
        if self.count == 1:
            return share
        missing = -(-length // self.count) - len(share)
        return self.gather(F.pad(share, (0, 0) * (share.ndim - 1) + (0, missing))).flatten(0, 1)[:length]

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """`(count, *shape)`: tensors of one shape, of each process."""
        if self.count == 1:
            return tensor[None]
        found = tensor.new_empty(self.count, *tensor.shape)
        dist.all_gather(list(found), tensor.contiguous())
        return found

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """
        The sum of the parts that each process has; `part` may be overwritten.

        Its gradient is passed on as it is: each process computes the same loss, to learn its own part.
        """
        return part if self.count == 1 else _Sum.apply(part)

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.count > 1:
            dist.barrier()


ALONE = Processes(0, 1)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part):
        ctx.mark_dirty(part)
        dist.all_reduce(part)
        return part

    @staticmethod
    def backward(ctx, gradient):
        return gradient
