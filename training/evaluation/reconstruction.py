"""How well a dictionary reconstructs held-out trajectories, how sparse its codes are, and when its features act."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffusers_rtsae import RTSAE, SparseDictionary

from ..kinds.rtsae import prefix_code


class Unexplained:
    """Fraction of variance unexplained, from streamed sums: per anchor, and over all anchors (ratio of sums)."""

    def __init__(self):
        self.count, self.error, self.total, self.sum = 0, 0.0, 0.0, 0.0

    def add(self, reconstruction: torch.Tensor, target: torch.Tensor) -> None:
        """Add tokens; both are `(tokens, G, d)`."""
        self.count += len(target)
        self.error += (reconstruction - target).double().square().sum((0, 2))
        self.total += target.double().square().sum((0, 2))
        self.sum += target.double().sum(0)

    def result(self) -> tuple[list[float], float]:
        """The fraction at each anchor, and over all of them."""
        variance = self.total - self.sum.square().sum(1) / self.count
        return [round(v, 4) for v in (self.error / variance).tolist()], round(
            (self.error.sum() / variance.sum()).item(), 4
        )


@torch.no_grad()
def evaluate(sae: SparseDictionary, trajectories: torch.Tensor, k: int) -> dict:
    """
    Reconstruction, sparsity and causality of a dictionary.

    Args:
        trajectories (`torch.Tensor`): `(tokens, G, d)`, not trained on.
        k (`int`): number of latents that BatchTopK keeps, for comparison with the threshold.

    Returns:
        `dict`:

        - FVU of the activation, per anchor and over all anchors, each divided by its spread. `online` rolls the
          reconstruction out from the first anchor; `teacher_forced` predicts each anchor from the true activation
          before it. Kinds that predict nothing have the same value for both.
        - L0 of a trajectory, or of a step for kinds with a code for each step.
        - the share of latents that never fired when their statistics were measured (`dead`).
        - the cosine of the online reconstruction, over all and per anchor.
        - of an RTSAE also the FVU of the residuals, L0 with BatchTopK, and for each prefix the cosine between its code
          and the whole code, and the share of the whole code's active latents that are active in it (`recall`).
    """
    anchors, spread, is_whole = len(sae.config.anchors), sae.spread[:, None], isinstance(sae, RTSAE)
    unexplained = {name: Unexplained() for name in ("residual", "online", "teacher_forced")}
    device = sae.encoder.device
    sums, topk_l0 = torch.zeros(3, anchors, device=device), 0.0
    cosine, cosines, length = 0.0, torch.zeros(anchors, device=device), max(256, 2**23 // sae.config.num_latents)
    for part in trajectories.split(length):
        part = part.to(device, torch.float32)
        codes = [sae.encode(part[:, : g + 1]) for g in range(anchors)]
        online, forced = sae.reconstruct(part), sae.reconstruct(part, teacher_forced=True)
        unexplained["online"].add(online / spread, part / spread)
        unexplained["teacher_forced"].add(forced / spread, part / spread)
        cosine += torch.cosine_similarity((online / spread).flatten(1), (part / spread).flatten(1)).sum().item()
        cosines += torch.cosine_similarity(online, part, dim=2).sum(0)
        if is_whole:
            residuals = sae.dynamics.residuals(part)
            unexplained["residual"].add(sae.decode_residuals(codes[-1]), residuals)
            topk_l0 += (prefix_code(sae, residuals, k).values > 0).sum().item()
        for g, code in enumerate(codes):
            both = ((code > 0) & (codes[-1] > 0)).sum()
            sums[:, g] += torch.stack([torch.cosine_similarity(code, codes[-1]).sum(), both, (code > 0).sum()])
    count = len(trajectories)
    agreement, shared, l0 = sums / count
    result = {"tokens": count}
    for name, of in unexplained.items():
        if of.count:
            result[f"fvu_{name}_per_anchor"], result[f"fvu_{name}"] = of.result()
    result |= {
        "cosine_online": round(cosine / count, 4),
        "cosine_online_per_anchor": [round(v, 4) for v in (cosines / count).tolist()],
        "l0_threshold": round((l0[-1] if is_whole else l0.mean()).item(), 2),
        "dead": round((sae.density == 0).float().mean().item(), 4),
    }
    if not is_whole:
        return result | {"l0_per_anchor": [round(v, 2) for v in l0.tolist()]}
    return result | {
        "l0_batch_topk": round(topk_l0 / count, 2),
        "prefix_cosine": [round(v, 4) for v in agreement.tolist()],
        "prefix_recall": [round(v, 4) for v in (shared / l0[-1]).tolist()],
        "prefix_l0": [round(v, 2) for v in l0.tolist()],
    }


@torch.no_grad()
def timing(sae: SparseDictionary) -> dict:
    """
    When features act: histograms over anchors of the peak, onset and lifetime of the latents that are not dead (see
    `SparseDictionary.feature_times`). The first number of `lifetime` counts latents that last one anchor.
    """
    times, anchors = sae.feature_times(sae.density > 0), len(sae.config.anchors)
    indices = {"peak": times.peak, "onset": times.onset, "lifetime": times.lifetime - 1}
    return {name: torch.bincount(values, minlength=anchors).tolist() for name, values in indices.items()}


@torch.no_grad()
def stability(saes: Sequence[SparseDictionary]) -> float:
    """
    How well the features of one dictionary recur in another: the largest cosine of each feature's trajectory with
    those of the other dictionary, weighed by how often the feature is active; the mean over ordered pairs.
    """
    paths = []
    for sae in saes:
        path = (sae.feature_trajectories() / sae.spread[:, None]).flatten(1)
        paths.append(torch.nn.functional.normalize(path, dim=1))
    similarities = []
    for i, a in enumerate(paths):
        weight = saes[i].density / saes[i].density.sum()
        similarities += [(weight * (a @ b.T).amax(1)).sum().item() for j, b in enumerate(paths) if j != i]
    return round(sum(similarities) / len(similarities), 4)
