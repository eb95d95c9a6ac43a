"""The sparse formulation equals the dense one: codes, reconstructions and every gradient."""

import pytest
import torch

from diffusers_rtsae.models import batch_topk as dense_batch_topk
from training.architectures import sparse
from training.architectures.matrix import Gradient, Matrix
from training.architectures.sparse import Code, above, batch_topk, decode, encode, topk

ROWS, D, LATENTS, K = 37, 12, 96, 5


@pytest.fixture(params=range(3))
def problem(request):
    generator = torch.Generator().manual_seed(request.param)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {
        "x": make(ROWS, D),
        "centre": make(D),
        "weight": make(LATENTS, D),
        "bias": make(LATENTS),
        "out": make(LATENTS, D),
    }


def dense(code: Code) -> torch.Tensor:
    return torch.zeros(ROWS, LATENTS, dtype=code.values.dtype).index_put((code.rows, code.latents), code.values)


def whole(gradient: Gradient) -> torch.Tensor:
    return torch.cat([piece for _, piece in gradient.pieces()])


def product(problem) -> torch.Tensor:
    return (problem["x"] - problem["centre"]) @ problem["weight"].T + problem["bias"]


def chosen(rule, problem, *arguments) -> Code:
    centred = (problem["x"] - problem["centre"]).float()
    return rule(centred, problem["weight"].float(), problem["bias"].float(), *arguments)


@pytest.mark.parametrize("piece", [200, 10_000_000])
def test_batch_topk_is_exact(problem, piece, monkeypatch):
    monkeypatch.setattr(sparse, "_PIECE", piece)
    expected = dense_batch_topk(product(problem).float(), K)
    torch.testing.assert_close(dense(chosen(batch_topk, problem, K)), expected)


def test_batch_topk_is_exact_when_one_row_takes_almost_all(problem):
    problem["x"][3] *= 50
    expected = dense_batch_topk(product(problem).float(), K)
    assert (expected[3] > 0).sum() > 4 * K
    torch.testing.assert_close(dense(chosen(batch_topk, problem, K)), expected)


def test_batch_topk_is_exact_when_few_rows_have_any(problem):
    problem["bias"] -= 100
    problem["x"][3] *= 500
    expected = dense_batch_topk(product(problem).float(), K)
    assert 4 * K < (expected > 0).sum() < K * ROWS
    torch.testing.assert_close(dense(chosen(batch_topk, problem, K)), expected, atol=1e-2, rtol=1e-4)


def test_batch_topk_is_exact_when_the_first_rows_mislead(problem, monkeypatch):
    monkeypatch.setattr(sparse, "_PIECE", 2 * LATENTS)
    for factor in (100, 0.01):
        problem["x"][:2] *= factor
        expected = dense_batch_topk(product(problem).float(), K)
        torch.testing.assert_close(dense(chosen(batch_topk, problem, K)), expected, atol=1e-4, rtol=1e-4)


def test_batch_topk_keeps_no_negative_latent(problem):
    problem["bias"] -= 100
    assert len(chosen(batch_topk, problem, K).values) == 0


def test_topk_keeps_the_largest_of_each_row(problem):
    pre = product(problem).float()
    values, indices = pre.topk(K, dim=1)
    torch.testing.assert_close(
        dense(chosen(topk, problem, K)), torch.zeros_like(pre).scatter(1, indices, values.relu())
    )


def test_above_compares_with_each_latents_own_threshold(problem):
    pre, threshold = product(problem).float(), torch.linspace(0, 3, LATENTS)
    torch.testing.assert_close(dense(chosen(above, problem, threshold)), torch.where(pre > threshold, pre, 0.0))


def test_half_precision_is_only_in_the_product(problem):
    code = chosen(batch_topk, problem, K, torch.bfloat16)
    assert code.values.dtype == torch.float32
    exact = product(problem).float()[code.rows, code.latents]
    torch.testing.assert_close(code.values, exact, atol=0.1, rtol=0.03)


def test_every_gradient_is_that_of_the_dense_formulation(problem):
    names = ("x", "centre", "weight", "bias", "out")
    leaves = {name: problem[name].clone().float().requires_grad_() for name in names}
    x, encoder, decoder = leaves["x"], Matrix(leaves["weight"]), Matrix(leaves["out"])
    code = chosen(batch_topk, problem, K)
    code = encode(x - leaves["centre"].detach(), leaves["centre"], encoder, leaves["bias"], code)
    (decode(code, decoder, ROWS) - x).square().sum().backward()

    exact = {name: problem[name].clone().requires_grad_() for name in names}
    pre = (exact["x"] - exact["centre"]) @ exact["weight"].T + exact["bias"]
    latents = pre * (dense_batch_topk(pre, K) > 0)
    (latents @ exact["out"] - exact["x"]).square().sum().backward()
    exact["out"].grad -= (exact["out"].grad * exact["out"]).sum(1, keepdim=True) * exact["out"]
    leaves["weight"].grad, leaves["out"].grad = whole(encoder.gradient()), whole(decoder.gradient())
    for name in names:
        torch.testing.assert_close(leaves[name].grad.double(), exact[name].grad, atol=1e-3, rtol=1e-4, msg=name)


def test_rows_and_latents_without_entries_are_zero():
    code = Code(torch.tensor([2, 2]), torch.tensor([0, 5]), torch.tensor([1.0, 2.0], requires_grad=True))
    matrix = Matrix(torch.eye(6))
    out = decode(code, matrix, 4)
    assert out.tolist() == [[0] * 6, [0] * 6, [1, 0, 0, 0, 0, 2], [0] * 6]
    out.sum().backward()
    gradient = whole(matrix.gradient())
    assert gradient[1].abs().sum() == 0 and gradient[5].tolist() == [2.0] * 5 + [0.0]
