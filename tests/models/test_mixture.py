import math

import pytest
import torch
from kinds import random_dictionary

from diffusers_rtsae import MixtureSAE
from diffusers_rtsae.models import Step
from diffusers_rtsae.models.mixture import _variation

D = 6


@pytest.fixture
def sae():
    return random_dictionary("MixtureSAE", "mid_block", D, [900, 100], 24, 4)  # 3 shared, 7 of each of 3 experts


def test_metadata_are_half_turns_and_what_is_not_known_is_zero(sae):
    told = sae.metadata(Step(500, 0.0), 6)
    torch.testing.assert_close(told, torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]]), atol=1e-6, rtol=0)
    told = sae.metadata(Step(250, 0.0, size=(2, 3), guidance=10.0), 6)
    assert told.shape == (6, 8)
    torch.testing.assert_close(told[:, 0], torch.full((6,), math.sin(math.pi / 4)))
    assert len(told[:, 2:4].unique(dim=0)) == 2 and len(told[:, 4:6].unique(dim=0)) == 3
    assert torch.equal(told[0, 2:4], told[2, 2:4]) and torch.equal(told[0, 4:6], told[3, 4:6])  # row by row
    torch.testing.assert_close(told[:, 6], torch.ones(6))
    assert torch.equal(sae.metadata(Step(250, 0.0, size=(2, 3)), 5), sae.metadata(Step(250, 0.0), 5))  # no such grid


def test_two_experts_share_a_token_and_only_their_latents_and_shared_ones_are_active(sae):
    tokens = torch.randn(200, D)
    shares, imbalance = sae.gates(tokens, sae.metadata(Step(500, 0.0), 1))
    assert imbalance is None and (shares[:, 0] == 1).all()
    assert ((shares[:, 1:] > 0).sum(1) == 2).all()
    torch.testing.assert_close(shares[:, 1:].sum(1), torch.ones(200))
    owner = sae.experts(torch.arange(24))
    assert owner.bincount().tolist() == [3, 7, 7, 7]
    active = sae.encode_step(tokens, 500) > 0
    assert not (active & (shares[:, owner] == 0)).any() and active.any(0).sum() > 15


def test_a_reader_routes_by_what_is_known_of_the_step(sae):
    sae.router.weight.data.mul_(10)
    tokens, reader = torch.randn(1, 6, D), sae.reader(list(range(24)), torch.device("cpu"))
    plain = reader.read(reader.begin(), tokens, Step(500, 0.0))
    torch.testing.assert_close(plain, sae.encode_step(tokens, 500), atol=1e-5, rtol=1e-4)
    for known in ({"size": (2, 3)}, {"guidance": 3.0}):
        assert not torch.allclose(reader.read(reader.begin(), tokens, Step(500, 0.0, **known)), plain)


def test_noise_and_balance_are_for_training(sae):
    tokens, told = torch.randn(300, D), sae.metadata(Step(500, 0.0), 1)
    assert torch.equal(sae.gates(tokens, told)[0], sae.gates(tokens, told)[0])
    sae.train()
    (one, balance), (other, _) = sae.gates(tokens, told), sae.gates(tokens, told)
    assert not torch.equal(one, other)
    with torch.no_grad():
        sae.router.bias.copy_(torch.tensor([30.0, 20.0, 0.0]))  # nearly all go to one expert
    assert sae.gates(tokens, told)[1] > 2 * balance > 0
    assert _variation(torch.ones(4, 3)) == 0 < _variation(torch.tensor([[1.0, 0.0], [1.0, 0.5]]))


def test_metadata_may_be_left_out():
    sae = MixtureSAE("mid_block", D, [900, 100], 24, 4, num_experts=3, metadata=["time"])
    assert sae.metadata(Step(500, 0.0, (2, 3), 3.0), 6).shape == (1, 2)
    without = MixtureSAE("mid_block", D, [900, 100], 24, 4, shared_latents=0, num_experts=2, metadata=[])
    assert without.eval().encode_step(torch.randn(5, D), 500).shape == (5, 24)
