"""How several processes train one dictionary: each has a share of the latents, and all see every row.

The rows of a batch, the values of its codes and its reconstruction are exchanged; weights, gradients and the
optimizer's moments never are. The result is that of one process, to rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F


class Processes(NamedTuple):
    """The rank of this process, and the number of processes. All must make the same calls in the same order."""

    rank: int
    count: int

    def start(self, length: int) -> int:
        """Index of the first element of this process' share of `length` elements. The last shares may be smaller."""
        return self.rank * -(-length // self.count)

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """This process' share of a tensor along its first dimension."""
        return tensor[self.start(len(tensor)) :][: -(-len(tensor) // self.count)]

    def whole(self, share: torch.Tensor, length: int) -> torch.Tensor:
        """The tensor of `length` elements, put together from the shares of all processes."""
        if self.count == 1:
            return share
        missing = -(-length // self.count) - len(share)
        return self.gather(F.pad(share, (0, 0) * (share.ndim - 1) + (0, missing))).flatten(0, 1)[:length]

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """`(count, *shape)`: the tensors of all processes, which have the same shape."""
        if self.count == 1:
            return tensor[None]
        gathered = tensor.new_empty(self.count, *tensor.shape)
        dist.all_gather(list(gathered), tensor.contiguous())
        return gathered

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """
        The sum of the parts of all processes; `part` may be overwritten.

        The gradient passes through unchanged: every process computes the same loss, and learns its own part from it.
        """
        return part if self.count == 1 else _Sum.apply(part)

    def wait(self) -> None:
        """Wait until all processes have come here."""
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
