"""Figures: what steering does, how features change over denoising time, and where they are active."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from ..dictionary import Dictionary
from ..models import FeatureTimes, SparseDictionary
from .explain import ERROR, Entry, Ledger
from .features import Feature
from .graph import TOGETHER, Graph, Node
from .record import Recording


def plot_strengths(rows: list[tuple[str, str, list]], strengths: list[float], title: str) -> Figure:
    """
    A contact sheet with one row per prompt and one column per strength.

    Args:
        rows (`list`): `(feature, prompt, images)`, with one image per strength.
        strengths (`list[float]`): the column titles.
        title (`str`): above the sheet.
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
    What verified features do: the unsteered pictures, and below them one row per feature.

    Args:
        table (`FeatureTable`): as `find_features(..., verify=True)` returns it.

    Raises:
        `ValueError`: no feature of the table is verified.
    """
    if not table.plain:
        raise ValueError("Expected a table of verified features, got none: call find_features with verify=True.")
    verified = [feature for feature in table if feature.pictures]
    several = len({feature.site for feature in verified}) > 1
    rows = [("unsteered", table.plain)]
    for feature in verified:
        lines = [feature.site] * several + [f"latent {feature.index}", *feature.labels[:2]]
        lines += [f"makes {feature.makes}"] if feature.makes else []
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
    How the directions of features change over denoising time, in three panels: the length, with its onset (the first
    anchor with half of the greatest length) and its peak; the cosine between neighbouring anchors; and the cosine to
    the last anchor.

    Args:
        features (`Sequence`): labels, indices, `(site, index)` or [`Feature`]s.
    """
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    norms, neighbours, last = figure.subplots(1, 3)
    for feature in features:
        sae, trajectory = _site(dictionary, feature), dictionary.trajectory(_key(feature))
        anchors, spread = sae.config.anchors, sae.spread.cpu() * math.sqrt(sae.config.in_channels)
        times = FeatureTimes.of((trajectory.norm(dim=1) / spread)[None])
        length, peak, onset = times.length[0], int(times.peak), int(times.onset)
        (line,) = norms.plot(anchors, length, marker=".", label=_name(feature, dictionary))
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
    """Draw an activation map `(height, width)` over a picture; `top` is the brightest value."""
    whole = {"extent": (0, image.width, 0, image.height), "interpolation": "nearest"}
    axis.imshow(image, alpha=0.35, **whole)
    return axis.imshow(activation, vmin=0, vmax=top, cmap="magma", alpha=0.75, **whole)


def _name(feature, dictionary: Dictionary) -> str:
    """The name in a figure of a label, an index, a `(site, index)` or a [`Feature`], with what a latent makes."""
    if isinstance(feature, str):
        return feature
    labels = feature.labels if isinstance(feature, Feature) else []
    (entry,), _ = dictionary.features(_key(feature))
    index = entry["latents"][0]
    made = dictionary.name_of(entry["site"], index)
    return ", ".join([*labels, str(index)]) + (f" ({made})" if made else "")


def _key(feature):
    return (feature.site, feature.index) if isinstance(feature, Feature) else feature


