"""The words that prompts can exchange, and prompts that differ in one of them."""

import pytest

from diffusers_rtsae.analysis.vocabulary import Vocabulary
from diffusers_rtsae.files import read_lines
from diffusers_rtsae.worlds import WORLDS, bundled

COLOURS = {"red", "blue", "purple", "cyan", "pink", "orange", "yellow", "green"}
SHAPES = read_lines(bundled(WORLDS["shapes"].prompts))


def group_of(word: str, vocabulary: Vocabulary) -> set[str]:
    return set(next(group for group in vocabulary.groups if word in group))


def test_words_between_the_same_neighbours_form_a_group():
    vocabulary = Vocabulary.of(SHAPES)
    assert group_of("red", vocabulary) == COLOURS
    assert group_of("navy", vocabulary) == {"gray", "white", "navy", "brown", "black"}
    assert {"star", "heart", "triangle"} <= group_of("cross", vocabulary)
    people = Vocabulary.of(read_lines(bundled(WORLDS["people"].prompts)))
    assert group_of("dark", people) == {"dark", "medium-light", "medium", "medium-dark", "yellow", "light"}
    assert "police officer" in group_of("farmer", people), "a phrase that no part can be exchanged in"


def test_each_group_has_pictures_that_leave_its_word_open_and_say_all_others():
    exchanges = Vocabulary.of(SHAPES).exchanges(SHAPES, 3, seed=0)
    of_red = [one for one in exchanges.changed if one.word == "red"]
    assert len(of_red) == 3
    for one in of_red:
        base = exchanges.prompts[one.base]
        assert one.prompt.replace(" red", "").replace("an ", "a ") == base.replace("an ", "a ")
        assert {e.word for e in exchanges.changed if e.base == one.base} == COLOURS
    assert any(one.prompt.startswith("an orange") for one in exchanges.changed), "the article is the next word's"
    again = Vocabulary.of(SHAPES).exchanges(SHAPES, 3, seed=1)
    assert set(again.prompts) != set(exchanges.prompts)


def test_a_word_that_cannot_be_left_out_is_exchanged():
    prompts = [f"a cat in the {place}" for place in ("garden", "kitchen", "street") for _ in range(3)]
    vocabulary = Vocabulary.of(prompts)
    assert vocabulary.groups == [["garden", "kitchen", "street"]]
    exchanges = vocabulary.exchanges(prompts, 1, seed=0)
    assert exchanges.prompts[0] in prompts and len(exchanges.changed) == 2


def test_some_words_bring_what_they_are_exchanged_for():
    assert set(Vocabulary.of(SHAPES, ["red"]).words) == COLOURS


def test_what_cannot_be_exchanged_is_said():
    with pytest.raises(ValueError, match="no two words stand in the same place"):
        Vocabulary.of(["a cat", "some dog under a tree"])
    with pytest.raises(ValueError, match="got 'turquoise'; these do: .*'red'"):
        Vocabulary.of(SHAPES, ["turquoise"])
    with pytest.raises(ValueError, match="'red' in two"):
        Vocabulary([["red", "blue"], ["red", "green"]])
