"""Captions of people: a small grammar with paraphrases, in which factors may be left out.

`caption` says which factors it names, so that a prompt's promises can be checked against the picture.
"""

from __future__ import annotations

import random

from .scenes import FACTORS, People

#: how roles are said that are not nouns: after "a woman", "someone"; the others are nouns, as in "a woman firefighter"
PHRASES = {
    "portrait": "in a portrait", "red hair": "with red hair", "curly hair": "with curly hair", "bald": "who is bald",
    "white hair": "with white hair", "blond hair": "with blond hair", "beard": "with a beard", "cap": "with a cap",
    "crown": "with a crown", "headscarf": "with a headscarf", "tuxedo": "in a tuxedo", "turban": "with a turban",
    "veil": "with a veil", "bowing": "bowing", "deaf": "who is deaf", "facepalming": "facepalming",
    "frowning": "frowning", "gesturing no": "gesturing no", "gesturing ok": "gesturing ok", "pouting": "pouting",
    "raising a hand": "raising a hand", "shrugging": "shrugging", "tipping a hand": "tipping a hand",
    "bathing": "taking a bath", "biking": "biking", "bouncing a ball": "bouncing a ball",
    "cartwheeling": "cartwheeling", "climbing": "climbing", "dancing": "dancing", "feeding a baby": "feeding a baby",
    "golfing": "golfing", "haircut": "getting a haircut", "handball": "playing handball",
    "horse racing": "horse racing", "in bed": "in bed", "juggling": "juggling", "kneeling": "kneeling",
    "levitating": "levitating", "lifting weights": "lifting weights", "lotus position": "in lotus position",
    "massage": "getting a massage", "mountain biking": "mountain biking", "pregnant": "who is pregnant",
    "rowing": "rowing a boat", "running": "running", "snowboarding": "snowboarding", "standing": "standing",
    "steam room": "in a steam room", "surfing": "surfing", "swimming": "swimming", "walking": "walking",
    "water polo": "playing water polo", "wheelchair": "in a manual wheelchair",
    "motorized wheelchair": "in a motorized wheelchair", "white cane": "with a white cane",
}  # fmt: skip
#: nouns that say who as well
NOUNS = {
    ("child", "woman"): "girl", ("child", "man"): "boy", ("older adult", "woman"): "older woman",
    ("older adult", "man"): "older man",
}  # fmt: skip
WHO = {"woman": "woman", "man": "man", "person": "gender-neutral"}  # before a noun
TONE = ("with {} skin", "with {} skin tone")
STYLE = ("in {} style", "drawn by {}", "in the style of {}")
PREFIXES = ("", "", "", "a picture of ", "an emoji of ")


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def subject(role: str | None, who: str | None) -> str:
    """Who is drawn doing what; `None` leaves a factor open."""
    if role is not None and role not in PHRASES:
        if who is None:
            return article(role)
        return article(NOUNS.get((role, who)) or f"{WHO[who]} {role}")
    person = article(who) if who else "someone"
    return f"{person} {PHRASES[role]}" if role else person


def caption(
    people: People, index: int, rng: random.Random, naming: dict[str, float] | None = None
) -> tuple[str, set[str]]:
    """Describe person `index`.

    Args:
        naming (`dict[str, float]`, *optional*): probability that a factor is named, 0.85 if not given; 0 leaves it
            open, 1 always names it.

    Returns:
        the text and the factors it names.
    """
    chance = dict.fromkeys(FACTORS, 0.85) | (naming or {})
    values = people.values(index)
    named = {name for name in FACTORS if rng.random() < chance[name] and name in values}
    words = {name: values[name] if name in named else None for name in FACTORS}
    parts = [subject(words["role"], words["who"])]
    if words["tone"]:
        parts.append(rng.choice(TONE).format(words["tone"]))
    if words["style"]:
        parts.append(rng.choice(STYLE).format(words["style"]))
    return rng.choice(PREFIXES) + rng.choice((" ", ", ")).join(parts), named


def captions(people: People, seed: int, naming: dict[str, float] | None = None) -> list[str]:
    """One caption for every person, reproducible from `seed`."""
    rng = random.Random(seed)
    return [caption(people, i, rng, naming)[0] for i in range(len(people))]
