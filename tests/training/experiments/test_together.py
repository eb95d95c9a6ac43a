"""How far each half of a picture moves."""

import pytest
import torch

from training.experiments.together import markdown, moved


def test_halves_are_measured_apart():
    plain = torch.rand(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    images = plain.clone()
    images[..., :4] += 0.5
    images[..., 4:] -= 0.25
    assert moved(images, plain) == pytest.approx((0.5, 0.25), abs=1e-6)


def test_the_mean_of_what_was_painted_is_told():
    rows = [
        {"what": "half painted", "labels": [name], "n": 10, "inside": inside, "outside": 0.25, "valid": 1.0}
        for name, inside in (("dark", 0.5), ("woman", 1.0))
    ]
    assert "| **mean** | 0.75 | 0.25 | 1.00 | 20 |" in markdown(rows)
