"""What pairs of prompts differ in, and more pairs that differ in the same. Needs no torch."""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Iterable, Mapping, Sequence

from .worlds import World

HELD_OUT_FROM = 8  # pairs, of which on some are held out to judge a fitted feature
_SMALL = frozenset("a an and as at by in is of on or the to who with".split())  # words that say nothing by themselves


def difference(before: str, after: str) -> tuple[list[str], list[str]]:
    """The words of a prompt that another has not, and those that it has instead."""
    one, other = before.split(), after.split()
    opcodes = [
        op for op in difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes() if op[0] != "equal"
    ]
    if not opcodes:
        return [], []
    start, end = opcodes[0], opcodes[-1]
    gone, new = one[start[1] : end[2]], other[start[3] : end[4]]
    if {*gone[:1], *new[:1]} == {"a", "an"}:  # as the next word wants it
        return gone[1:], new[1:]
    return gone, new


def left_open(before: str, after: str) -> str:
    """The first prompt of a pair without the words that the second has others for."""
    words = before.split()
    gone, _ = difference(before, after)
    start = next((i for i in range(len(words)) if words[i : i + len(gone)] == gone), 0) if gone else 0
    return _joined(words[:start], words[start + len(gone) :])


def left_out(prompt: str, phrase: str) -> str:
    """
    A prompt without a word or phrase, wherever it has it.

    Raises:
        `ValueError`: the prompt does not have these words.
    """
    if not phrase.strip() or not has_phrase(prompt, phrase.strip()):
        raise ValueError(f"Expected a word of the prompt {prompt!r}, got {phrase!r}.")
    first, *others = re.split(_phrase(phrase.strip()), prompt, flags=re.IGNORECASE)
    for after in others:
        first = _joined(first.split(), after.split())
    return first


def _joined(before: list[str], after: list[str]) -> str:
    """What stands before and after words that were left out, without what they leave behind: small words that lead
    nowhere ("on" of "on white"), doubled commas, and the wrong article."""
    before = list(before)
    while before and before[-1] in _SMALL and (not after or after[0].startswith(",")):
        before.pop()
    text = re.sub(r"\s+(?=,)", "", " ".join(before + after))
    return with_article(re.sub(r",(\s*,)+", ",", text).strip(" ,"))


