"""Names for latents: of every latent of a dictionary, the word that it makes, or what it does that no word says; found
and verified by its effect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from ..pipeline import get_dictionary
from .effect import explain_out_of_memory
from .exchanged import ExchangedStates, Latent, Moved, Slopes
from .looks import LOOKS
from .vocabulary import Exchange, Exchanges, Vocabulary, templates, whole_words

_CANDIDATES, _OF_LOOKS = 24, 8  # latents that are measured for each word, and for each look that they raise or lower
_STEPS, _VERIFYING = 8, 3  # steps of a generation that latents are ranked on, and measured on
_LEAST = 0.1  # squared change that a word makes, relative to the median of words; others say nothing
_ALIKE = 0.95  # least cosine of the changes that synonyms make
LEAST_CONFIDENCE = 0.7  # of a name
_WORDS = 200  # of a tokenizer, at most
_OF_TEMPLATES = 4  # times as many pictures, as all words of templates are in one group
_DRAWS = 200  # of pictures with replacement, for the confidence
_SHARE = 0.02  # least part of a word's change that a latent with its name makes
_SEEN = 0.05  # least change of a look, in standard deviations, of a latent that is named after it


@dataclass
class Name:
    """
    The name of a latent.

    Args:
        site (`str`), index (`int`): the latent; `pipe.set_rtsae_features({(site, index): 1.0})` steers it.
        name (`str`): the word; or, of a latent that is like no word, what it does to the look of pictures, one of
            [`LOOKS`].
        by (`str`): `"word"` or `"look"`.
        synonyms (`list[str]`): words that change predictions as the name does.
        effect (`float`): the part of what exchanging the word changes that strength 1 changes too (1: all of it). Of a
            look, its change in standard deviations among pictures.
        confidence (`float`): 0 to 1, how surely this word or look and no other, from pictures that had no part in the
            choice.
        timestep (`float`): the anchor at which the latent's direction is longest, in training units.
        place (`list[float]`, *optional*): row and column of the centre of what it changes, from the top left (0, 0) to
            (1, 1), and the root mean square distance from it: .41 if that is everywhere.
    """

    site: str
    index: int
    name: str
    by: str
    synonyms: list[str]
    effect: float
    confidence: float
    timestep: float
    place: list[float] | None

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
        rows = [["site", "index", "name", "effect", "confidence", "timestep", "row", "column", "spread", "synonyms"]]
        rows += [
            [
                n.site, str(n.index), n.name, f"{n.effect:.2f}", f"{n.confidence:.2f}", f"{n.timestep:g}",
                *([f"{number:.2f}" for number in n.place] if n.place else [""] * 3), ", ".join(n.synonyms),
            ]
            for n in self
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        )


def name_features(
    pipeline,
    prompts: Sequence[str] | None = None,
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

    The words are those that the prompts can exchange, see [`Vocabulary.of`]. Without prompts they are words of the
    pipeline's tokenizer in a few templates, those that change predictions most. First all latents are ranked at once:
    to first order, how much of the change that each word makes to the prediction does each latent make? The best for
    each word are then added, in pictures of other prompts and other noise, and the change that they make is compared
    with that of every word. A latent is named after the word whose change its own is most like. If none is clearly
    more like it than others, it is named after what it does to the look of pictures, see [`LOOKS`]; and if it does not
    clearly do one thing, it has no name. The time grows with the number of words, not with that of latents.

    Args:
        pipeline (`DiffusionPipeline`): with a dictionary loaded. Nothing has to be set on it.
        prompts (`Sequence[str]`, *optional*): such as the model is used with; a hundred or more.
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
    options = {"adapter_name": adapter_name, "batch_size": batch_size, **call}
    bar = tqdm(desc="states", unit="state", leave=False, disable=not progress)
    with explain_out_of_memory(batch_size), bar:
        if prompts is None:
            told = _telling_words(pipeline, words, seed, options)
            prompts, vocabulary = templates(told), Vocabulary([told])
            pictures *= _OF_TEMPLATES
        else:
            vocabulary = Vocabulary.of(prompts, words)
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


def _telling_words(pipeline, words: Sequence[str] | None, seed: int, options: dict) -> list[str]:
    """Of the words of a pipeline's tokenizer those that change predictions most, or `words`, if they are given."""
    if words is None:
        words = whole_words(pipeline.tokenizer) if getattr(pipeline, "tokenizer", None) is not None else []
    if len(words) < 2:
        raise ValueError(
            f"Expected prompts, or two words to exchange at least; got {list(words)!r} as words of "
            f"{type(pipeline).__name__}'s tokenizer."
        )
    exchanges = Exchanges(["a picture"], [Exchange(0, word, f"a {word} picture") for word in words])
    sizes = ExchangedStates(pipeline, exchanges, seed=seed, steps=1, **options).sizes_of_changes()
    telling = sizes.topk(min(_WORDS, len(words))).indices.tolist()
    return [words[i] for i in sorted(telling)]