def plot_heat_maps(recording: Recording, features: Sequence, image: int = 0, columns: int = 8) -> Figure:
    """
    Heat maps of where and when features are active: one row per feature, one column per step, and the finished picture
    at the end. The colour bar is in units of the typical activation. A feature that is active nowhere is marked so.

    Args:
        recording (`Recording`): as [`record`] returns it.
        features (`Sequence`): labels, indices, `(site, index)` or [`Feature`]s, all at one site.
        image (`int`): the index of the picture in the recording.
        columns (`int`): the most steps to show.
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
        name = _name(feature, recording.dictionary) + ("" if top else "\nnowhere active")
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
    """The presence of features in a picture over denoising time: the mean activation over its tokens."""
    present = recording.maps([_key(f) for f in features])[image].mean((2, 3))
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axis = figure.subplots()
    for feature, curve in zip(features, present, strict=True):
        axis.plot(recording.timesteps, curve, marker=".", label=_name(feature, recording.dictionary))
    axis.set(xlabel="timestep (noise → image)", ylabel="presence (of a typical full activation)", ylim=(0, None))
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def plot_crops(recordings: Sequence[Recording], feature, count: int = 12, size: float = 0.5) -> Figure:
    """
    Crops of the pictures in which a feature is most active, around its strongest token at the last step.

    Args:
        recordings (`Sequence`): of the pictures; each gives one crop at most.
        feature: a label, an index, a `(site, index)` or a [`Feature`].
        count (`int`): the most crops.
        size (`float`): of a crop, relative to the picture.

    Raises:
        `ValueError`: the feature is active in none of the pictures.
    """
    crops = []
    for recording in recordings:
        for image, last in zip(recording.images, recording.maps([_key(feature)])[:, 0, -1], strict=True):
            y, x = divmod(int(last.argmax()), last.shape[1])
            crops.append((last.max().item(), image, (x + 0.5) / last.shape[1], (y + 0.5) / last.shape[0]))
    crops = sorted((crop for crop in crops if crop[0] > 0), key=lambda crop: -crop[0])[:count]
    if not crops:
        name = _name(feature, recordings[0].dictionary)
        raise ValueError(f"Expected pictures in which {name!r} is active, got none.")
    columns = min(6, len(crops))
    rows = math.ceil(len(crops) / columns)
    figure = Figure(figsize=(1.3 * columns, 1.45 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.suptitle(f"where {_name(feature, recordings[0].dictionary)} is most active", fontsize=10)
    for axis, (strength, image, x, y) in zip(axes.flat, crops, strict=False):
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
    """A histogram of a feature's activation at the last step, over the tokens on which it is active."""
    values = torch.cat([r.maps([_key(feature)])[:, 0, -1].flatten() for r in recordings])
    active = values[values > 0]
    figure = Figure(figsize=(4.5, 2.8), layout="constrained")
    axis = figure.subplots()
    axis.hist(active.numpy(), bins=bins, color="#4c72b0")
    axis.axvline(1, color="black", linewidth=1, linestyle=":")
    axis.set(xlabel="activation (1: the typical full one)", ylabel="tokens")
    name, share = _name(feature, recordings[0].dictionary), len(active) / len(values)
    axis.set_title(f"{name}: active on {share:.1%} of {len(values):,} tokens", fontsize=9)
    return figure


def plot_similarity(dictionary: Dictionary, features: Sequence) -> Figure:
    """The cosines between the trajectories of features. A label of several sites is represented by its first one."""
    paths = []
    for feature in features:
        scale = _site(dictionary, feature).spread.cpu()
        paths.append((dictionary.trajectory(_key(feature)) / scale[:, None]).flatten())
    paths = torch.nn.functional.normalize(torch.stack(paths), dim=1)
    figure = Figure(figsize=(0.32 * len(paths) + 2.4, 0.32 * len(paths) + 1.8), layout="constrained")
    axis = figure.subplots()
    shown = axis.imshow(paths @ paths.T, vmin=-1, vmax=1, cmap="RdBu_r")
    names = [_name(feature, dictionary) for feature in features]
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(shown, ax=axis, shrink=0.7, label="cosine of trajectories")
    return figure


def plot_ledger(ledger: Ledger, features: int = 8) -> Figure:
    """
    What a word does to a picture, entry by entry: the shares, and below them where in the picture each of the first
    features carries its share, and at which steps.

    Args:
        ledger (`Ledger`): as [`explain`] returns it.
        features (`int`): the most features to draw; what the others carry is summed up.
    """
    shown, others = ledger.features[:features], ledger.features[features:]
    totals = [(_wrapped(entry, ledger).replace("\n", " of "), entry.share) for entry in shown]
    summed = {"other latents": sum(entry.share for entry in others)}
    for entry in ledger.entries:
        if entry.index is None and entry.what != ERROR:
            summed[entry.what] = summed.get(entry.what, 0.0) + entry.share
    totals += [(f"{name}, all sites" if len(ledger.sites) > 1 else name, share) for name, share in summed.items()]
    columns = max(len(shown), 1)
    figure = Figure(figsize=(1.35 * max(columns, 5) + 1.2, 4.2 + 0.14 * len(totals)), layout="constrained")
    figure.suptitle(f"What “{ledger.word}” does in “{ledger.prompt}”", fontsize=10)
    above, below = figure.subfigures(2, 1, height_ratios=(1 + 0.1 * len(totals), 1.6))
    picture, bars = above.subplots(1, 2, width_ratios=(1, 2.2))
    picture.imshow(ledger.image, interpolation="nearest")
    picture.set_title(f"without: “{ledger.without}”", fontsize=7, wrap=True)
    names, shares = zip(*reversed(totals), strict=True)
    bars.barh(range(len(shares)), shares, color=[_SIGNS[share < 0] for share in shares])
    bars.set_yticks(range(len(names)), names)
    bars.axvline(0, color="black", linewidth=0.8)
    bars.set_xlabel(f"share of the whole (error {ledger.share(ERROR):+.3f})", fontsize=8)
    bars.tick_params(labelsize=7)
    _bare([picture])
    bars.grid(axis="x", alpha=0.3)
    maps, steps = below.subplots(2, columns, squeeze=False)
    top = max((abs(value) for entry in shown for row in entry.where or () for value in row), default=1.0) or 1.0
    most = max((abs(share) for entry in shown for share in entry.by_step), default=1.0) or 1.0
    for column, entry in enumerate(shown):
        if entry.where is not None:
            _overlay(maps[column], ledger.image, torch.tensor(entry.where).clamp(min=0), top)
        maps[column].set_title(f"{_wrapped(entry, ledger)}\n{entry.share:+.2f}", fontsize=7)
        steps[column].bar(range(len(entry.by_step)), entry.by_step, color=_SIGNS[entry.share < 0])
        steps[column].set(ylim=(min(0, *entry.by_step) * 1.1, 1.05 * most), xlabel="step")
        steps[column].tick_params(labelsize=6, labelleft=column == 0)
        steps[column].xaxis.set_major_locator(MaxNLocator(4, integer=True))
        steps[column].xaxis.label.set_fontsize(7)
    _bare(maps)
    return figure


