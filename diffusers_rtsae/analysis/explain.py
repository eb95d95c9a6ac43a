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
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..files import write_json
from ..models import TokenGrid
from ..pairs import left_out
from .effect import explain_out_of_memory
from .features import labels_of
from .word import WordState, WordStates

_CHECKED = (1, 4, 16)  # features that are taken away together, to check the ledger
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
        ablated (`float`, *optional*): the share of the word that goes if the latent is ablated, from the same
            gradients. It differs from `share` where the latent is active without the word, too: all that it adds along
            u counts, and it is 0 for a latent that the word makes inactive. It is no part of the sum.
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
    ablated: float | None = None
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
class Check:
    """
    The first features of a ledger, set to what they are without the word, all at once.

    Args:
        count (`int`): how many.
        said (`float`): the sum of their shares.
        measured (`float`): the share of the word that goes. It differs from `said` as far as features that are taken
            away together do other than the sum of each.
    """

    count: int
    said: float
    measured: float

    def __str__(self) -> str:
        first = "the first feature is" if self.count == 1 else f"the first {self.count} features are"
        return f"{self.measured:+.3f}  goes if {first} as without the word; said was {self.said:+.3f}"


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
        checks (`list[Check]`): what the first features were measured to carry together.
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
    checks: list[Check]
    image: object = field(default=None, repr=False)

    @property
    def features(self) -> list[Entry]:
        """The entries of single latents, the largest share first."""
        return [entry for entry in self.entries if entry.what == FEATURE]

    @property
    def sites(self) -> list[str]:
        """The sites of the dictionary."""
        return list(dict.fromkeys(entry.site for entry in self.entries if entry.what == REST))

    @property
    def total(self) -> float:
        """The sum of all entries: 1, to rounding."""
        return math.fsum(entry.share for entry in self.entries)

    def share(self, what: str, site: str | None = None) -> float:
        """The sum of the entries of a kind, see [`Entry`], at one site or at all."""
        return math.fsum(e.share for e in self.entries if e.what == what and site in (None, e.site))

    def content(self) -> dict:
        """All but the picture, as JSON holds it."""
        told = {name: value for name, value in vars(self).items() if name not in ("entries", "checks", "image")}
        told |= {"total": self.total, "checks": [vars(check) for check in self.checks]}
        return told | {"entries": [entry.told() for entry in self.entries]}

    def save(self, path: str | Path) -> None:
        """Write all but the picture to a JSON file."""
        write_json(Path(path), self.content())

    def __repr__(self) -> str:
        several = len(self.sites) > 1
        rows = [["share", "what", *(["site"] if several else []), "ablated", "present", "most at t"]]
        for entry in self.entries:
            most = max(range(len(self.timesteps)), key=lambda i: abs(entry.by_step[i]))
            rows.append(
                [
                    f"{entry.share:+.3f}", entry.name, *([entry.site or ""] if several else []),
                    *("" if value is None else f"{value:.3f}" for value in (entry.ablated, entry.present)),
                    f"{self.timesteps[most]:g}",
                ]
            )  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(f"{self.total:+.3f}  in all: what {self.word!r} does to {self.prompt!r}")
        return "\n".join([*lines, *map(str, self.checks)])


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
    left = left_out(prompt, word)  # which says if the prompt has no such word
    without = left if without is None else without
    with explain_out_of_memory(batch_size):
        states = WordStates(pipeline, prompt, without, adapter_name, seed, steps, batch_size, progress, **call)
        return ledger_of(states, prompt, without, word, features, progress)


def ledger_of(
    states: WordStates, prompt: str, without: str, word: str, features: int | None = 32, progress: bool = False
) -> Ledger:
    """The ledger of a word, as [`explain`] returns it, from the states of its picture."""
    bar = tqdm(states.states, desc="gradients", unit="step", leave=False, disable=not progress)
    parts = [_Part.of(states, state) for state in bar]
    entries = _entries(states, parts, features)
    found = [(entry.site, entry.index) for entry in entries if entry.what == FEATURE]
    counts = [count for count in _CHECKED if count <= len(found)]
    measured = states.undone([found[:count] for count in counts])
    checks = [
        Check(count, math.fsum(entry.share for entry in entries[:count]), one)
        for count, one in zip(counts, measured, strict=True)
    ]
    return Ledger(
        prompt, without, word, states.seed, [state.call.timestep for state in states.states],
        [state.size / states.size for state in states.states], [part.points for part in parts], entries, checks,
        states.image,
    )  # fmt: skip


