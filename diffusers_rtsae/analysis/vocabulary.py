"""The words that prompts can exchange: which stand in the same places, and prompts that differ in one of them. Needs
no torch."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..pairs import with_article

_LONGEST = 4  # words of a phrase
_ALIKE = 0.25  # least mean similarity of the places of words that form a group
_MOST = 2000  # prompts that are looked at, and words of a tokenizer
_TEMPLATES = {
    "a photo": "a photo of a {}",
    "a picture": "a {} picture",
    "an image": "an image of {}",
    "art": "art, {}",
}
_START, _END = "^", "$"

Phrase = tuple[str, ...]


def tokens(prompt: str) -> list[str]:
    """The words and punctuation marks of a prompt."""
    return re.findall(r"[\w'-]+|[^\w\s]", prompt)


@dataclass(frozen=True)
class Exchange:
    """
    A prompt and the same with another word.

    Args:
        base (`int`): the index of the prompt in [`Exchanges.prompts`].
        word (`str`): what the changed prompt says instead.
        prompt (`str`): the changed prompt.
    """

    base: int
    word: str
    prompt: str


@dataclass
class Vocabulary:
    """
    Words and phrases in groups. Those of a group can stand in the same place of a prompt.

    Args:
        groups (`list[list[str]]`): each with at least two words; no word is in two groups.

    Raises:
        `ValueError`: a group has fewer than two words, or a word is in two.
    """

    groups: list[list[str]]

    def __post_init__(self):
        if not self.groups:
            raise ValueError("Expected words that can be exchanged, got none.")
        for group in self.groups:
            if len(group) < 2:
                raise ValueError(f"Expected groups of words that can be exchanged, two at least, got {group!r}.")
        counts = Counter(word for group in self.groups for word in group)
        if twice := [word for word, count in counts.items() if count > 1]:
            raise ValueError(f"Expected each word in one group, got {twice[0]!r} in two.")
        self._group_of = {word: group for group in self.groups for word in group}
        self._longest = max(len(tokens(word)) for word in self._group_of)

    @classmethod
    def of(cls, prompts: Sequence[str], words: Sequence[str] | None = None) -> Vocabulary:
        """
        The words and phrases that can be exchanged in some prompts: those that occur between the same neighbours.

        A phrase of which a part can be exchanged, as "red" in "red star", is no word of its own. The similarity of two
        words is the cosine of how often they occur between each pair of neighbours; pairs that few words have count
        more. The most similar groups are joined until none are similar on average (average linkage).

        Args:
            prompts (`Sequence[str]`): the more, the better; the first 2,000 are looked at.
            words (`Sequence[str]`, *optional*): keep only these, and the words that they are exchanged for.

        Raises:
            `ValueError`: in these prompts no two words can be exchanged, or one of `words` cannot.
        """
        counts, places = _places(prompts[:_MOST])
        groups = [[" ".join(phrase) for phrase in group] for group in _grouped(counts, places)]
        if not groups:
            raise ValueError(
                f"In the {len(prompts)} prompts no two words stand in the same place, so none can be exchanged: "
                "expected more prompts, or ones that say alike things."
            )
        if words is None:
            return cls(groups)
        known = {word for group in groups for word in group}
        if missing := [word for word in words if word not in known]:
            raise ValueError(
                f"Expected words that the prompts exchange for others, got {missing[0]!r}; these do: {sorted(known)}."
            )
        return cls([group for group in groups if any(word in words for word in group)])

    @property
    def words(self) -> list[str]:
        """All words, sorted."""
        return sorted(self._group_of)

    def slots(self, prompt: str) -> list[tuple[int, int, str]]:
        """Where a prompt has a word of the vocabulary: first token, last token + 1, and the word."""
        parts, slots, start = tokens(prompt), [], 0
        while start < len(parts):
            for end in range(min(start + self._longest, len(parts)), start, -1):
                if (word := " ".join(parts[start:end])) in self._group_of:
                    slots.append((start, end, word))
                    start = end
                    break
            else:
                start += 1
        return slots

    def exchanges(self, prompts: Sequence[str], pictures: int, seed: int) -> Exchanges:
        """
        For each group some prompts that say all but its word, each with all words of the group that it can say.

        A prompt from which the word cannot be left out, see [`_left_out`], says the word it has, and the others
        instead of it. Prompts with one word of the group are preferred, and of them those that can do without it.

        Args:
            pictures (`int`): the number of prompts for each group; fewer if fewer have its words.
            seed (`int`): of the choice.
        """
        choose = random.Random(seed)
        adjacent = {pair for prompt in prompts[:_MOST] for pair in itertools.pairwise(_framed(prompt))}
        chosen, changed = [], []
        for group in self.groups:
            offers = []
            for prompt in choose.sample(list(prompts), len(prompts)):
                parts, slots = tokens(prompt), self.slots(prompt)
                own = [slot for slot in slots if slot[2] in group]
                if own:
                    start, end, word = choose.choice(own)
                    offers.append((len(own) > 1, self._exchanged(group, parts, slots, start, end, word, adjacent)))
            offers.sort(key=lambda offer: (offer[0], not offer[1][0]))
            for _, (_, base, others) in offers[:pictures]:
                changed += [Exchange(len(chosen), word, other) for word, other in others]
                chosen.append(base)
        return Exchanges(chosen, changed)

    def _exchanged(
        self, group: list[str], parts: list[str], slots: Sequence[tuple[int, int, str]], start: int, end: int,
        present: str, adjacent: set,
    ) -> tuple[bool, str, list[tuple[str, str]]]:  # fmt: skip
        """Whether the word between `start` and `end` can be left out of a prompt; the prompt without it, or as it is;
        and the words that can be there, each with the prompt that says it."""
        span = self._left_out(parts, slots, start, end, adjacent)
        base = parts if span is None else parts[: span[0]] + parts[span[1] :]
        words = [word for word in group if span is not None or word != present]
        said = [(word, _joined([*parts[:start], word, *parts[end:]])) for word in words]
        return span is not None, _joined(base), said

    def _left_out(
        self, parts: list[str], slots: Sequence[tuple[int, int, str]], start: int, end: int, adjacent: set
    ) -> tuple[int, int] | None:
        """The shortest span around a word without which the prompt reads like others: what stands before it stands
        before what comes after it in some prompt. `None` if the span would have another word of the vocabulary."""
        around = ["a" if part == "an" else part for part in (_START, *parts, _END)]
        low = max((e for _, e, _ in slots if e <= start), default=0)
        high = min((s for s, *_ in slots if s >= end), default=len(parts))
        spans = ((a, b) for a in range(start, low - 1, -1) for b in range(end, high + 1))
        for a, b in sorted(spans, key=lambda span: span[1] - span[0]):
            if (around[a], around[b + 1]) in adjacent and b - a < len(parts):
                return a, b
        return None


def whole_words(tokenizer) -> list[str]:
    """The lower-case words of three letters and more that are one token each of a tokenizer of transformers, in the
    order of its tokens, which is that of their frequency in most; the first 2,000."""
    marked = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    words = dict.fromkeys(token.removesuffix("</w>").lstrip("▁Ġ") for token, _ in marked)
    words = [word for word in words if re.fullmatch(r"[a-z]{3,}", word)]
    encoded = tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
    return [word for word, ids in zip(words, encoded, strict=True) if len(ids) == 1][:_MOST]


def templates(words: Sequence[str]) -> list[str]:
    """Prompts that say one of some words each, and a few that say none."""
    return [*_TEMPLATES, *(with_article(template.format(word)) for template in _TEMPLATES.values() for word in words)]


@dataclass
class Exchanges:
    """
    Prompts, and the same with one word exchanged.

    Args:
        prompts (`list[str]`): the prompts.
        changed (`list[Exchange]`): the changed ones; at most one for each prompt and word.
    """

    prompts: list[str]
    changed: list[Exchange]

    @property
    def words(self) -> list[str]:
        """The words that are exchanged for others, sorted."""
        return sorted({one.word for one in self.changed})


def _framed(prompt: str) -> list[str]:
    """The tokens of a prompt between marks of its start and end, with "a" for "an"."""
    return [_START, *("a" if token == "an" else token for token in tokens(prompt)), _END]


def _places(prompts: Sequence[str]) -> tuple[Counter[Phrase], dict[Phrase, Counter]]:
    """How often each phrase occurs, in all and between each pair of neighbours."""
    counts: Counter[Phrase] = Counter()
    places: dict[Phrase, Counter] = defaultdict(Counter)
    for prompt in prompts:
        parts = _framed(prompt)
        for start in range(1, len(parts) - 1):
            for end in range(start + 1, min(start + _LONGEST, len(parts) - 1) + 1):
                phrase = tuple(parts[start:end])
                if phrase[0][0].isalnum() and phrase[-1][0].isalnum():
                    counts[phrase] += 1
                    places[phrase][parts[start - 1], parts[end]] += 1
    least = max(3, math.ceil(len(prompts) / 100))
    return Counter({phrase: count for phrase, count in counts.items() if count >= least}), places


def _grouped(counts: Counter[Phrase], places: dict[Phrase, Counter]) -> list[list[Phrase]]:
    """Groups of phrases between the same neighbours, the most frequent first."""
    fillers: dict[tuple[Phrase, Phrase], set[Phrase]] = defaultdict(set)
    for phrase in counts:
        for before, inner, after in _parts(phrase):
            fillers[before, after].add(inner)
    words = [p for p in counts if all(len(fillers[before, after]) == 1 for before, _, after in _parts(p))]
    between: Counter = Counter(place for word in words for place in places[word])
    vectors = {}
    for word in words:
        shared = {place: count for place, count in places[word].items() if between[place] > 1}
        weights = {p: math.sqrt(count) * math.log(1 + len(words) / between[p]) for p, count in shared.items()}
        length = math.sqrt(sum(weight**2 for weight in weights.values()))
        if length:
            vectors[word] = {place: weight / length for place, weight in weights.items()}
    groups = [[word] for word in vectors]
    similar = {(i, j): _dot(vectors[a[0]], vectors[b[0]]) for (i, a), (j, b) in _pairs(enumerate(groups))}
    alive = set(range(len(groups)))
    while len(alive) > 1:
        i, j = max(_pairs(sorted(alive)), key=similar.get)
        if similar[i, j] < _ALIKE:
            break
        alive.remove(j)
        for k in alive - {i}:  # average linkage
            to_i, to_j = tuple(sorted((i, k))), tuple(sorted((j, k)))
            sizes = len(groups[i]), len(groups[j])
            similar[to_i] = (sizes[0] * similar[to_i] + sizes[1] * similar[to_j]) / sum(sizes)
        groups[i] += groups[j]
    return [sorted(groups[i], key=lambda word: -counts[word]) for i in sorted(alive) if len(groups[i]) > 1]


def _parts(phrase: Phrase) -> list[tuple[Phrase, Phrase, Phrase]]:
    """All ways to take a shorter phrase out of one: before, the phrase, after."""
    ends = itertools.combinations(range(len(phrase) + 1), 2)
    return [(phrase[:a], phrase[a:b], phrase[b:]) for a, b in ends if b - a < len(phrase)]


def _pairs(values) -> itertools.combinations:
    return itertools.combinations(values, 2)


def _dot(one: Mapping, other: Mapping) -> float:
    return sum(weight * other[place] for place, weight in one.items() if place in other)


def _joined(parts: Sequence[str]) -> str:
    return with_article(re.sub(r" (?=[^\w\s])", "", " ".join(parts)))
