import torch

from diffusers_rtsae.models import batch_topk, jump_relu


def test_batch_topk_keeps_the_largest_of_the_batch_not_of_each_row():
    pre = torch.tensor([[5.0, 4.0, 3.0], [1.0, 0.5, -1.0]])
    assert batch_topk(pre, 1).tolist() == [[5.0, 4.0, 0.0], [0.0, 0.0, 0.0]]


def test_batch_topk_never_keeps_negative_values():
    assert (batch_topk(torch.tensor([[-1.0, -2.0]]), 2) == 0).all()


def test_batch_topk_passes_gradients_only_to_kept_entries():
    pre = torch.tensor([[2.0, 1.0]], requires_grad=True)
    batch_topk(pre, 1).sum().backward()
    assert pre.grad.tolist() == [[1.0, 0.0]]


def test_jump_relu_keeps_the_value_above_and_nothing_at_the_threshold():
    pre = torch.tensor([0.5, 1.0, 1.5, -3.0])
    assert jump_relu(pre, torch.tensor(1.0)).tolist() == [0.0, 0.0, 1.5, 0.0]


def test_jump_relu_with_negative_threshold_is_never_negative():
    assert (jump_relu(torch.tensor([-0.5, -0.1]), -1.0) == 0).all()