def prompts_to_show(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Prompts to show a fitted feature on: one that leaves the concept open and, if a pair has one, one that
    contradicts it."""
    contradicting = next((pair for pair in pairs if difference(*pair)[0]), None)
    return [pairs[0][0]] if contradicting is None else [left_open(*contradicting), contradicting[0]]


def by_word(effects: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """
    The mean effect on the pairs whose prompts have a word, by word: only words that two pairs or more have and others
    have not, without those that the feature brings in.

    Args:
        effects (`Mapping`): the effect on each pair.
    """
    words = {pair: set(re.findall(r"[\w-]+", pair[1].lower())) for pair in effects}
    brought = {word for pair in effects for word in re.findall(r"[\w-]+", " ".join(difference(*pair)[1]).lower())}
    means = {}
    for word in dict.fromkeys(word for own in words.values() for word in sorted(own - brought - _SMALL)):
        having = [effect for pair, effect in effects.items() if word in words[pair]]
        if 2 <= len(having) < len(effects):
            means[word] = sum(having) / len(having)
    return means


def judgement(
    measured: Mapping[str, float], pairs: int, effects: Mapping[tuple[str, str], float]
) -> tuple[list[tuple[str, str, str]], str]:
    """
    What a fitted feature was measured to do: rows of name, figure and meaning, and a sentence on what judged it.

    Args:
        measured (`Mapping`): the feature's measurements.
        pairs (`int`): the number of pairs that it was given.
        effects (`Mapping`): its effect on each pair that it was judged by.
    """
    meanings = {
        "effect": ("Effect", "of what changing the prompt does; 1 is all of it"),
        "lowest": ("Lowest effect", "on the pair where it is smallest"),
        "ceiling": ("Ceiling", "the most that can be done at this place in the model"),
        "harm": ("Harm", "change of the prompts that were to stay, in the same unit"),
        "effect_away": ("Effect of −1", "of what changing the prompt back does"),
    }
    found = {key: (name, f"{measured[key]:.2f}", what) for key, (name, what) in meanings.items() if key in measured}
    if len(effects) > 1 and "lowest" in found:
        found["lowest"] = (*found["lowest"][:2], f"on “{min(effects, key=effects.get)[0]}”")
    if "harm" not in found:
        found["harm"] = ("Harm", "–", "not measured: no prompts that were to stay")
    if means := by_word(effects):
        least, most = min(means, key=means.get), max(means, key=means.get)
        told = f"{means[least]:.2f} to {means[most]:.2f}"
        found["range"] = ("By other words", told, f"the mean: least with “{least}”, most with “{most}”")
    if pairs >= HELD_OUT_FROM:
        of = f"the {len(effects)}" if effects else "some"
        return [*found.values()], f"Judged on {of} of {pairs} pairs of prompts that it was not made from."
    those = "pair" if pairs == 1 else f"{pairs} pairs"
    return [*found.values()], (
        f"Judged on the {those} it was made from, with other noise: of fewer than {HELD_OUT_FROM} pairs none is held "
        "out, and it may do less on other prompts."
    )


def has_phrase(prompt: str, phrase: str) -> bool:
    """Whether a prompt has these words, as whole words."""
    return re.search(_phrase(phrase), prompt, re.IGNORECASE) is not None


def _phrase(phrase: str) -> str:
    """A regular expression of these words, as whole words."""
    return rf"(?<![\w-]){re.escape(phrase)}(?![\w-])"


def unnamed(labels: Mapping[str, Mapping], prompts: Sequence[str], world: World) -> list[str]:
    """Prompts of a bundled world that name each value which a label stands for and which none of `prompts` names."""
    targets = [(label.get("factor"), str(label.get("value", name))) for name, label in labels.items()]
    return [
        naming.format(value)
        for factor, value in targets
        if not any(has_phrase(prompt, value) for prompt in prompts)
        for _, naming in world.scenes.get(factor, ())
    ]


def labels_between(labels: Iterable[str], before: Sequence[str], after: Sequence[str]) -> list[str]:
    """The labels that every prompt of `after` names and none of `before` does."""
    if not after:
        return []
    everywhere = [name for name in labels if all(has_phrase(prompt, name) for prompt in after)]
    return [name for name in everywhere if not any(has_phrase(prompt, name) for prompt in before)]


def more_pairs(pairs: Sequence[tuple[str, str]], world: World | None, count: int) -> list[tuple[str, str]]:
    """
    More pairs that bring in what the first of `pairs` brings in. The first are made of the sentences of a bundled
    world: those that leave its factor open, then those that name another of its values. Then the words of the given
    pairs are combined: what each replaces is put in, or left out, in the prompts of all others.

    Args:
        world (`World`, *optional*): the bundled world whose words they are.
        count (`int`): how many, at most.
    """
    made = [*(_of_world(pairs[0], world, count) if world else []), *_recombined(pairs)]
    return [pair for pair in dict.fromkeys(made) if pair not in pairs][:count]


def _of_world(pair: tuple[str, str], world: World, count: int) -> list[tuple[str, str]]:
    new = " ".join(difference(*pair)[1])
    values = {factor: world.values[factor] for factor in world.scenes}
    brought = [(factor, value) for factor, own in values.items() for value in own if has_phrase(new, value)]
    if not brought:
        return []
    factor, value = max(brought, key=lambda one: len(one[1]))
    made = [(is_open, naming.format(value)) for is_open, naming in world.scenes[factor]]
    choose = random.Random(0)
    for _ in range(20 * count):
        scene = {name: choose.choice(own) for name, own in values.items()}
        before, after = (with_article(world.sentence.format(**scene | own)) for own in ({}, {factor: value}))
        if before != after and not world.remarks(f"{before} {after}"):
            made.append((before, after))
    return made


def _recombined(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The prompts of pairs that bring in the same words, each with what the others of them replace, and with nothing
    in its place."""
    new = difference(*pairs[0])[1]
    alike = [pair for pair in pairs if new and difference(*pair)[1] == new]
    gone = [*dict.fromkeys(" ".join(difference(*pair)[0]) for pair in alike), ""]
    made = []
    for _, after in alike:
        words = after.split()
        start = next(i for i in range(len(words)) if words[i : i + len(new)] == new)
        made += [(with_article(" ".join([*words[:start], old, *words[start + len(new) :]])), after) for old in gone]
    made = [(re.sub(r"\s+", " ", before).strip(" ,"), after) for before, after in made]
    return [(before, after) for before, after in made if before and before != after]


def with_article(prompt: str) -> str:
    """A prompt with `a` or `an` as the next word wants it."""
    return re.sub(r"\ban? (?=(\w))", lambda match: "an " if match[1] in "aeiou" else "a ", prompt)