def _candidates(vocabulary: Vocabulary, words: list[str], slopes: Slopes) -> tuple[Vocabulary, list[Latent]]:
    """The groups whose words change predictions; and, of each of their words and each look, the latents that do most
    of it at strength 1, and those whose direction does most for its length."""
    changing = slopes.sizes > _LEAST * slopes.sizes.median()
    if not changing.any():
        raise ValueError("Exchanging words changes no prediction: expected prompts whose words the model knows.")
    matters = {word for word, changes in zip(words, changing.tolist(), strict=True) if changes}
    groups = [group for group in vocabulary.groups if len(matters & set(group)) > 1]
    kept = [row for row, word in enumerate(words) if any(word in group for group in groups)]
    chosen: dict[Latent, None] = {}
    for site, length in slopes.lengths.items():
        looks = slopes.looks[site]
        for added, count in ((slopes.added[site][kept], _CANDIDATES), (torch.cat([looks, -looks]), _OF_LOOKS)):
            for scores in (added, torch.where(length > 0, added / length.clamp(min=1e-12), 0.0)):
                scores = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True).clamp(min=1e-12)
                best = scores.topk(min(count // 2, scores.shape[1])).indices.flatten().tolist()
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
        if word is not None and effect >= _SHARE and confidence >= LEAST_CONFIDENCE:
            name, by, others = exchanges.words[word], "word", [exchanges.words[i] for i in synonyms[word] if i != word]
        else:
            name, effect, confidence = likeness.look(row)
            by, others = "look", []
            if effect < _SEEN or confidence < LEAST_CONFIDENCE:
                continue
        sae, place = dictionary.sites[site], moved.places[row]
        length = (sae.feature_trajectories([index])[0].detach() / sae.spread[:, None]).norm(dim=-1)
        when = float(sae.config.anchors[int(length.argmax())])
        where = None if bool(place.isnan().any()) else [round(number, 2) for number in place.tolist()]
        names.append(Name(site, index, name, by, others, round(effect, 4), round(confidence, 3), when, where))
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
        self._drawn = torch.nn.functional.one_hot(drawn, pictures).sum(1).float()  # how often each picture
        self._times = self._drawn[:, self._base_of]  # and that of each exchange

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

    def look(self, row: int) -> tuple[str, float, float]:
        """What a latent changes most of the look of pictures, how much, and the share of the draws of pictures in
        which it is this."""
        if not self._moved.looks.shape[1]:
            return "", 0.0, 0.0
        changes = self._drawn @ self._moved.looks[row].T / self._drawn.sum(1, keepdim=True)  # (draws, looks)
        mean = self._moved.looks[row].mean(1)
        look = int(mean.abs().argmax())
        same = (changes.abs().argmax(1) == look) & (changes[:, look].sign() == mean[look].sign())
        rises, falls = list(LOOKS.values())[look]
        return rises if mean[look] > 0 else falls, float(mean[look].abs()), float(same.float().mean())
