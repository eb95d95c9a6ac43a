"""Figures: what steering does, how features move through denoising time, and where they are active."""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure

from ..hub import Dictionary


def plot_strengths(rows: list[tuple[str, str, list]], strengths: list[float], title: str) -> Figure:
    """
    A contact sheet: one row a prompt, one column a strength.

    Args:
        rows (`list`): `(feature, prompt, images)`, one image a strength.
        strengths (`list[float]`): column titles.
    """
    width, height = len(strengths), len(rows)
    figure = Figure(figsize=(1.15 * width + 2.6, 1.15 * height + 1.0), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(height, width, squeeze=False)
    for y, (feature, prompt, images) in enumerate(rows):
        for x, image in enumerate(images):
            axis = axes[y, x]
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if y == 0:
                axis.set_title("unsteered" if strengths[x] == 0 else f"{strengths[x]:+g}", fontsize=9)
        words = prompt.split()
        half = math.ceil(len(words) / 2)
        lines = f"{' '.join(words[:half])}\n{' '.join(words[half:])}"
        axes[y, 0].set_ylabel(f"{feature}\n{lines}", fontsize=7, rotation=0, ha="right", va="center")
    return figure


def plot_feature_trajectories(dictionary: Dictionary, labels: list[str]) -> Figure:
    """How long each feature's direction is along denoising time, and how much it turns: its cosine to the last
    anchor."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    norms, cosines = figure.subplots(1, 2)
    for label in labels:
        entry = dictionary.features(label)[0][0]
        rtsae = dictionary.sites[entry["site"]]
        unit = rtsae.typical_activation[entry["latents"]] * torch.tensor(entry["weights"])
        trajectory = torch.einsum("n,ngd->gd", unit, rtsae.feature_trajectories(entry["latents"]).detach())
        anchors = rtsae.config.anchors
        spread = rtsae.dynamics.scale * math.sqrt(rtsae.config.in_channels)
        norms.plot(anchors, trajectory.norm(dim=1) / spread, marker="o", label=label)
        cosines.plot(anchors, torch.cosine_similarity(trajectory, trajectory[-1:], dim=1), marker="o", label=label)
    norms.set(title="length at strength 1, relative to the activation's spread", ylim=(0, None))
    cosines.set(title="cosine to the direction at the last anchor")
    for axis in (norms, cosines):
        axis.set_xlabel("timestep (noise → image)")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
        axis.title.set_fontsize(9)
    norms.legend(fontsize=8)
    return figure


def plot_heat_maps(
    image, timesteps: list[float], activations: torch.Tensor, labels: list[str], columns: int = 8
) -> Figure:
    """Where and when features are active: one row a feature over denoising time, beside the finished picture."""
    steps = [round(i * (len(timesteps) - 1) / (columns - 1)) for i in range(columns)]
    figure = Figure(figsize=(1.1 * (columns + 1) + 1, 1.2 * len(labels) + 0.5), layout="constrained")
    axes = figure.subplots(len(labels), columns + 1, squeeze=False)
    for y, label in enumerate(labels):
        top = max(activations[y].max().item(), 1e-6)
        for x, step in enumerate(steps):
            axes[y, x].imshow(image, extent=(0, 1, 0, 1), alpha=0.35, interpolation="nearest")
            axes[y, x].imshow(
                activations[y, step],
                vmin=0,
                vmax=top,
                cmap="magma",
                alpha=0.75,
                extent=(0, 1, 0, 1),
                interpolation="nearest",
            )
            if y == 0:
                axes[y, x].set_title(f"t = {timesteps[step]:g}", fontsize=8)
        axes[y, -1].imshow(image, extent=(0, 1, 0, 1), interpolation="nearest")
        axes[y, 0].set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
    axes[0, -1].set_title("picture", fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure
