"""
How the features of a ledger lead to one another while a picture is drawn.

Denoising is divided into *stretches*: the steps that are closest to each anchor of the dictionary. A node is a feature
in a stretch, with its share of what the word does there. An edge leads from a feature to one in the next stretch, or
to one at a later site in the same stretch. Its weight is the part of the second's activation, summed over tokens and
steps, that goes if the first is ablated in its stretch and nowhere else. The picture is drawn again for that, so the
effect passes through the frozen denoiser, guidance and the sampler as they are. Both activations are read with the
same past, that of the picture without an edit: otherwise a dictionary that reads trajectories would remember the edit
itself. Only the conditional branch of guidance is edited, as the ledger is of it.

Text is read again at each step, so a feature may come back without the one that preceded it. How much of a stretch is
carried over from the one before is told by a node for all features together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..denoiser import TimeGrid, get_denoisers, noise_schedule
from ..files import write_json
from ..pipeline import get_dictionary, resting
from .calls import CallRecorder, draw
from .explain import Entry, Ledger
from .stored import Shelf

_SMALL = 0.002  # of the whole: features that carry less in a stretch are no nodes there
_LEAST = 0.02  # of an activation: edges that change less are left out
TOGETHER = "all of these"


@dataclass
class Node:
    """
    A feature, or all features of the graph together, in a stretch of denoising.

    Args:
        name (`str`): as figures call it.
        timestep (`float`): the anchor that the steps of the stretch are closest to, in training units.
        share (`float`): of the whole that the word does to the picture's prediction.
        site (`str`, *optional*), index (`int`, *optional*): the latent; `None` for all together.
    """

    name: str
    timestep: float
    share: float
    site: str | None = None
    index: int | None = None


@dataclass
class Edge:
    """
    One node leads to another.

    Args:
        source, target (`int`): places in [`Graph.nodes`].
        weight (`float`): the part of the target's activation that goes without the source; negative if it grows.
    """

    source: int
    target: int
    weight: float


@dataclass
class Graph:
    """
    Features over denoising time, and how they lead to one another. [`plots.plot_graph`] draws it.

    Args:
        nodes (`list[Node]`): in the order of time, and in each stretch in that of sites.
        edges (`list[Edge]`): the strongest first.
    """

    nodes: list[Node]
    edges: list[Edge]

    def content(self) -> dict:
        """As JSON holds it."""
        return {"nodes": [vars(node) for node in self.nodes], "edges": [vars(edge) for edge in self.edges]}

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file."""
        write_json(Path(path), self.content())

    def __repr__(self) -> str:
        several = len({node.site for node in self.nodes} - {None}) > 1
        places = [f" of {node.site}" if several and node.site else "" for node in self.nodes]
        told = [f"{node.name}{place} at {node.timestep:g}" for node, place in zip(self.nodes, places, strict=True)]
        lines = [f"{edge.weight:+.2f}  {told[edge.source]} → {told[edge.target]}" for edge in self.edges]
        return "\n".join(lines) if lines else "no feature leads to another"


@dataclass
class _Stretch:
    """Steps that are closest to one anchor, the part of denoising that they take, and the features that act there,
    each with its share."""

    timestep: float
    steps: slice
    start: float
    end: float
    shares: dict[int, float]


def feature_graph(
    pipeline, ledger: Ledger, features: int = 8, adapter_name: str | None = None, batch_size: int = 16, **call
) -> Graph:
    """
    How the first features of a ledger lead to one another over time and from site to site.

    Args:
        pipeline (`DiffusionPipeline`), adapter_name (`str`, *optional*), call: as the ledger was made with.
        ledger (`Ledger`): as [`explain`] returns it.
        features (`int`): the most features; each is a node in every stretch in which it carries something.
        batch_size (`int`): pictures drawn at once.

    Raises:
        `ValueError`: the ledger has no feature.

    Example:
        ```py
        >>> ledger = explain(pipe, "a large red star on white", "red")
        >>> graph = feature_graph(pipe, ledger)
        >>> graph.save("red-graph.json")
        ```
    """
    if not ledger.features:
        raise ValueError(f"Expected a ledger with features, got none: no latent differs without {ledger.word!r}.")
    with Shelf() as shelf, resting(pipeline):
        again = _Again(pipeline, ledger, ledger.features[:features], adapter_name, shelf, call)
        stretches, plain = again.stretches(ledger), again.activations("plain", 1)[0]
        nodes, place = [], {}
        for number, stretch in enumerate(stretches):
            for i, share in stretch.shares.items():
                entry, place[number, i] = again.features[i], len(nodes)
                nodes.append(Node(entry.name, stretch.timestep, round(share, 5), entry.site, entry.index))
            place[number, None] = len(nodes)
            nodes.append(Node(TOGETHER, stretch.timestep, round(sum(stretch.shares.values()), 5)))
        edges = []
        for number, stretch in enumerate(stretches):
            following = [
                (other, i) for other in (number, number + 1) if other < len(stretches) for i in stretches[other].shares
            ]
            sources = [*stretch.shares, None]  # `None`: all of them
            for start in range(0, len(sources), batch_size):
                some = sources[start : start + batch_size]
                pairs = [
                    (row, target)
                    for row, i in enumerate(some)
                    for target in following
                    if target[0] > number or i is not None and again.comes_later(target[1], i)
                ]
                if not pairs:
                    continue
                edited = again.without([[*stretch.shares] if i is None else [i] for i in some], stretch)
                for row, (other, i) in pairs:
                    steps = stretches[other].steps
                    before, after = float(plain[steps, i].sum()), float(edited[row, steps, i].sum())
                    weight = 1 - after / before if before else 0.0
                    edges.append(Edge(place[number, some[row]], place[other, i], round(weight, 4)))
    strong = [edge for edge in edges if abs(edge.weight) >= _LEAST]
    return Graph(nodes, sorted(strong, key=lambda edge: -abs(edge.weight)))


