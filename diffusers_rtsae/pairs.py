"""What pairs of prompts differ in, and more pairs that differ in the same. Needs no torch."""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Iterable, Sequence

from .worlds import World

HELD_OUT_FROM = 8  # pairs, of which on some are held out to judge a fitted feature


def difference(before: str, after: str) -> tuple[list[str], list[str]]:
    """The words of a prompt that another has not, and those that it has instead."""
    one, other = before.split(), after.split()
    opcodes = [
        op for op in difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes() if op[0] != "equal"
    ]
    if not opcodes:
        return [], []
    start, end = opcodes[0], opcodes[-1]
    return one[start[1] : end[2]], other[start[3] : end[4]]


def left_open(before: str, after: str) -> str:
    """The first prompt of a pair without the words that the second has others for."""
    words = before.split()
    gone, _ = difference(before, after)
    if gone and gone[0] in ("a", "an") and len(gone) > 1:  # which is another one before "orange"
        gone = gone[1:]
    start = next((i for i in range(len(words)) if words[i : i + len(gone)] == gone), 0) if gone else 0
    return with_article(" ".join(words[:start] + words[start + len(gone) :]).rstrip(","))


def judgement(measured: dict[str, float], pairs: int) -> tuple[list[tuple[str, str, str]], str]:
    """What a feature fitted to so many pairs was measured to do: rows of name, figure and meaning, and a sentence on
    what it was judged by."""
    meanings = [
        ("Effect", "effect", "of what changing the prompt does; 1 is all of it"),
        ("Lowest effect", "lowest", "on the pair where it is smallest"),
        ("Ceiling", "ceiling", "the most that can be done at this place in the model"),
        ("Harm", "harm", "change of the prompts that were to stay, in the same unit"),
        ("Effect of −1", "effect_away", "of what changing the prompt back does"),
    ]
    rows = [(name, f"{measured[key]:.2f}", meaning) for name, key, meaning in meanings if key in measured]
    if "harm" not in measured:
        rows.append(("Harm", "–", "not measured: no prompts that were to stay"))
    if pairs >= HELD_OUT_FROM:
        return rows, "Judged on pairs of prompts that it was not made from."
    those = "pair" if pairs == 1 else f"{pairs} pairs"
    return rows, (
        f"Judged on the {those} it was made from, with other noise: of fewer than {HELD_OUT_FROM} pairs none is held "
        "out, and it may do less on other prompts."
    )


def has_phrase(prompt: str, phrase: str) -> bool:
    """Whether a prompt has these words, as whole words."""
    return re.search(rf"(?<![\w-]){re.escape(phrase.lower())}(?![\w-])", prompt.lower()) is not None


def labels_between(labels: Iterable[str], before: Sequence[str], after: Sequence[str]) -> list[str]:
    """The labels that every prompt of `after` names and none of `before` does."""
    if not after:
        return []
    everywhere = [name for name in labels if all(has_phrase(prompt, name) for prompt in after)]
    return [name for name in everywhere if not any(has_phrase(prompt, name) for prompt in before)]


def more_pairs(pairs: Sequence[tuple[str, str]], world: World, count: int) -> list[tuple[str, str]]:
    """
    Pairs that bring in the same value of a factor as the first of `pairs`, by the sentences of a bundled world: first
    those that leave the factor open, then those that name another of its values. None if the first pair brings in no
    value that the world has sentences for.

    Args:
        count (`int`): how many, at most.
    """
    new = " ".join(difference(*pairs[0])[1])
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
    return [pair for pair in dict.fromkeys(made) if pair not in pairs][:count]


def with_article(prompt: str) -> str:
    """A prompt with `a` or `an` as the next word wants it."""
    return re.sub(r"\ban? (?=(\w))", lambda match: "an " if match[1] in "aeiou" else "a ", prompt)
