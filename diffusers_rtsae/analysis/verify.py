"""Steer features alone, to measure what that does to pictures and predictions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..denoiser import get_denoiser
from ..pipeline import own_size
from .effect import adding
from .features import Feature
from .states import States


def generators(count: int, seeds: int) -> list[torch.Generator]:
    """Generators with the same few seeds for each of `count` prompts."""
    return [torch.Generator().manual_seed(seed) for _ in range(count) for seed in range(seeds)]


class _Outputs:
    """Keeps the denoiser's outputs while a pipeline runs inside the `with` block."""

    def __init__(self, denoiser):
        self.denoiser, self.kept = denoiser, []

    def __enter__(self):
        self._hook = self.denoiser.register_forward_hook(
            lambda module, args, output: self.kept.append(
                (output[0] if isinstance(output, tuple) else output.sample).float()
            )
        )
        return self

    def __exit__(self, *error):
        self._hook.remove()


@torch.no_grad()
def verify_features(
    pipeline, features: Sequence[Feature], prompts: Sequence[str], scorer=None, strength: float = 1.0,
    adapter_name: str | None = None, seeds: int = 2, batch_size: int = 16, **call,
) -> list:  # fmt: skip
    """Steer each feature alone on `prompts`, write the results into its `verified` and `pictures`, and return the
    unsteered pictures. See [`find_features`]."""

    def generate() -> tuple[list, torch.Tensor, list[torch.Tensor]]:
        repeated, noise = [p for p in prompts for _ in range(seeds)], generators(len(prompts), seeds)
        options, images = own_size(pipeline) | call, []
        with _Outputs(get_denoiser(pipeline)) as outputs:
            for start in range(0, len(repeated), batch_size):
                part = slice(start, start + batch_size)
                images += pipeline(repeated[part], generator=noise[part], **options).images
        return images, _pixels(images), outputs.kept

    images, pixels, outputs = generate()
    before = scorer(images) if scorer is not None else None
    for feature in features:
        with pipeline.rtsae_steering({(feature.site, feature.index): strength}, adapter_name):
            steered, steered_pixels, steered_outputs = generate()
        pairs = zip(steered_outputs, outputs, strict=True)
        changes = [((new - old).norm() / old.norm()).item() for new, old in pairs]
        feature.pictures = list(steered)
        feature.verified = {
            "image_distance": round((steered_pixels - pixels).square().mean((1, 2, 3)).sqrt().mean().item(), 4),
            "prediction_change": round(sum(changes) / len(changes), 4),
        }
        if scorer is not None:
            after = scorer(steered)
            feature.verified["gain"] = round(
                sum(float(a) - float(b) for a, b in zip(after, before, strict=True)) / len(after), 4
            )
    return list(images)


def _pixels(images: list) -> torch.Tensor:
    """PIL pictures as `(images, height, width, 3)` in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images]) / 255)


@torch.no_grad()
def judge(features: Sequence[Feature], states: States, strength: float) -> None:
    """Measure the effect and harm of each feature on held-out states, and write them into its `verified`."""
    for feature in features:
        effects = states.effects(adding(feature.site, feature.index, states, strength))
        measured = {"effect": round(float(effects[states.differs].mean()), 4)}
        if not states.differs.all():
            measured["harm"] = round(float(-effects[~states.differs].mean()), 4)
        feature.verified = measured | feature.verified
