"""Sparsity functions: how pre-activations become latents."""

import torch


def batch_topk(pre_activations: torch.Tensor, k: int) -> torch.Tensor:
    """
    Keep the `k * rows` largest positive pre-activations of the batch, so that rows share a budget (BatchTopK,
    2412.06410).

    Args:
        pre_activations (`torch.Tensor`): `(rows, latents)`.
        k (`int`): latents kept per row, on average.

    Returns:
        `torch.Tensor`: `(rows, latents)`, zero where not kept.
    """
    positive = pre_activations.relu()
    kept = min(k * positive.shape[0], positive.numel())
    values, indices = positive.flatten().topk(kept, sorted=False)
    return torch.zeros_like(positive).flatten().scatter(0, indices, values).view_as(positive)


def topk(pre_activations: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the `k` largest pre-activations of each row, as far as they are positive (TopK, 2406.04093)."""
    values, indices = pre_activations.topk(k, dim=-1)
    return torch.zeros_like(pre_activations).scatter(-1, indices, values.relu())


def picture_topk(pre_activations: torch.Tensor, count: int) -> torch.Tensor:
    """Keep the `count` largest of each picture's pre-activations `(..., tokens, latents)`, as far as they are positive
    (BatchTopK, 2412.06410, within a picture)."""
    positive = pre_activations.relu().flatten(-2)
    values, indices = positive.topk(min(count, positive.shape[-1]), dim=-1)
    return torch.zeros_like(positive).scatter(-1, indices, values).view_as(pre_activations)


def groupmax(pre_activations: torch.Tensor, groups: int) -> torch.Tensor:
    """Keep the largest of each of the `groups` in which pre-activations `(..., latents)` lie in a row, as far as it is
    positive."""
    grouped = pre_activations.relu().unflatten(-1, (groups, -1))
    values, indices = grouped.max(-1, keepdim=True)
    return torch.zeros_like(grouped).scatter(-1, indices, values).flatten(-2)


def jump_relu(pre_activations: torch.Tensor, threshold: torch.Tensor | float) -> torch.Tensor:
    """Keep what exceeds `threshold`, zero the rest; a tie with the threshold is off (JumpReLU, 2407.14435)."""
    return torch.where(pre_activations > threshold, pre_activations, 0.0).relu()
