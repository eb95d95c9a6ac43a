"""Figures: what steering does, how features move through denoising time, and where they are active."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ..dictionary import Dictionary
from ..models import FeatureTimes, SparseDictionary
from .find import Feature
from .record import Recording


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


def plot_strip(table) -> Figure:
    """
    What verified features do, one row each below the plain pictures.

    Args:
        table (`FeatureTable`): as `find_features(..., verify=True)` returns it.

    Raises:
        `ValueError`: nothing in it is verified.
    """
    if not table.plain:
        raise ValueError("Nothing in this table is verified: call find_features with verify=True.")
    shown = [feature for feature in table if feature.pictures]
    several = len({feature.site for feature in shown}) > 1
    rows = [("unsteered", table.plain)]
    for feature in shown:
        lines = [feature.site] * several + [f"latent {feature.index}", *feature.labels[:2]]
        lines += [f"{name} {feature.verified[name]:.2f}" for name in ("effect", "gain") if name in feature.verified]
        rows.append(("\n".join(lines), feature.pictures))
    width = min(8, len(table.plain))
    figure = Figure(figsize=(1.15 * width + 1.4, 1.15 * len(rows) + 0.1), layout="constrained")
    axes = figure.subplots(len(rows), width, squeeze=False)
    for line, (name, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center", labelpad=6)
    return figure


def plot_feature_trajectories(dictionary: Dictionary, features: Sequence) -> Figure:
    """
    Features along denoising time: how long each one's direction is, with its onset (where it has half of its greatest
    length) and its peak marked, how much it turns from one anchor to the next, and how much of the last is there.

    Args:
        features (`Sequence`): labels, indices, `(site, index)` or found features.
    """
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    norms, neighbours, last = figure.subplots(1, 3)
    for feature in features:
        sae, trajectory = _site(dictionary, feature), dictionary.trajectory(_key(feature))
        anchors, spread = sae.config.anchors, sae.spread.cpu() * math.sqrt(sae.config.in_channels)
        times = FeatureTimes.of((trajectory.norm(dim=1) / spread)[None])
        length, peak, onset = times.length[0], int(times.peak), int(times.onset)
        (line,) = norms.plot(anchors, length, marker=".", label=_name(feature))
        norms.plot(anchors[onset], length[onset], marker=">", markersize=8, color=line.get_color())
        norms.plot(anchors[peak], length[peak], marker="^", markersize=8, color=line.get_color())
        turns = torch.cosine_similarity(trajectory[1:], trajectory[:-1], dim=1)
        middles = [(a + b) / 2 for a, b in zip(anchors, anchors[1:], strict=False)]
        neighbours.plot(middles, turns, marker=".")
        last.plot(anchors, torch.cosine_similarity(trajectory, trajectory[-1:], dim=1), marker=".")
    norms.set(title="length at strength 1, of the activation's spread\n(▸ onset, ▴ peak)", ylim=(0, None))
    neighbours.set(title="cosine of neighbouring anchors")
    last.set(title="cosine to the direction at the last anchor")
    for axis in (norms, neighbours, last):
        axis.set_xlabel("timestep (noise → image)")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
        axis.title.set_fontsize(9)
    norms.legend(fontsize=8)
    return figure


def _site(dictionary: Dictionary, feature) -> SparseDictionary:
    return dictionary.sites[dictionary.features(_key(feature))[0][0]["site"]]


def _bare(axes) -> None:
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)


def _overlay(axis, image, activation: torch.Tensor, top: float) -> AxesImage:
    """An activation map `(height, width)` over a picture; brightest at `top`."""
    whole = {"extent": (0, image.width, 0, image.height), "interpolation": "nearest"}
    axis.imshow(image, alpha=0.35, **whole)
    return axis.imshow(activation, vmin=0, vmax=top, cmap="magma", alpha=0.75, **whole)


def _name(feature) -> str:
    """What a label, an index, a `(site, index)` or a found feature is called in a figure."""
    if isinstance(feature, Feature):
        return ", ".join([*feature.labels, str(feature.index)])
    return str(feature[1] if isinstance(feature, tuple) else feature)


def _key(feature):
    return (feature.site, feature.index) if isinstance(feature, Feature) else feature


def plot_heat_maps(recording: Recording, features: Sequence, image: int = 0, columns: int = 8) -> Figure:
    """
    Where and when features are active: one row a feature over denoising time, beside the finished picture and the
    colours of its activation, in units of its typical full one. A feature that is nowhere active says so.

    Args:
        features (`Sequence`): labels, indices, `(site, index)` or found features, all at one site.
        image (`int`): which picture of the recording.
    """
    activations, timesteps = recording.maps([_key(f) for f in features])[image], recording.timesteps
    columns = min(columns, len(timesteps))
    steps = [round(i * (len(timesteps) - 1) / max(columns - 1, 1)) for i in range(columns)]
    figure = Figure(figsize=(1.1 * (columns + 1) + 2, 1.2 * len(features) + 0.5), layout="constrained")
    axes = figure.subplots(len(features), columns + 1, squeeze=False)
    for y, feature in enumerate(features):
        top = activations[y].max().item()
        for x, step in enumerate(steps):
            shown = _overlay(axes[y, x], recording.images[image], activations[y, step], top or 1.0)
            if y == 0:
                axes[y, x].set_title(f"t = {timesteps[step]:g}", fontsize=8)
        axes[y, -1].imshow(recording.images[image], interpolation="nearest")
        name = _name(feature) if top else f"{_name(feature)}\nnowhere active"
        axes[y, 0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
        if top:
            bar = figure.colorbar(
                ScalarMappable(shown.norm, shown.cmap), ax=axes[y, -1], ticks=[0, top], format="%.2g"
            )
            bar.ax.tick_params(labelsize=7)
    axes[0, -1].set_title("picture", fontsize=8)
    _bare(axes.flat)
    return figure


def plot_presence(recording: Recording, features: Sequence, image: int = 0) -> Figure:
    """How present features are in a picture over denoising time: mean activation over its tokens."""
    present = recording.maps([_key(f) for f in features])[image].mean((2, 3))
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    for feature, curve in zip(features, present, strict=True):
        axis.plot(recording.timesteps, curve, marker=".", label=_name(feature))
    axis.set(xlabel="timestep (noise → image)", ylabel="presence (of a typical full activation)", ylim=(0, None))
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def plot_crops(recordings: Sequence[Recording], feature, count: int = 12, size: float = 0.5) -> Figure:
    """
    Where a feature is most active in many pictures: the crops around its strongest tokens at the last step.

    Args:
        recordings (`Sequence`): whose pictures are looked through; one crop of a picture at most.
        size (`float`): of a crop, relative to the picture.
    """
    found = []
    for recording in recordings:
        for image, last in zip(recording.images, recording.maps([_key(feature)])[:, 0, -1], strict=True):
            y, x = divmod(int(last.argmax()), last.shape[1])
            found.append((last.max().item(), image, (x + 0.5) / last.shape[1], (y + 0.5) / last.shape[0]))
    found = sorted((f for f in found if f[0] > 0), key=lambda f: -f[0])[:count]
    if not found:
        raise ValueError(f"{_name(feature)!r} is active in none of these pictures.")
    columns = min(6, len(found))
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(1.3 * columns, 1.45 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(f"where {_name(feature)} is most active", fontsize=10)
    for axis, (strength, image, x, y) in zip(axes.flat, found, strict=False):
        wide, high = size * image.width, size * image.height
        left, top = (min(max(c * full - part / 2, 0), full - part) for c, full, part in
                     ((x, image.width, wide), (y, image.height, high)))  # fmt: skip
        axis.imshow(
            image.crop((round(left), round(top), round(left + wide), round(top + high))), interpolation="nearest"
        )
        axis.set_title(f"{strength:.2f}", fontsize=8)
    _bare(axes.flat)
    return figure


def plot_activations(recordings: Sequence[Recording], feature, bins: int = 40) -> Figure:
    """Histogram of a feature's activation over all tokens on which it is active, at the last step."""
    values = torch.cat([r.maps([_key(feature)])[:, 0, -1].flatten() for r in recordings])
    active = values[values > 0]
    figure = Figure(figsize=(4.5, 2.8), layout="constrained")
    axis = figure.subplots()
    axis.hist(active.numpy(), bins=bins, color="#4c72b0")
    axis.axvline(1, color="black", linewidth=1, linestyle=":")
    axis.set(xlabel="activation (1: the typical full one)", ylabel="tokens")
    axis.set_title(
        f"{_name(feature)}: active on {len(active) / len(values):.1%} of {len(values):,} tokens", fontsize=9
    )
    return figure


def plot_similarity(dictionary: Dictionary, features: Sequence) -> Figure:
    """Cosines between the whole trajectories of features, each its first site's latents together."""
    paths = []
    for feature in features:
        scale = _site(dictionary, feature).spread.cpu()
        paths.append((dictionary.trajectory(_key(feature)) / scale[:, None]).flatten())
    paths = torch.nn.functional.normalize(torch.stack(paths), dim=1)
    figure = Figure(figsize=(0.32 * len(paths) + 2.4, 0.32 * len(paths) + 1.8), layout="constrained")
    axis = figure.subplots()
    shown = axis.imshow(paths @ paths.T, vmin=-1, vmax=1, cmap="RdBu_r")
    names = [_name(feature) for feature in features]
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(shown, ax=axis, shrink=0.7, label="cosine of trajectories")
    return figure