class _Again:
    """The picture of a ledger, drawn again: as it is, and with features ablated in a part of denoising."""

    def __init__(
        self, pipeline, ledger: Ledger, features: Sequence[Entry], adapter_name: str | None, shelf: Shelf, call: dict
    ):
        self.pipeline, self.adapter_name, self.shelf, self._call = pipeline, adapter_name, shelf, call
        self._prompt, self._seed = ledger.prompt, ledger.seed
        sites = get_dictionary(pipeline, adapter_name).sites
        self.saes = {site: sites[site] for site in dict.fromkeys(entry.site for entry in features)}
        recorder = self._draw("plain", 1)
        self.timesteps = [one.timestep for one, _ in recorder.calls]
        self.sizes, self.guidance = recorder.sizes, recorder.call.guidance  # sites in the order in which they run
        self.features = sorted(features, key=lambda entry: [*self.sizes].index(entry.site))
        alphas = noise_schedule(pipeline.scheduler)
        self.grids = {site: TimeGrid(sae.config.anchors, alphas) for site, sae in self.saes.items()}
        self._columns = {site: [i for i, one in enumerate(self.features) if one.site == site] for site in self.saes}
        device = recorder.calls[0][1].device
        self._readers = {
            site: self.saes[site].reader([self.features[i].index for i in columns], device)
            for site, columns in self._columns.items()
        }

    def _draw(self, name: str, count: int) -> CallRecorder:
        """Draw the picture several times at once, and put the activations of all sites on the shelf."""
        kinds = {site: sae.config.activation for site, sae in self.saes.items()}
        keep = lambda step, site, tokens: self.shelf.put((name, count, site, step), tokens)  # noqa: E731
        recorder = CallRecorder(get_denoisers(self.pipeline), kinds, keep)
        draw(self.pipeline, [self._prompt] * count, [self._seed] * count, recorder, **self._call)
        return recorder

    def without(self, sets: Sequence[Sequence[int]], stretch: _Stretch) -> torch.Tensor:
        """The activations in pictures that are drawn without each set of features in a stretch."""
        strengths = {
            (self.features[i].site, self.features[i].index): [float(i in one) for one in sets]
            for i in dict.fromkeys(i for one in sets for i in one)
        }
        options = {"operation": "ablate", "apply_to": "cond", "start": stretch.start, "end": stretch.end}
        with self.pipeline.rtsae_steering(strengths, self.adapter_name, **options):
            self._draw("edited", len(sets))
        return self.activations("edited", len(sets))

    def activations(self, name: str, count: int) -> torch.Tensor:
        """The activation of each feature at each step, summed over tokens, `(pictures, steps, features)`. All are read
        with the past of the picture without an edit."""
        sums = torch.zeros(count, len(self.timesteps), len(self.features))
        for site, reader in self._readers.items():
            memory = reader.begin()
            for i, timestep in enumerate(self.timesteps):
                step = self.grids[site].step(timestep, self.sizes[site], self.guidance)
                past = self.shelf.get(("plain", 1, site, i)).repeat(count, 1, 1)
                read = reader.read(memory.copy(), self.shelf.get((name, count, site, i)), step)
                sums[:, i, self._columns[site]] = read.unflatten(0, (count, -1)).sum((1, 2)).cpu()
                reader.read(memory, past, step)
                memory.continue_with(past)
        return sums

    def stretches(self, ledger: Ledger) -> list[_Stretch]:
        """The steps that are closest to each anchor of the first site, where there are any."""
        site = next(iter(self.saes))
        nearest = [round(self.grids[site].coordinate(t)) for t in self.timesteps]
        found = []
        for number, anchor in enumerate(self.saes[site].config.anchors):
            steps = [i for i, own in enumerate(nearest) if own == number]
            if not steps:
                continue
            times = {self.timesteps[i] for i in steps}
            start, end = (1 - self.timesteps[i] / 1000 for i in (steps[0], steps[-1]))
            start, end = (min(max(value, 0.0), 1.0) for value in (start - 1e-6, end + 1e-6))
            shares = {
                i: sum(s for s, t in zip(entry.by_step, ledger.timesteps, strict=True) if t in times)
                for i, entry in enumerate(self.features)
            }
            carrying = {i: share for i, share in shares.items() if abs(share) >= _SMALL}
            if carrying:
                found.append(_Stretch(float(anchor), slice(steps[0], steps[-1] + 1), start, end, carrying))
        return found

    def comes_later(self, target: int, source: int) -> bool:
        """Whether a feature's site runs after another's."""
        order = [*self.sizes]
        return order.index(self.features[target].site) > order.index(self.features[source].site)
