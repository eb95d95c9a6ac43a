"""Other ways to say a role or a style of the world of people, each of which the tokenizer sees as other tokens."""

from __future__ import annotations

from .. import Scene
from .captions import PHRASES, article, subject

#: for each concept a synonym, and a word of another language
OTHER_WORDS = {
    "noto": ("google", "android"), "twemoji": ("twitter", "tuitero"), "fluent": ("microsoft", "flüssig"),
    "astronaut": ("cosmonaut", "astronauta"), "cook": ("chef", "cuisinier"), "firefighter": ("fireman", "pompier"),
    "guard": ("sentinel", "garde"), "judge": ("magistrate", "juez"), "mage": ("wizard", "zauberer"),
    "police officer": ("cop", "policier"), "superhero": ("hero", "superheld"),
    "supervillain": ("archenemy", "superschurke"), "surfing": ("riding a wave", "surfen"),
    "teacher": ("schoolmaster", "lehrer"), "vampire": ("bloodsucker", "vampiro"),
}  # fmt: skip
KINDS = ("known words, otherwise", "misspelt", "other words")


def plain(scene: Scene) -> str:
    """A prompt that says all factors of a scene plainly."""
    return f"{subject(scene['role'], scene['who'])} with {scene['tone']} skin in {scene['style']} style"


def rewordings(scene: Scene, factor: str) -> list[tuple[str, str]]:
    """Ten prompts that say the same, above all the value of `factor`, each with its kind of `KINDS`."""
    word, role, who = scene[factor], scene["role"], scene["who"]
    tone, style, said = scene["tone"], scene["style"], plain(scene)
    acting = PHRASES.get(role, f"as {article(role)}")
    otherwise = [
        f"in {style} style, with {tone} skin, {subject(role, who)}",
        f"{style}, {tone} skin, {who}, {role}",
        f"{word}, {word}, {word}: {subject(role, who)} by {style}",
        f"an emoji of someone {acting}, {who}, {tone} skin tone, drawn by {style}",
        f"the picture by {style} of {subject(role, None)} who is {article(who)}",
    ]
    swapped = word[:-2] + word[-1] + word[-2]
    misspelt = [said.replace(word, wrong) for wrong in (word + word[-1], swapped, word[:-1])]
    others = [said.replace(word, other) for other in OTHER_WORDS[word]]
    groups = zip(KINDS, (otherwise, misspelt, others), strict=True)
    return [(kind, prompt) for kind, prompts in groups for prompt in prompts]
