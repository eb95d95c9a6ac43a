"""What pairs of prompts differ in, and more pairs that differ in the same. Needs no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from .files import read_lines
from .worlds import World, bundled


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


def _has(prompt: str, phrase: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(phrase.lower())}(?![\w-])", prompt.lower()) is not None


def labels_between(labels: Iterable[str], before: Sequence[str], after: Sequence[str]) -> list[str]:
    """The labels that every prompt of `after` names and none of `before` does."""
    return [
        name
        for name in labels
        if after and all(_has(prompt, name) for prompt in after) and not any(_has(prompt, name) for prompt in before)
    ]


def more_pairs(pairs: Sequence[tuple[str, str]], world: World, count: int) -> list[tuple[str, str]]:
    """
    Pairs that differ in what the first of `pairs` differs in, made of a bundled world's prompts.

    Where the words that it brings in are a value of a factor, another value of that factor is exchanged for it in
    prompts that name one; other words are exchanged where the same ones stand.

    Args:
        count (`int`): how many, at most.
    """
    old, new = (" ".join(words).strip(" ,") for words in difference(*pairs[0]))
    factor = next((values for values in world.values.values() if any(_has(new, v) for v in values)), [])
    value = next((value for value in sorted(factor, key=len, reverse=True) if _has(new, value)), "")
    others, brought = ([v for v in factor if v != value], value) if value else ([old] if old else [], new)
    made: list[tuple[str, str]] = []
    for prompt in read_lines(bundled(world.prompts)):
        named = [other for other in others if len(re.findall(_word(other), prompt)) == 1]
        if len(made) == count or len(named) != 1 or (value and _has(prompt, value)):
            continue
        pair = prompt, _article(re.sub(_word(named[0]), brought, prompt))
        if pair not in pairs and pair not in made:
            made.append(pair)
    return made[:count]


def _word(phrase: str) -> str:
    return rf"(?<![\w-]){re.escape(phrase)}(?![\w-])"


def _article(prompt: str) -> str:
    """A prompt with `a` or `an` as the next word wants it."""
    return re.sub(r"\b(a|an) (?=(\w))", lambda m: "an " if m[2] in "aeiou" else "a ", prompt)
