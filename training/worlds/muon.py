"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum whose matrices are made orthogonal.

`torch.optim.Muon` computes in bfloat16, which processors without such arithmetic emulate at a hundredth of the speed;
this one computes in float32, all matrices of one shape at once, takes convolutions, and moves what is no matrix by
AdamW.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch


def orthogonalize(matrices: torch.Tensor, steps: int = 3) -> torch.Tensor:
    """
    Bring all singular values of `matrices` `(n, rows, columns)` near 1, by Newton and Schulz's iteration with Jordan's
    coefficients.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """
    Muon for `matrices`, AdamW for `others`.

    A matrix's update has the root mean square of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that learning rates
    and decay are of AdamW's size.

    Args:
        matrices (`Iterable[torch.Tensor]`): weights of hidden layers; all dimensions but the first count as columns.
        others (`Iterable[torch.Tensor]`): biases, norms, embeddings, and the first and last layers.
        lr (`float`): of the matrices.
        lr_others (`float`): of the others.
    """

    def __init__(
        self,
        matrices: Iterable[torch.Tensor],
        others: Iterable[torch.Tensor],
        lr: float,
        lr_others: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
    ) -> None:
        groups = [
            {"params": matrices, "lr": lr, "matrices": True},
            {"params": others, "lr": lr_others, "matrices": False},
        ]
        super().__init__(groups, {"momentum": momentum, "betas": betas, "weight_decay": weight_decay})
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]

    def set_rate(self, factor: float) -> None:
        """Let the learning rates be `factor` of what they were at the beginning."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * factor

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            (self._step_matrices if group["matrices"] else self._step_others)(params, group)

    def _step_matrices(self, params: list[torch.Tensor], group: dict) -> None:
        shapes = defaultdict(list)
        for p in params:
            shapes[p.flatten(1).shape].append(p)
        for shape, alike in shapes.items():
            updates = []
            for p in alike:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                updates.append(p.grad.lerp(momentum, group["momentum"]).flatten(1))  # Nesterov's
            scale = 0.2 * max(shape) ** 0.5
            for p, update in zip(alike, orthogonalize(torch.stack(updates)), strict=True):
                p.add_(update.reshape(p.shape), alpha=-group["lr"] * scale)

    def _step_others(self, params: list[torch.Tensor], group: dict) -> None:
        first, second = group["betas"]
        for p in params:
            state = self.state[p]
            if not state:
                state |= {"step": torch.zeros(()), "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
            state["step"] += 1
            state["mean"].lerp_(p.grad, 1 - first)
            state["square"].lerp_(p.grad.square(), 1 - second)
            size = (state["square"] / (1 - second ** state["step"].item())).sqrt_().add_(1e-8)
            p.addcdiv_(state["mean"], size, value=-group["lr"] / (1 - first ** state["step"].item()))


def split(module: torch.nn.Module, outer: tuple[str, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The parameters of `module` as `Muon` takes them; those with a part of `outer` in their name are others."""
    matrices, others = [], []
    for name, p in module.named_parameters():
        (matrices if p.ndim > 1 and not any(part in name for part in outer) else others).append(p)
    return matrices, others
