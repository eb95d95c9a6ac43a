"""Captions of scenes: a small grammar with paraphrases, in which attributes may be left out.

`caption` says which factors it names, so that a prompt's promises can be checked against the picture.
"""

from __future__ import annotations

import random

from .scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, STYLES, Scenes

WORDS = {
    "size": {"small": ("small", "little", "tiny"), "large": ("large", "big")},
    "place": {
        "left": ("on the left", "at the left side"),
        "right": ("on the right", "at the right side"),
        "top": ("at the top", "in the upper part"),
        "bottom": ("at the bottom", "in the lower part"),
        "centre": ("in the centre", "in the middle"),
    },
    "style": {
        "flat": ("flat", "in plain flat style", "plain"),
        "outline": ("outlined", "in outline", "as an outline"),
        "striped": ("striped", "with stripes"),
        "dotted": ("dotted", "with dots"),
        "gradient": ("with a soft gradient", "softly shaded"),
    },
    "background": {b: (f"on a {b} background", f"on {b}", f"against a {b} background") for b in BACKGROUNDS},
}
ANYTHING = ("object", "shape", "thing")  # the noun when the shape is left open
RELATIONS = {
    "left": ("on the left of", "to the left of"),
    "right": ("on the right of", "to the right of"),
    "top": ("above", "over"),
    "bottom": ("below", "under"),
}
PREFIXES = ("", "", "", "a picture of ", "an image of ")
NAMES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "place": tuple(PLACES)}


def _noun_phrase(scenes: Scenes, index: int, which: int, named: set[str], rng: random.Random) -> str:
    words = []
    if "size" in named:
        words.append(rng.choice(WORDS["size"][NAMES["size"][scenes.size[index, which]]]))
    if "colour" in named:
        words.append(NAMES["colour"][scenes.colour[index, which]])
    words.append(SHAPES[scenes.shape[index, which]] if "shape" in named else rng.choice(ANYTHING))
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def caption(
    scenes: Scenes, index: int, rng: random.Random, naming: dict[str, float] | None = None
) -> tuple[str, list[set[str]], set[str]]:
    """Describe scene `index`.

    Args:
        naming (`dict[str, float]`, *optional*): probability that a factor is named; 0 leaves it open, 1 always names
        it.

    Returns:
        the text, the factors it names of each object, and the global factors it names.
    """
    chance = {"shape": 0.85, "colour": 0.7, "size": 0.5, "place": 0.8, "background": 0.7, "style": 0.7} | (
        naming or {}
    )
    count = int(scenes.count[index])
    objects = [{f for f in ("shape", "colour", "size") if rng.random() < chance[f]} for _ in range(count)]
    world = {f for f in ("background", "style") if rng.random() < chance[f]}
    with_place = rng.random() < chance["place"]
    phrases = [_noun_phrase(scenes, index, i, objects[i], rng) for i in range(count)]
    place = NAMES["place"][scenes.place[index, 0]]
    if count == 2:
        text = f"{phrases[0]} {rng.choice(RELATIONS[place])} {phrases[1]}" if with_place else " and ".join(phrases)
    else:
        text = f"{phrases[0]} {rng.choice(WORDS['place'][place])}" if with_place else phrases[0]
    tails = []
    if "style" in world:
        tails.append(rng.choice(WORDS["style"][STYLES[scenes.style[index]]]))
    if "background" in world:
        tails.append(rng.choice(WORDS["background"][tuple(BACKGROUNDS)[scenes.background[index]]]))
    rng.shuffle(tails)
    if with_place:
        for named in objects:
            named.add("place")
    return rng.choice(PREFIXES) + ", ".join([text, *tails]), objects, world


def captions(scenes: Scenes, seed: int, naming: dict[str, float] | None = None) -> list[str]:
    """One caption for every scene, reproducible from `seed`."""
    rng = random.Random(seed)
    return [caption(scenes, i, rng, naming)[0] for i in range(len(scenes))]
