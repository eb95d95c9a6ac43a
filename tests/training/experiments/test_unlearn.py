"""What was found at several sites is removed at each of them."""

from diffusers_rtsae.analysis.find import Feature
from training.experiments.unlearn import entries


def test_latents_are_parts_of_a_label_by_their_site():
    found = [Feature(site, index, 1.0, 1.0, 1.0, 500) for site, index in (("b", 4), ("a", 7), ("b", 2))]
    assert entries(found) == [
        {"site": "b", "latents": [4, 2], "weights": [1.0, 1.0], "where": None},
        {"site": "a", "latents": [7], "weights": [1.0], "where": None},
    ]