@dataclass
class _Part:
    """
    One step of a ledger, as shares of the whole.

    Args:
        points (`int`): how many gradients it took.
        paths, error (`float`): what goes by other paths, and what gradients leave unexplained.
        latents (`dict[str, list[int]]`), shares (`dict[str, torch.Tensor]`): for each site latents that are active
            with the word or without, and what each carries on each token, `(latents, tokens)`.
        ablated (`dict[str, torch.Tensor]`): what goes with each of these latents if it is ablated, `(latents,)`.
        rest (`dict[str, torch.Tensor]`): what the rest carries on each token, `(tokens,)`.
    """

    points: int
    paths: float
    error: float
    latents: dict[str, list[int]]
    shares: dict[str, torch.Tensor]
    ablated: dict[str, torch.Tensor]
    rest: dict[str, torch.Tensor]

    @classmethod
    def of(cls, states: WordStates, state: WordState) -> _Part:
        slopes, points, error = states.slopes(state)
        latents, shares, ablated, rest = {}, {}, {}, {}
        for site, slope in slopes.items():
            differences, codes = state.differences[site], state.codes[site]
            both = latents[site] = torch.cat([differences.latents, codes.latents]).unique().tolist()
            vectors = states.vectors(site, state, both)
            along, amounts = slope @ vectors.T, differences.dense(both)
            shares[site] = (along * amounts).flatten(0, 1).T.cpu() / states.size
            ablated[site] = (along * codes.dense(both) * state.gains.get(site, 1)).sum((0, 1)).cpu() / states.size
            missed = state.whole[site] - amounts @ vectors
            rest[site] = (slope * missed).sum(-1).flatten().cpu() / states.size
        paths = (state.size - state.through) / states.size
        return cls(points, paths, error / states.size, latents, shares, ablated, rest)


@dataclass
class _Site:
    """What the latents of a site carry: at each step, `(latents, steps)`; on each token, `(latents, tokens)`; and
    each if it is ablated, `(latents,)`."""

    latents: list[int]
    by_step: torch.Tensor
    where: torch.Tensor
    ablated: torch.Tensor

    @classmethod
    def of(cls, parts: list[_Part], site: str) -> _Site:
        latents = sorted({latent for part in parts for latent in part.latents[site]})
        place = {latent: row for row, latent in enumerate(latents)}
        by_step, ablated = torch.zeros(len(latents), len(parts)), torch.zeros(len(latents))
        where = torch.zeros(len(latents), len(parts[0].rest[site]))
        for i, part in enumerate(parts):
            rows = torch.tensor([place[latent] for latent in part.latents[site]], dtype=torch.long)
            by_step[rows, i] = part.shares[site].sum(1)
            where.index_add_(0, rows, part.shares[site])
            ablated.index_add_(0, rows, part.ablated[site])
        return cls(latents, by_step, where, ablated)


def _entries(states: WordStates, parts: list[_Part], count: int | None) -> list[Entry]:
    """The entries of a ledger from those of its steps."""
    sites = {site: _Site.of(parts, site) for site in states.dictionary.sites}
    sizes = [
        (abs(share), site, row) for site, one in sites.items() for row, share in enumerate(one.by_step.sum(1).tolist())
    ]
    listed = [(site, row) for _, site, row in sorted(sizes, key=lambda size: -size[0])[:count]]
    shown, entries, summed = set(listed), [], []
    for site, row in listed:
        one, latent = sites[site], sites[site].latents[row]
        codes = [state.codes[site] for state in states.states]
        active = sum(float(code.values[code.latents == latent].sum()) / (code.rows * code.tokens) for code in codes)
        present = active / len(codes) / float(states.dictionary.sites[site].typical_activation[latent])
        entries.append(
            Entry(
                FEATURE, one.by_step[row].tolist(), site, latent, labels_of(states.dictionary, site, latent),
                states.dictionary.name_of(site, latent), present, float(one.ablated[row]),
                _on_grid(one.where[row], states.sizes.get(site)),
            )
        )  # fmt: skip
    for site, one in sites.items():
        left = [row for row in range(len(one.latents)) if (site, row) not in shown]
        rest = torch.stack([part.rest[site] for part in parts])
        of_site = [(OTHERS, one.by_step[left].sum(0), one.where[left].sum(0))] if left else []
        for what, by_step, where in (*of_site, (REST, rest.sum(1), rest.sum(0))):
            summed.append(Entry(what, by_step.tolist(), site, where=_on_grid(where, states.sizes.get(site))))
    return [
        *entries, *summed, Entry(PATHS, [part.paths for part in parts]), Entry(ERROR, [part.error for part in parts])
    ]  # fmt: skip


def _on_grid(values: torch.Tensor, size: TokenGrid | tuple[int, int] | None) -> list[list[float]] | None:
    """The values of all tokens, laid out over the picture; summed over the frames of a video."""
    if size is None:
        return None
    height, width = size[:2]
    return values.view(-1, height, width).sum(0).tolist()
