import pytest
import torch

from training.worlds.muon import Muon, orthogonalize, split


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 8), (2, 8, 24)])
def test_singular_values_come_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices, steps=8))
    assert values.min() > 0.6 and values.max() < 1.3
    before, after = (torch.linalg.svd(m[0], full_matrices=False) for m in (matrices, orthogonalize(matrices, steps=8)))
    torch.testing.assert_close((before.U @ before.Vh), (after.U @ after.Vh), atol=1e-3, rtol=0)  # the same rotation


def test_layers_are_divided():
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 4), torch.nn.Embedding(2, 4))
    matrices, others = split(module, ("0.", "2."))
    assert [tuple(p.shape) for p in matrices] == [(4, 4)]
    assert {tuple(p.shape) for p in others} == {(4, 3, 3, 3), (4,), (2, 4)}


def test_it_finds_the_map_behind_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=generator)
    goal = x @ torch.randn(8, 4, generator=generator) + 3
    layer = torch.nn.Linear(8, 4)
    optimizer = Muon([layer.weight], [layer.bias], lr=0.1, lr_others=0.1, weight_decay=0.0)
    for step in range(300):
        optimizer.set_rate(1 - step / 300)
        loss = (layer(x) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 / 300, 0.1 / 300])


def test_an_update_is_as_large_as_adams():
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    weight.grad = 1e-3 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    Muon([weight], [], lr=0.01, lr_others=0.01).step()
    assert 0.1 < weight.square().mean().sqrt() / 0.01 < 0.4  # AdamW's is .2 to .4 (Liu et al.)
