"""Names for latents: of every latent of a dictionary, the word that it makes, found and verified by its effect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ..pipeline import get_dictionary
from .effect import explain_out_of_memory
from .exchanged import ExchangedStates, Latent, Moved, Slopes
from .vocabulary import Exchanges, Vocabulary

_CANDIDATES = 24  # latents that are measured for each word
_STEPS, _VERIFYING = 8, 3  # steps of a generation that latents are ranked on, and measured on
_LEAST = 0.1  # squared change that a word makes, relative to the median of words; others say nothing
_ALIKE = 0.95  # least cosine of the changes that synonyms make
LEAST_CONFIDENCE = 0.7  # of a name
_DRAWS = 200  # of pictures with replacement, for the confidence
_SHARE = 0.02  # least part of a word's change that a latent with its name makes


@dataclass
class Name:
    """
    The name of a latent.

    Args:
        site (`str`), index (`int`): the latent; `pipe.set_rtsae_features({(site, index): 1.0})` steers it.
        name (`str`): the word.
        synonyms (`list[str]`): words that change predictions as the name does.
        effect (`float`): the part of what exchanging the word changes that strength 1 changes too (1: all of it).
        confidence (`float`): 0 to 1, how surely this word and no other, from pictures that had no part in the choice.
        timestep (`float`): the anchor at which the latent's direction is longest, in training units.
    """

    site: str
    index: int
    name: str
    synonyms: list[str]
    effect: float
    confidence: float
    timestep: float

    def content(self) -> dict:
        """What `names.json` has of it, under its site and index."""
        return {key: value for key, value in vars(self).items() if key not in ("site", "index")}


class Names(list):
    """
    A list of [`Name`], the surest first, that prints as a table.

    `words` are all words that names were chosen from; `measured` the number of latents that were measured.
    """

    words: list[str] = []
    measured: int = 0

    def content(self) -> dict[str, dict[str, dict]]:
        """As [`Dictionary.names`] holds it, and `names.json`: by site and index."""
        sites: dict[str, dict[str, dict]] = {}
        for one in self:
            sites.setdefault(one.site, {})[str(one.index)] = one.content()
        return sites

    def __repr__(self) -> str:
        if not self:
            return "no names"
        rows = [["site", "index", "name", "effect", "confidence", "timestep", "synonyms"]]
        rows += [
            [
                n.site, str(n.index), n.name, f"{n.effect:.2f}", f"{n.confidence:.2f}", f"{n.timestep:g}",
                ", ".join(n.synonyms),
            ]
            for n in self
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def name_features(
    pipeline,
    prompts: Sequence[str],
    words: Sequence[str] | None = None,
    adapter_name: str | None = None,
    pictures: int = 4,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = False,
    **call,
) -> Names:
    """
    Give the latents of a loaded dictionary the words that they make.

    The words are those that the prompts can exchange, see [`Vocabulary.of`]. First all latents are ranked at once: to
    first order, how much of the change that each word makes to the prediction does each latent make? The best for
    each word are then added, in pictures of other prompts and other noise, and the change that they make is compared
    with that of every word. A latent is named after the word whose change its own is most like; if none is clearly
    more like it than others, it has no name. The time grows with the number of words, not with that of latents.

    Args:
        pipeline (`DiffusionPipeline`): with a dictionary loaded. Nothing has to be set on it.
        prompts (`Sequence[str]`): such as the model is used with; a hundred or more.
        words (`Sequence[str]`, *optional*): to choose from these and what they are exchanged for only.
        adapter_name (`str`, *optional*): of the dictionary.
        pictures (`int`): for each group of words that can be exchanged, pictures that latents are ranked on, and as
            many others that they are measured on.
        seed (`int`): of the choice of prompts and of the noise.
        batch_size (`int`): pictures drawn at once.
        progress (`bool`): show a bar.
        call: passed to the pipeline.

    Returns:
        [`Names`]: one for each latent that has a name. `dictionary.names = names.content()` keeps them, and
        `dictionary.save` writes them.

    Raises:
        `ValueError`: no words of the prompts can be exchanged, or exchanging them changes nothing; the pipeline takes
            no prompt; or the denoiser gives no gradient.

    Example:
        ```py
        >>> names = name_features(pipe, prompts)
        >>> [name.index for name in names if name.name == "red"]
        ```
    """
    vocabulary = Vocabulary.of(prompts, words)
    options = {"adapter_name": adapter_name, "batch_size": batch_size, **call}
    bar = tqdm(desc="states", unit="state", leave=False, disable=not progress)
    with explain_out_of_memory(batch_size), bar:
        ranking = ExchangedStates(
            pipeline, vocabulary.exchanges(prompts, pictures, seed), seed=seed, steps=_STEPS, **options
        )
        bar.total = ranking.states
        slopes = ranking.slopes(bar.update)
        vocabulary, candidates = _candidates(vocabulary, ranking.exchanges.words, slopes)
        exchanges = vocabulary.exchanges(prompts, pictures, seed + 1)
        states = ExchangedStates(pipeline, exchanges, seed=seed + 1_000_000, steps=_VERIFYING, **options)
        bar.total += states.states * len(candidates)
        moved = states.measure(candidates, bar.update)
    names = Names(_named(candidates, moved, exchanges, pipeline, adapter_name))
    names.words, names.measured = exchanges.words, len(candidates)
    names.sort(key=lambda one: (-one.confidence, -one.effect))
    return names


def _candidates(vocabulary: Vocabulary, words: list[str], slopes: Slopes) -> tuple[Vocabulary, list[Latent]]:
    """The groups whose words change predictions; and, of each of their words, the latents that do most of it at
    strength 1, and those whose direction does most for its length."""
    changing = slopes.sizes > _LEAST * slopes.sizes.median()
    if not changing.any():
        raise ValueError("Exchanging words changes no prediction: expected prompts whose words the model knows.")
    matters = {word for word, changes in zip(words, changing.tolist(), strict=True) if changes}
    groups = [group for group in vocabulary.groups if len(matters & set(group)) > 1]
    kept = [row for row, word in enumerate(words) if any(word in group for group in groups)]
    chosen: dict[Latent, None] = {}
    for site, added in slopes.added.items():
        added, length = added[kept], slopes.lengths[site]
        for scores in (added, torch.where(length > 0, added / length.clamp(min=1e-12), 0.0)):
            scores = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True).clamp(min=1e-12)
            best = scores.topk(min(_CANDIDATES // 2, scores.shape[1])).indices.flatten().tolist()
            chosen |= {(site, index): None for index in best}
    return Vocabulary(groups), list(chosen)


def _named(candidates: Sequence[Latent], moved: Moved, exchanges: Exchanges, pipeline, adapter_name) -> list[Name]:
    """The names of candidates whose change is clearly like that of one word."""
    dictionary = get_dictionary(pipeline, adapter_name)
    likeness = _Likeness(moved, exchanges)
    synonyms = likeness.synonyms()
    names = []
    for row, (site, index) in enumerate(candidates):
        word, effect, confidence = likeness.best(row, synonyms)
        if word is None or effect < _SHARE or confidence < LEAST_CONFIDENCE:
            continue
        sae = dictionary.sites[site]
        length = (sae.feature_trajectories([index])[0].detach() / sae.spread[:, None]).norm(dim=-1)
        others = [exchanges.words[i] for i in synonyms[word] if i != word]
        when = float(sae.config.anchors[int(length.argmax())])
        name = exchanges.words[word]
        names.append(Name(site, index, name, others, round(effect, 4), round(confidence, 3), when))
    return names


class _Likeness:
    """How like the change that each word makes is the change that each latent makes: the cosine of the two, over all
    pictures in which the word is exchanged for another."""

    def __init__(self, moved: Moved, exchanges: Exchanges):
        self._words, self._moved = exchanges.words, moved
        number = {word: i for i, word in enumerate(self._words)}
        self._word_of = torch.tensor([number[one.word] for one in exchanges.changed])
        self._base_of = torch.tensor([one.base for one in exchanges.changed])
        self._sizes = moved.between.diagonal()
        mean = self._summed(self._sizes) / self._summed(torch.ones_like(self._sizes))
        self._matters = mean > _LEAST * mean.median()
        pictures, draw = len(exchanges.prompts), torch.Generator().manual_seed(0)
        drawn = torch.randint(pictures, (_DRAWS, pictures), generator=draw)
        times = torch.nn.functional.one_hot(drawn, pictures).sum(1)
        self._times = times[:, self._base_of].float()  # how often each draw has the picture of each exchange

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over the exchanges of each word: from `(..., exchanges)` to `(..., words)`."""
        return torch.zeros(*values.shape[:-1], len(self._words)).index_add_(-1, self._word_of, values)

    def synonyms(self) -> list[list[int]]:
        """For each word, itself and those that change the same pictures as it does."""
        length = self._sizes.sqrt().clamp(min=1e-20)
        same = (self._base_of[:, None] == self._base_of[None]).float()
        cosines = self._moved.between / (length[:, None] * length[None])
        of_words = self._summed(self._summed(cosines).T)
        counts = self._summed(self._summed(same).T)
        alike = (of_words / counts.clamp(min=1) > _ALIKE) | torch.eye(len(self._words), dtype=torch.bool)
        return [row.nonzero().flatten().tolist() for row in alike]

    def _cosines(self, row: int, times: torch.Tensor) -> torch.Tensor:
        """The cosines of a latent's change with those of all words, `(draws, words)`; words that change next to
        nothing have the least."""
        along, own, sizes = (
            self._summed(times * values)
            for values in (self._moved.along[row], self._moved.own[row], self._sizes)
        )  # fmt: skip
        cosines = along / (own * sizes).sqrt().clamp(min=1e-20)
        return cosines.masked_fill(~self._matters, -1.0)

    def best(self, row: int, synonyms: list[list[int]]) -> tuple[int | None, float, float]:
        """The word that a latent is named after, its part of what the word changes, and the share of the draws of
        pictures in which this word, or a synonym, is the most alike."""
        cosines = self._cosines(row, torch.ones(1, len(self._sizes)))[0]
        word = int(cosines.argmax())
        if cosines[word] <= 0:
            return None, 0.0, 0.0
        effect = float(self._summed(self._moved.along[row])[word] / self._summed(self._sizes)[word])
        votes = self._cosines(row, self._times).argmax(1)
        confidence = float(torch.isin(votes, torch.tensor(synonyms[word])).float().mean())
        return word, effect, confidence
