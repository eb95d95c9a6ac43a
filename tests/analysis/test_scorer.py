"""Scorers: both architectures read what they were built for, and come back from disk as they were."""

import pytest
import torch

from diffusers_rtsae.analysis.scorer import FactorScorer, shows

FACTORS = {"valid": ["no", "yes"], "left.shape": ["none", "star"], "left.colour": ["red", "blue", "green"]}


@pytest.mark.parametrize("architecture", ["convolution", "attention"])
def test_a_scorer_reads_all_factors_and_comes_back_from_disk(architecture, tmp_path):
    torch.manual_seed(0)
    scorer = FactorScorer(FACTORS, sample_size=32, channels=32, architecture=architecture)
    pictures = torch.rand(3, 3, 32, 32)
    logits = scorer(pictures)
    assert {name: tuple(part.shape) for name, part in logits.items()} == {
        name: (3, len(values)) for name, values in FACTORS.items()
    }
    scorer.save_pretrained(tmp_path)
    again = FactorScorer.from_pretrained(tmp_path)
    assert all(torch.equal(logits[name], part) for name, part in again(pictures).items())
    assert again.read(pictures) == scorer.read(pictures) and set(scorer.read(pictures)[0]) == set(FACTORS)


@pytest.mark.parametrize("architecture", ["convolution", "attention"])
def test_a_scorer_learns_each_factor_by_itself(architecture):
    """Brightness says the colour, and nothing else: only that is learned."""
    torch.manual_seed(0)
    scorer = FactorScorer(FACTORS, sample_size=32, channels=32, architecture=architecture)
    optimizer = torch.optim.Adam(scorer.parameters(), lr=1e-3)
    colour = torch.arange(12) % 3
    pictures = (colour / 2)[:, None, None, None].expand(-1, 3, 32, 32)
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(scorer(pictures)["left.colour"], colour)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (scorer(pictures)["left.colour"].argmax(1) == colour).all()


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="'convolution' or 'attention', got 'mixer'"):
        FactorScorer(FACTORS, architecture="mixer")


def test_shows_wants_every_filled_slot():
    reading = {"valid": "yes", "left.colour": "red", "right.colour": None, "style": "flat"}
    assert shows(reading, "colour", "red") and shows(reading, "style", "flat")
    assert not shows(reading | {"right.colour": "blue"}, "colour", "red")
    assert not shows(reading | {"valid": "no"}, "colour", "red")
    assert not shows(reading | {"left.colour": None}, "colour", "red")
