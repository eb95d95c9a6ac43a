"""How right names are is read from what a scorer sees, and from the world's words."""

from diffusers_rtsae.analysis.looks import LOOKS
from training.experiments import looks
from training.experiments.looks import direction, right
from training.experiments.names import markdown, open_pairs, values_of_words
from training.worlds import load_world


def test_words_say_the_value_that_they_always_stand_with():
    said = values_of_words(load_world("shapes"), ["red", "big", "plain", "softly shaded", "on", "picture", "nonsense"])
    expected = {"red": "colour: red", "big": "size: large", "plain": "style: flat", "softly shaded": "style: gradient"}
    assert said == expected


def test_pairs_leave_one_factor_open_and_name_each_of_its_values():
    world = load_world("shapes")
    pairs = open_pairs(world, 2, seed=1)
    assert len(pairs.prompts) == 2 * len(world.steered)
    red = [one for one in pairs.changed if one.word == "colour: red"]
    assert len(red) == 2 and all(one.prompt.replace(" red", "") == pairs.prompts[one.base] for one in red)


def test_names_are_right_if_they_say_something_that_the_latent_makes():
    rows = [
        {"latent": 1, "name": "red", "named": "colour: red", "confidence": 0.95, "makes": ["colour: red"]},
        {"latent": 2, "name": "blue", "named": "colour: blue", "confidence": 0.75, "makes": ["shape: star"]},
        {"latent": 3, "name": None, "named": None, "confidence": 0.0, "makes": ["shape: star"]},
        {"latent": 4, "name": "big", "named": "size: large", "confidence": 0.99, "makes": []},
    ]
    rows = [row | {"presence": "shape: star", "label": ""} for row in rows]
    table = markdown(rows)
    assert "Of 4 latents 3 make a value." in table
    assert "| name, confidence ≥ 0.9 | 0.33 | 1.00 |" in table
    assert "| name, confidence ≥ 0.7 | 0.67 | 0.50 |" in table
    assert "| by presence | 1.00 | 0.67 |" in table
    assert "| most similar label | 0.00 | 0.00 |" in table


def test_a_look_is_right_if_pictures_change_so():
    changed = {look: [0.0, 0.01] for look in LOOKS} | {"brightness": [-0.3, 0.1], "warmth": [0.5, 0.1]}
    assert direction("darker") == ("brightness", -1) and direction("cooler colours") == ("warmth", -1)
    assert [right(changed, name) for name in ("darker", "brighter", "warmer colours", "higher")] == [
        (True, False), (False, False), (True, True), (False, False),
    ]  # fmt: skip
    row = {"latent": 1, "name": "warmer colours", "effect": 0.4, "changed": changed, "valid": 1.0}
    table = looks.markdown([row, row | {"name": "higher", "latent": 2}])
    assert "| all latents | 2 | 0.50 | 0.50 | 0.50 | 0.50 |" in table and "| 2 | higher |" in table
