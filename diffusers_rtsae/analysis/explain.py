"""
Why this picture: which features carry what a word does to it, how much, when and where.

**The whole.** v(x, prompt) is the denoiser's prediction for noisy latents x. A picture is drawn with a prompt. At each
of its own noisy latents the *change* that a word makes is

    u = v(x, prompt) − v(x, prompt without the word)

What an edit takes away of it is measured along u, over all steps, relative to its length:

    share(edit) = Σ ⟨u, v(x, prompt) − v(x, prompt; edit)⟩ / Σ ⟨u, u⟩

The module `effect` measures the same pair of predictions by E = 2 share − Σ ‖v(x, prompt) − v(x, prompt; edit)‖² / Σ
‖u‖², which is less for an edit that also moves the prediction elsewhere. Shares add up and E does not. Late steps, at
which the word changes little, weigh little.

**Through the site, and past it.** With the prompt, the activation at the dictionary's site is a; without the word it
is a'. Exchange a for a' in the run with the prompt: what this takes away of the word went through the site. What is
left of the word, ⟨u, v(x, prompt; a → a') − v(x, without)⟩, goes by *other paths*. Both are measured, and together
they are the whole, 1.

**Latents, and the rest.** The latents of the dictionary are read along the steps of both runs, z and z', each with its
own past. With d_i the direction of latent i,

    a − a' = Σ_i (z_i − z'_i) d_i + r

r is the *rest*, what the dictionary misses: its reconstruction error and, for kinds that predict each step from the
one before, the part of the prediction that no latent stands for. Latents that are as active without the word have no
share, however active they are.

**Gradients.** Along the straight line from a to a', with g the mean of the gradients of ⟨u, v⟩ with respect to the
activation (integrated gradients, Sundararajan et al. 2017, 1703.01365), the share of latent i is the sum of (z_i −
z'_i) ⟨g, d_i⟩ over tokens, and that of the rest the sum of ⟨g, r⟩. They would add up to what goes through the site if
the mean were exact. It is taken at the Gauss-Legendre points of the line: one point where that is enough (it is exact
if v is quadratic), else 2, 4 or 8. What is still missing is an entry of its own, the *error*. So all entries add up to
1.

**Several sites.** A later site gets a part of the change from the earlier ones. It is charged only with what the word
adds at the site itself: its a is the activation that it has with the prompt and a' at all earlier sites. Adding these
differences at all sites at once is what turns all activations into those without the word, so the entries of all sites
add up as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..denoiser import TimeGrid, get_denoisers, noise_schedule
from ..dictionary import Dictionary
from ..files import write_json
from ..models import Memory, SparseDictionary, Step, TokenGrid
from ..pairs import left_out
from ..pipeline import get_dictionary, resting
from ..steering import Edit, fold_edits
from .calls import CallRecorder, call_with, draw
from .effect import explain_out_of_memory, frozen, gradient
from .features import labels_of
from .replay import ReplayableCall
from .states import AddingTap, check_prompts, finite

_POINTS = (1, 2, 4, 8)  # of the line between two activations, at which gradients are taken
_CLOSE = 0.01  # of a step's whole: an error that needs no more points
FEATURE, OTHERS, REST, PATHS, ERROR = "feature", "other latents", "rest", "other paths", "error"


@dataclass
class Entry:
    """
    A part of what a word does to a picture.

    Args:
        what (`str`): `"feature"`, one latent; `"other latents"`, those of a site that are not listed; `"rest"`, what
            the dictionary of a site misses; `"other paths"`, what does not pass the sites; or `"error"`, what the
            gradients leave unexplained.
        by_step (`list[float]`): the share of the whole at each of the ledger's steps.
        site (`str`, *optional*): the site.
        index (`int`, *optional*): of the latent.
        labels (`list[str]`): labels of the dictionary that are seen by the latent.
        makes (`str`, *optional*): the word it makes by its name in the dictionary.
        present (`float`, *optional*): the latent's mean activation in the picture, over steps and tokens, in units of
            its typical activation.
        where (`list[list[float]]`, *optional*): the share of each token of the picture, `height` lists of `width`
            numbers whose sum is `share`; `None` if the site's tokens have no places.
    """

    what: str
    by_step: list[float]
    site: str | None = None
    index: int | None = None
    labels: list[str] = field(default_factory=list)
    makes: str | None = None
    present: float | None = None
    where: list[list[float]] | None = None

    @property
    def share(self) -> float:
        """The part of the whole, over all steps; negative if it works against the word."""
        return math.fsum(self.by_step)

    @property
    def name(self) -> str:
        """What it is called in tables and figures."""
        if self.index is None:
            return self.what
        names = [*self.labels[:2], *([f"makes {self.makes}"] if self.makes and not self.labels else [])]
        return ", ".join([str(self.index), *names])

    def told(self) -> dict:
        """What JSON has of it."""
        return {"share": self.share} | {name: value for name, value in vars(self).items() if value not in (None, [])}


@dataclass
class Ledger:
    """
    What a word does to a picture's prediction, as entries that add up to 1. It prints as a table.

    Args:
        prompt, without (`str`): the prompt, and the prompt without the word.
        word (`str`): the word.
        seed (`int`): of the picture's noise.
        timesteps (`list[float]`): the steps that were looked at, in training units.
        weights (`list[float]`): how much of what the word does it does at each of these steps; their sum is 1.
        points (`list[int]`): how many gradients each step took.
        entries (`list[Entry]`): features first, the largest share first.
        image: the picture.
    """

    prompt: str
    without: str
    word: str
    seed: int
    timesteps: list[float]
    weights: list[float]
    points: list[int]
    entries: list[Entry]
    image: object = field(default=None, repr=False)

    @property
    def features(self) -> list[Entry]:
        """The entries of single latents, the largest share first."""
        return [entry for entry in self.entries if entry.what == FEATURE]

    @property
    def total(self) -> float:
        """The sum of all entries: 1, to rounding."""
        return math.fsum(entry.share for entry in self.entries)

    def share(self, what: str, site: str | None = None) -> float:
        """The sum of the entries of a kind, see [`Entry`], at one site or at all."""
        return math.fsum(e.share for e in self.entries if e.what == what and site in (None, e.site))

    def content(self) -> dict:
        """All but the picture, as JSON holds it."""
        told = {name: value for name, value in vars(self).items() if name not in ("entries", "image")}
        return told | {"total": self.total, "entries": [entry.told() for entry in self.entries]}

    def save(self, path: str | Path) -> None:
        """Write all but the picture to a JSON file."""
        write_json(Path(path), self.content())

    def __repr__(self) -> str:
        several = len({entry.site for entry in self.entries} - {None}) > 1
        rows = [["share", "what", *(["site"] if several else []), "present", "most at t"]]
        for entry in self.entries:
            most = max(range(len(self.timesteps)), key=lambda i: abs(entry.by_step[i]))
            rows.append(
                [
                    f"{entry.share:+.3f}", entry.name, *([entry.site or ""] if several else []),
                    "" if entry.present is None else f"{entry.present:.3f}", f"{self.timesteps[most]:g}",
                ]
            )  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"{self.total:+.3f}  in all: what {self.word!r} does to {self.prompt!r}"])


def explain(
    pipeline,
    prompt: str,
    word: str,
    without: str | None = None,
    adapter_name: str | None = None,
    seed: int = 0,
    features: int | None = 32,
    steps: int = 13,
    batch_size: int = 8,
    progress: bool = False,
    **call,
) -> Ledger:
    """
    Draw a picture, and split what a word of its prompt does to the denoiser's predictions over the features of a
    loaded dictionary, what the dictionary misses, and paths that do not pass its sites. The module says what exactly
    each entry is.

    Args:
        pipeline (`DiffusionPipeline`): with a dictionary loaded. What is set on it does not act.
        prompt (`str`): of the picture.
        word (`str`): a word or phrase of the prompt.
        without (`str`, *optional*): the prompt without the word; by default the word is left out. To say something
            else instead, such as "object" for "star", explains the difference between the two.
        adapter_name (`str`, *optional*): of the dictionary.
        seed (`int`): of the picture's noise.
        features (`int`, *optional*): the most latents to list; others are summed up in one entry for each site. `None`
            lists all.
        steps (`int`): the most steps of the generation to look at.
        batch_size (`int`): the most gradients to take at once; memory grows with it.
        progress (`bool`): show a bar.
        call: passed to the pipeline.

    Returns:
        [`Ledger`]: its entries add up to 1.

    Raises:
        `ValueError`: the prompt does not have the word; leaving it out changes nothing; the pipeline takes no prompt;
            or the denoiser gives no gradient at a site.

    Example:
        ```py
        >>> ledger = explain(pipe, "a large red star on white", "red")
        >>> [(entry.name, entry.share) for entry in ledger.features[:3]]
        >>> ledger.save("red.json")
        ```
    """
    without = left_out(prompt, word) if without is None else without
    check_prompts(pipeline, [prompt, without])
    _check_tokens(pipeline, prompt, without, word)
    with explain_out_of_memory(batch_size), resting(pipeline):
        picture = _Picture(pipeline, prompt, without, adapter_name, seed, steps, batch_size, call)
        bar = tqdm(picture.calls, desc="steps", unit="step", leave=False, disable=not progress)
        parts = [picture.step(i, one) for i, one in enumerate(bar)]
    parts = [part for part in parts if part is not None]
    whole = math.fsum(part.size for part in parts)
    if not whole:
        raise ValueError(
            f"{prompt!r} and {without!r} get the same predictions, so {word!r} explains nothing: expected a word that "
            "the model knows."
        )
    entries = _entries(picture, parts, whole, features)
    return Ledger(
        prompt, without, word, seed, [part.timestep for part in parts], [part.size / whole for part in parts],
        [part.points for part in parts], entries, picture.image,
    )  # fmt: skip


def _check_tokens(pipeline, prompt: str, without: str, word: str) -> None:
    """Raise `ValueError` if the pipeline's tokenizers see no difference."""
    tokenizers = [getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
    known = [tokenizer for tokenizer in tokenizers if tokenizer is not None]
    if prompt == without:
        raise ValueError(f"Expected a prompt without {word!r} to compare with, got the prompt itself: {prompt!r}.")
    if known and all(one(prompt).input_ids == one(without).input_ids for one in known):
        raise ValueError(
            f"The tokenizer makes the same tokens of {prompt!r} and {without!r}, so the model never sees {word!r}: "
            "expected a word that it does not drop."
        )


@dataclass
class _Run:
    """A prediction, and the activations of each site: what its dictionary reads, and what its latents move, both
    `(rows, N, d)`."""

    prediction: torch.Tensor
    read: dict[str, torch.Tensor]
    moved: dict[str, torch.Tensor]


@dataclass
class _Split:
    """
    The difference of two activations at a site, split over latents.

    Args:
        latents (`list[int]`): those that differ.
        amounts (`torch.Tensor`), vectors (`torch.Tensor`): by how much, `(rows, N, latents)`, and the directions,
            `(latents, d)`.
        whole (`torch.Tensor`): the difference, `(rows, N, d)`.
        present (`torch.Tensor`): of all latents, the mean activation over tokens, `(m,)`.
    """

    latents: list[int]
    amounts: torch.Tensor
    vectors: torch.Tensor
    whole: torch.Tensor
    present: torch.Tensor


@dataclass
class _Part:
    """
    One step of a ledger. All are sums of products with the word's change of the prediction, on the CPU.

    Args:
        size (`float`): ⟨u, u⟩.
        paths (`float`), error (`float`): what goes by other paths, and what gradients leave unexplained.
        latents (`dict[str, list[int]]`), shares (`dict[str, torch.Tensor]`): for each site the latents that differ,
            and what each carries on each token, `(latents, tokens)`.
        rest (`dict[str, torch.Tensor]`): what the rest carries on each token, `(tokens,)`.
        present (`dict[str, torch.Tensor]`): mean activation of each latent, `(m,)`.
    """

    timestep: float
    size: float
    points: int
    paths: float
    error: float
    latents: dict[str, list[int]]
    shares: dict[str, torch.Tensor]
    rest: dict[str, torch.Tensor]
    present: dict[str, torch.Tensor]


class _Reading:
    """The latents of a site along the steps of one run."""

    def __init__(self, sae: SparseDictionary, device: torch.device):
        self.reader = sae.reader(list(range(sae.config.num_latents)), device)
        self.memory: Memory = self.reader.begin()

    def read(self, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        latents = self.reader.read(self.memory, tokens, step)
        self.memory.continue_with(tokens)
        return latents


class _Picture:
    """A picture that was drawn, the calls of its denoiser, and the same with another text."""

    def __init__(
        self, pipeline, prompt: str, without: str, adapter_name: str | None, seed: int, steps: int, batch_size: int,
        call: dict,
    ):  # fmt: skip
        self.pipeline, self.batch_size = pipeline, batch_size
        self.dictionary: Dictionary = get_dictionary(pipeline, adapter_name)
        kinds = {site: sae.config.activation for site, sae in self.dictionary.sites.items()}
        self.inputs = {site: kind for site, kind in kinds.items() if kind == "input"}
        self.moved = {site: "output" if site in self.inputs else kind for site, kind in kinds.items()}
        recorder = CallRecorder(get_denoisers(pipeline), self.moved)
        self.image = draw(pipeline, [prompt], [seed], recorder, **{"output_type": "pil"} | call)[0]
        self.calls = [one for one, _ in recorder.calls]
        self.sizes, self.guidance = recorder.sizes, recorder.call.guidance
        self.text = call_with(pipeline, [without], get_denoisers(pipeline), **call)
        self.sampled = set(range(0, len(self.calls), -(-len(self.calls) // steps)))
        alphas = noise_schedule(pipeline.scheduler)
        self.grids = {site: TimeGrid(sae.config.anchors, alphas) for site, sae in self.dictionary.sites.items()}
        self._readings: dict[tuple[str, str], _Reading] = {}

    def at(self, site: str, call: ReplayableCall) -> Step:
        return self.grids[site].step(call.timestep, self.sizes.get(site), self.guidance)

    def step(self, i: int, call: ReplayableCall) -> _Part | None:
        """A step of the ledger; `None` if it is only read, as later steps need it, or not even that."""
        if i not in self.sampled and not any(sae.reads_past for sae in self.dictionary.sites.values()):
            return None
        with torch.no_grad():
            own = self.run(call)
            other = self.run(call, said=self.text)
            needs = i in self.sampled or len(self.moved) > 1  # nothing comes before the first site
            exchanged = self.run(call, become=other.moved) if needs else own
            splits = {site: self._split(site, call, own, other, exchanged) for site in self.moved}
            if i not in self.sampled:
                return None
            change = finite(own.prediction - other.prediction)
            size = float(change.square().sum())
            through = float((change * (own.prediction - exchanged.prediction)).sum())
            paths = float((change * (exchanged.prediction - other.prediction)).sum())
        slopes, points, error = self._slopes(call, change, {s: one.whole for s, one in splits.items()}, through, size)
        shares, rest = {}, {}
        for site, split in splits.items():
            along = slopes[site] @ split.vectors.T
            shares[site] = (along * split.amounts).flatten(0, 1).T.cpu()
            missed = split.whole - split.amounts @ split.vectors
            rest[site] = (slopes[site] * missed).sum(-1).flatten().cpu()
        return _Part(
            call.timestep, size, points, paths, error, {s: one.latents for s, one in splits.items()}, shares, rest,
            {site: split.present for site, split in splits.items()},
        )  # fmt: skip

    def run(
        self, call: ReplayableCall, said: ReplayableCall | None = None, become: dict[str, torch.Tensor] | None = None
    ) -> _Run:
        """
        Run the denoiser on a step's noisy latents.

        Args:
            said (`ReplayableCall`, *optional*): with the text of this call.
            become (`dict[str, torch.Tensor]`, *optional*): set what latents move to these activations. What a site
                would have had is kept.
        """
        moved, read, adding = {}, {}, AddingTap(self.moved)

        def change(site: str, tokens: torch.Tensor) -> torch.Tensor:
            moved[site] = tokens.float()
            return torch.zeros_like(moved[site]) if become is None else become[site] - moved[site]

        adding.changes = {site: partial(change, site) for site in self.moved}
        keep = lambda _, site, tokens: read.update({site: tokens.float()})  # noqa: E731
        inputs = CallRecorder({"": call.denoiser}, self.inputs, keep) if self.inputs else nullcontext()
        with inputs, adding.tap.watching({"": call.denoiser}, self.moved):
            prediction = call.replay([0], [0], said).float()
        return _Run(prediction, moved | read, moved)

    def _read(self, run: str, site: str, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        if (run, site) not in self._readings:
            self._readings[run, site] = _Reading(self.dictionary.sites[site], tokens.device)
        return self._readings[run, site].read(tokens, step)

    def _split(self, site: str, call: ReplayableCall, own: _Run, other: _Run, exchanged: _Run) -> _Split:
        """What the word adds at a site, which is the difference between its activation when the earlier sites are as
        without the word, and that without the word; split over latents."""
        sae, step = self.dictionary.sites[site], self.at(site, call)
        present = self._read("own", site, own.read[site], step).flatten(0, 1).mean(0)
        with_it = self._read("exchanged", site, exchanged.read[site], step)
        without = self._read("other", site, other.read[site], step)
        differ = ((with_it - without).flatten(0, 1) != 0).any(0).nonzero().flatten().tolist()
        whole = exchanged.moved[site] - other.moved[site]
        if not differ:
            empty = whole.new_zeros((*whole.shape[:2], 0)), whole.new_zeros((0, whole.shape[2]))
            return _Split(differ, *empty, whole, present.cpu())
        edit = Edit(latents=tuple(differ), weights=(1.0,) * len(differ), strength=1.0, operation="ablate", clip=False)
        (fold,) = fold_edits([edit], sae, differ, whole.device)
        gone, vectors = fold.change(exchanged.read[site], with_it[..., differ], step)
        gone_without, _ = fold.change(other.read[site], without[..., differ], step)
        return _Split(differ, gone_without - gone, vectors[0], whole, present.cpu())

    def _slopes(
        self, call: ReplayableCall, change: torch.Tensor, differences: dict[str, torch.Tensor], through: float,
        size: float,
    ) -> tuple[dict[str, torch.Tensor], int, float]:  # fmt: skip
        """The mean gradient of ⟨u, v⟩ along the line on which the differences are taken away, by site; the number of
        its points; and what is missing of what goes `through` the sites."""
        for points in _POINTS:
            slopes = self._mean_gradient(call, change, differences, points)
            said = math.fsum(float((slopes[site] * whole).sum()) for site, whole in differences.items())
            if abs(through - said) <= _CLOSE * size:
                break
        return slopes, points, through - said

    def _mean_gradient(
        self, call: ReplayableCall, change: torch.Tensor, differences: dict[str, torch.Tensor], points: int
    ) -> dict[str, torch.Tensor]:
        places, weights = (torch.tensor((values + shift) / 2) for values, shift in _nodes(points))
        sums = {site: torch.zeros_like(whole) for site, whole in differences.items()}
        with frozen(self.pipeline):
            for some, shares in zip(places.split(self.batch_size), weights.split(self.batch_size), strict=True):
                count, device = len(some), change.device
                leaves = {
                    site: (-some.to(whole)[:, None, None, None] * whole).flatten(0, 1).requires_grad_()
                    for site, whole in differences.items()
                }
                adding = AddingTap(self.moved)
                adding.changes = leaves
                with adding.tap.watching({"": call.denoiser}, self.moved):
                    prediction = call.replay([0] * count, [0] * count).float()
                along = (prediction * change).flatten(1).sum(1)
                for site, slope in gradient((along * shares.to(device, along.dtype)).sum(), leaves).items():
                    sums[site] += slope.unflatten(0, (count, -1)).sum(0)
        return sums


def _nodes(points: int) -> Sequence[tuple[np.ndarray, float]]:
    """The points and the weights of the Gauss-Legendre rule on [-1, 1], each with what shifts it to [0, 2]."""
    places, weights = np.polynomial.legendre.leggauss(points)
    return (places, 1.0), (weights, 0.0)


def _entries(picture: _Picture, parts: list[_Part], whole: float, count: int | None) -> list[Entry]:
    """The entries of a ledger from those of its steps."""
    found: list[Entry] = []
    others: list[Entry] = []
    for site, sae in picture.dictionary.sites.items():
        size = picture.sizes.get(site)
        rows = sorted({latent for part in parts for latent in part.latents[site]})
        place = {latent: row for row, latent in enumerate(rows)}
        tokens = parts[0].rest[site].shape[0]
        by_step, where = torch.zeros(len(rows), len(parts)), torch.zeros(len(rows), tokens)
        for i, part in enumerate(parts):
            index = torch.tensor([place[latent] for latent in part.latents[site]], dtype=torch.long)
            by_step[index, i] = part.shares[site].sum(1) / whole
            where.index_add_(0, index, part.shares[site] / whole)
        order = by_step.sum(1).abs().argsort(descending=True).tolist()
        present = torch.stack([part.present[site] for part in parts]).mean(0) / sae.typical_activation.cpu()
        for row in order[:count]:
            latent = rows[row]
            found.append(
                Entry(
                    FEATURE, by_step[row].tolist(), site, latent, labels_of(picture.dictionary, site, latent),
                    picture.dictionary.name_of(site, latent), float(present[latent]), _on_grid(where[row], size),
                )
            )  # fmt: skip
        left = order[len(order[:count]) :]
        if left:
            others.append(Entry(OTHERS, by_step[left].sum(0).tolist(), site, where=_on_grid(where[left].sum(0), size)))
        rest = torch.stack([part.rest[site] for part in parts]) / whole
        others.append(Entry(REST, rest.sum(1).tolist(), site, where=_on_grid(rest.sum(0), size)))
    found.sort(key=lambda entry: -abs(entry.share))
    return [
        *found, *others, Entry(PATHS, [part.paths / whole for part in parts]),
        Entry(ERROR, [part.error / whole for part in parts]),
    ]  # fmt: skip


def _on_grid(values: torch.Tensor, size: TokenGrid | tuple[int, int] | None) -> list[list[float]] | None:
    """The values of all tokens, laid out over the picture; summed over the frames of a video."""
    if size is None:
        return None
    height, width = size[:2]
    return values.view(-1, height, width).sum(0).tolist()
