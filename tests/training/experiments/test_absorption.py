"""Absorption is found where it was built in, and nowhere else."""

import pytest
import torch

from training.experiments.absorption import absorption, value_direction

D, HEART, RED, BLUE, SMALL = 12, 0, 1, 2, 3


def scenes(count: int = 2000):
    """Tokens that are sums of a colour and perhaps a shape, `(tokens, D)`, and which are red, hearts, small."""
    generator = torch.Generator().manual_seed(0)
    red, heart, small = (torch.rand(3, count, generator=generator) < torch.tensor([[0.5], [0.3], [0.5]])).unbind()
    basis = torch.eye(D)
    tokens = torch.where(red[:, None], basis[RED], basis[BLUE]) + heart[:, None] * basis[HEART]
    tokens = tokens + small[:, None] * basis[SMALL] + 0.05 * torch.randn(count, D, generator=generator)
    return tokens, red, heart, small, torch.arange(count) % 2 == 0


def latents(*of: torch.Tensor) -> torch.Tensor:
    return torch.stack(of, 1).float()


def test_a_latent_of_its_own_for_each_factor_absorbs_nothing():
    tokens, red, heart, small, chosen = scenes()
    found = absorption(tokens, latents(red, ~red, heart, small), torch.eye(D)[[RED, BLUE, HEART, SMALL]], red, chosen)
    assert found.rate == 0 and found.main == [0] and found.f1 == 1 and not found.absorbing


def test_small_red_hearts_that_silence_red_are_absorption():
    tokens, red, heart, small, chosen = scenes()
    special = red & heart & small & (torch.arange(len(red)) % 3 > 0)
    carrying = torch.nn.functional.normalize(torch.eye(D)[[RED, HEART, SMALL]].sum(0), dim=0)
    directions = torch.cat([torch.eye(D)[[RED, BLUE, HEART, SMALL]], carrying[None]])

    def found(special, carried: float):
        codes = latents(red & ~special, ~red, heart & ~special, small & ~special, carried * special)
        return absorption(tokens, codes, directions, red, chosen)

    rare = special & (torch.arange(len(red)) % 7 < 3)
    absorbed = found(rare, 1.7)
    assert absorbed.main == [0] and absorbed.absorbing == [4]
    assert absorbed.rate == pytest.approx(float((rare & ~chosen).sum() / (red & ~chosen).sum())) and absorbed.rate > 0
    assert found(rare, 0.2).rate == 0  # it adds next to nothing of red
    common = found(red & heart, 1.7)  # one that is as common stands for red as well
    assert common.main == [0, 4] and common.rate == 0


def test_the_probe_is_the_direction_of_the_value():
    tokens, red, *_ = scenes()
    expected = torch.nn.functional.normalize(torch.eye(D)[RED] - torch.eye(D)[BLUE], dim=0)
    assert value_direction(tokens, red) @ expected > 0.99


def test_a_value_that_is_on_one_side_only_is_said():
    tokens, red, heart, small, chosen = scenes()
    with pytest.raises(ValueError, match="Expected tokens that show the value and others that do not"):
        absorption(tokens, latents(red), torch.eye(D)[[RED]], red & chosen, chosen)
