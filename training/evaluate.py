"""How well a dictionary describes held-out trajectories."""

from __future__ import annotations

import torch

from diffusers_rtsae import RTSAE
from diffusers_rtsae.models import batch_topk, jump_relu


def _unexplained(error: torch.Tensor, truth: torch.Tensor) -> tuple[list[float], float]:
    """Fraction of variance unexplained, per anchor and over all anchors (ratio of sums)."""
    errors, total = error.square().sum((0, 2)), (truth - truth.mean(0)).square().sum((0, 2))
    return [round(v, 4) for v in (errors / total).tolist()], round((errors.sum() / total.sum()).item(), 4)


@torch.no_grad()
def evaluate(rtsae: RTSAE, trajectories: torch.Tensor, k: int) -> dict:
    """
    Reconstruction, sparsity and causality of a dictionary.

    Args:
        trajectories (`torch.Tensor`): `(tokens, G, d)`, not trained on.

    Returns:
        `dict`: FVU per anchor and over all, in residual space and in activation space. In activation space anchors are
        weighed by their own variance (each divided by its scale): `online` rolls the reconstruction out from the
        first anchor, `teacher_forced` predicts each anchor from the true one before. L0 with BatchTopK and with the
        threshold, share of latents that never fired when their statistics were measured, and how well the code of each
        prefix agrees with the whole: cosine of the codes, and the share of the whole code's active latents that the
        prefix finds.
    """
    dynamics = rtsae.dynamics
    codes, residuals = [], dynamics.residuals(trajectories)
    for g in range(residuals.shape[1]):
        codes.append(jump_relu(rtsae.pre_activations(residuals[:, : g + 1]), rtsae.threshold[g]))
    whole = codes[-1]
    topk = batch_topk(rtsae.pre_activations(residuals), k)
    reconstruction = rtsae.decode_residuals(whole)
    scale = dynamics.scale[:, None]
    truth = trajectories / scale
    online = dynamics.rollout(reconstruction) / scale
    forced = dynamics.teacher_forced(reconstruction, trajectories) / scale
    result = {"tokens": len(trajectories)}
    pairs = {"residual": (reconstruction, residuals), "online": (online, truth), "teacher_forced": (forced, truth)}
    for name, (found, wanted) in pairs.items():
        result[f"fvu_{name}_per_anchor"], result[f"fvu_{name}"] = _unexplained(found - wanted, wanted)
    active = whole > 0
    return result | {
        "cosine_online": round(torch.cosine_similarity(online.flatten(1), truth.flatten(1)).mean().item(), 4),
        "l0_batch_topk": round((topk > 0).float().sum(1).mean().item(), 2),
        "l0_threshold": round(active.float().sum(1).mean().item(), 2),
        "dead": round((rtsae.density == 0).float().mean().item(), 4),
        "prefix_cosine": [round(torch.cosine_similarity(c, whole).mean().item(), 4) for c in codes],
        "prefix_recall": [round(((c > 0) & active).sum().item() / active.sum().item(), 4) for c in codes],
        "prefix_l0": [round((c > 0).float().sum(1).mean().item(), 2) for c in codes],
    }
