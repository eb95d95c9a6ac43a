"""
Which guidance branch the text is of that a text encoder is called with, by the variables of the functions around the
call: pipelines keep the negative text, or its numbers, in a variable that says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch

from .rows import is_negative

_PROMPT = re.compile(r"(prompt|text|caption)s?(_\d)?")  # a variable for what is to be encoded, or for the prompt
_OTHER = ("safety", "source", "edit")  # parts of names of texts that are encoded beside a prompt, if there is one

Words = frozenset[str]  # texts, none twice; pipelines change case and spaces before they encode


@dataclass
class Encoded:
    """The calls of a text encoder so far in a generation."""

    counts: dict[str, int] = field(default_factory=dict)  # by role
    known: list[torch.Tensor] = field(default_factory=list)  # the conditional ones

    def next(self, text: torch.Tensor, scopes: list[dict[str, Any]]) -> tuple[str, int]:
        """The role of the next call, a key of `rows.ROLES`, and its number among those of that role; for the negative
        text no more than the conditional ones.

        Args:
            text (`torch.Tensor`): numbers of tokens `(rows, tokens)`, or what else the encoder is called with.
            scopes (`list[dict]`): see [`find_scopes`]; if there are none, the text is no prompt.

        Raises:
            `ValueError`: the rows are of several branches.
        """
        role = _role(text, scopes, self.known) if scopes else "other"
        number = self.counts.get(role, 0)
        self.counts[role] = number + 1
        if role == "cond":
            self.known.append(text)
        return role, min(number, max(self.counts.get("cond", 1) - 1, 0)) if role == "uncond" else number


def _role(text: torch.Tensor, scopes: list[dict[str, Any]], known: list[torch.Tensor]) -> str:
    """The role of a text: that which the innermost variable says that has it. Where the prompt and the negative one
    are the same, the prompt comes first."""
    spoken: Words = frozenset()
    for scope in scopes:
        words = {name: one for name, value in scope.items() if (one := _words(value))}
        marked = {name: one for name, one in words.items() if _mark(name)}
        prompts = [one for name, one in words.items() if _PROMPT.fullmatch(name)]
        named = {name for name in scope if _mark(name) or "prompt" in name}
        found = {_mark(name) for name in named if _holds(scope[name], text)}
        if spoken:
            found |= {_mark(name) for name, one in marked.items() if one == spoken}
            found |= {""} if spoken in prompts else set()
            if not found:
                found = _within(spoken, marked, prompts)
        elif not marked and prompts:  # a function for any text
            spoken = prompts[0]
        if found - {""}:
            role = min(found - {""})
            is_first = "" in found and not any(_same(text, other) for other in known)
            return "cond" if is_first or role == "other" and not known else role
    return "cond"


def _within(spoken: Words, marked: dict[str, Words], prompts: list[Words]) -> set[str]:
    """The roles of the texts that are parts of what is spoken, as of a filled in template: those of the longest."""
    has_prompt = [any(one in said for texts in prompts for one in texts if one) for said in spoken]
    negatives = {one for texts in marked.values() for one in texts}
    others = [said for said, has in zip(spoken, has_prompt, strict=True) if not has]
    if any(has_prompt) and any(one == said or one and one in said for said in others for one in negatives):
        raise ValueError("A pipeline encodes the prompt and the negative one in one call, which cannot be followed.")
    if prompts and spoken == {""} != prompts[0]:
        return {"uncond"}  # the empty text may be in no variable
    known = [*((_mark(name), texts) for name, texts in marked.items()), *(("", texts) for texts in prompts)]
    parts = [
        (min(max((len(one) for one in texts if one in said), default=-1) for said in spoken), role)
        for role, texts in known
    ]
    longest = max(parts, default=(-1, ""))[0]
    return {role for length, role in parts if length == longest >= 0}


def _mark(name: str) -> str:
    """The role that the name of a variable says; empty for a prompt."""
    if is_negative(name):
        return "uncond"
    return "other" if any(word in name for word in _OTHER) else ""


def _words(value) -> Words:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(one, str) for one in texts):
        return frozenset()
    return frozenset(" ".join(one.lower().split()) for one in texts)


def _holds(value, text: torch.Tensor) -> bool:
    """Whether a variable has the numbers of a text: the same, or longer ones of which it is a window, whose first and
    last number mark its start and end."""
    value = getattr(value, "input_ids", value)
    if not torch.is_tensor(value) or not torch.is_tensor(text) or value.ndim != 2 or value.dtype != text.dtype:
        return False
    if len(value) != len(text) or value.is_floating_point():
        return False
    count = text.shape[1]
    if value.shape[1] <= count:
        return _same(value, text)
    inner = text[:, 1:-1].to(value.device)
    return any(torch.equal(value[:, i : i + count][:, 1:-1], inner) for i in range(value.shape[1] - count + 1))


def _same(one, other) -> bool:
    return (
        torch.is_tensor(one)
        and torch.is_tensor(other)
        and one.shape == other.shape
        and torch.equal(one, other.to(one))
    )