_SIGNS = "#4c72b0", "#c44e52"  # for a word, and against it
_NUMBERED = 12  # edges of a graph that are told in numbers


def _wrapped(entry: Entry, ledger: Ledger) -> str:
    return entry.name if len(ledger.sites) < 2 else f"{entry.name}\n{entry.site}"


def plot_graph(graph: Graph, edges: int = 24) -> Figure:
    """
    How features lead to one another: denoising time goes to the right, one row a feature. A disc is as large as the
    share of its node, a line as wide as the part of an activation that goes without the node it comes from; red is
    less than nothing.

    Args:
        graph (`Graph`): as [`feature_graph`] returns it.
        edges (`int`): the most edges to draw, the strongest first.
    """
    key = lambda node: (node.site, node.index)  # noqa: E731
    rows = list(dict.fromkeys(key(node) for node in graph.nodes if node.name != TOGETHER)) + [(None, None)]
    times = sorted({node.timestep for node in graph.nodes}, reverse=True)
    spots = [(times.index(node.timestep), -rows.index(key(node))) for node in graph.nodes]
    names = {key(node): _named(node, graph) for node in graph.nodes}
    figure = Figure(figsize=(2.6 * len(times) + 2.6, 0.5 * len(rows) + 1.3), layout="constrained")
    axis = figure.subplots()
    for number, edge in enumerate(graph.edges[:edges]):
        (x, y), (to_x, to_y) = spots[edge.source], spots[edge.target]
        bent = "arc3,rad=0.0" if to_x > x else "arc3,rad=-0.3"
        arrow = {"arrowstyle": "-|>", "color": _SIGNS[edge.weight < 0], "connectionstyle": bent, "shrinkA": 6}
        arrow |= {"linewidth": 0.5 + 6 * min(abs(edge.weight), 1.0), "alpha": 0.6, "shrinkB": 6}
        axis.annotate("", (to_x, to_y), (x, y), arrowprops=arrow)
        if to_x > x and number < _NUMBERED:
            along = 0.4 + 0.09 * (number % 6)  # not all in one place
            spot = x + along * (to_x - x), y + along * (to_y - y)
            axis.text(*spot, f"{edge.weight:+.2f}", fontsize=7, ha="center", va="bottom")
    most = max((abs(node.share) for node in graph.nodes if node.name != TOGETHER), default=1.0) or 1.0
    for node, (x, y) in zip(graph.nodes, spots, strict=True):
        size = 20 + 300 * min(abs(node.share) / most, 1.0)
        marker = "s" if node.name == TOGETHER else "o"
        axis.scatter(x, y, s=size, marker=marker, color=_SIGNS[node.share < 0], zorder=3, edgecolors="white")
    axis.set(xlim=(-0.4, len(times) - 0.6), ylim=(-len(rows) + 0.4, 0.6), xlabel="timestep (noise → image)")
    axis.set_xticks(range(len(times)), [f"{time:g}" for time in times])
    axis.set_yticks([-i for i in range(len(rows))], [names[row] for row in rows], fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _named(node: Node, graph: Graph) -> str:
    several = len({one.site for one in graph.nodes} - {None}) > 1
    return f"{node.name}\n{node.site}" if several and node.site else node.name
