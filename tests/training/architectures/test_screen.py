"""The screened product finds the same entries as the whole product in float32."""

import pytest
import torch

from training.architectures import screen
from training.architectures.screen import Screen
from training.architectures.sparse import Code, above, batch_topk, topk

ROWS, D, LATENTS, K = 40, 100, 3000, 6


def factors(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, weights and biases that are hard to round."""
    generator = torch.Generator().manual_seed(0)
    centred, weight = torch.randn(ROWS, D, generator=generator), torch.randn(LATENTS, D, generator=generator)
    bias = torch.randn(LATENTS, generator=generator)
    if case == "long rows":
        centred[::7] *= 300
    elif case == "long weights":
        weight[::5] *= 30
    elif case == "rounded to one side":  # halfway to the next number in bfloat16, all errors of one sign
        centred, weight = (1 + 2**-8 - 2**-12) * centred.sign(), (1 + 2**-8 - 2**-12) * weight.sign()
    elif case == "masked":
        bias[::2], bias[1::4] = torch.finfo(torch.float32).min / 2, -torch.inf
    elif case == "part of the columns":
        centred, weight = torch.randn(ROWS, D, generator=generator), torch.cat([weight, weight], 1)[:, :D]
    elif case == "nothing":
        centred = centred * 0
    return centred, weight, bias


CASES = ["plain", "long rows", "long weights", "rounded to one side", "masked", "part of the columns", "nothing"]


@pytest.fixture
def screened(monkeypatch):
    """Screening on, whatever the processor; and how many products were screened to their end."""
    monkeypatch.setattr(screen, "has_bfloat16_units", lambda: True)
    monkeypatch.setattr(screen, "_LEAST", 1)
    used = []
    for name in ("above", "largest"):
        own = getattr(Screen, name)

        def counted(self, *arguments, own=own):
            found = own(self, *arguments)
            used.append(found is not None)
            return found

        monkeypatch.setattr(Screen, name, counted)
    return used


def without(monkeypatch, rule, *arguments) -> Code:
    with monkeypatch.context() as patch:
        patch.setattr(screen, "has_bfloat16_units", lambda: False)
        return rule(*arguments)


@pytest.mark.parametrize("case", CASES)
def test_no_entry_is_above_its_bound(case):
    centred, weight, bias = factors(case)
    own = Screen(centred, weight, bias, ROWS)
    bounds = (own.rows.double() @ own.latents.double().T).clamp(min=-1e30)
    entries = (centred.double() @ weight.double().T + bias).clamp(min=-1e30)
    assert (bounds >= entries).all()
    real = bias > -1e30
    assert ((bounds - entries)[:, real] <= own.slack[:, None]).all()


@pytest.mark.parametrize("rule", [batch_topk, topk])
@pytest.mark.parametrize("case", CASES)
def test_the_same_latents_are_active(case, rule, screened, monkeypatch):
    code, expected = (f(*factors(case), K) for f in (rule, lambda *a: without(monkeypatch, rule, *a)))
    assert torch.equal(code.rows, expected.rows)
    order, other = (torch.argsort(c.rows * LATENTS + c.latents) for c in (code, expected))
    assert torch.equal(code.latents[order], expected.latents[other])
    torch.testing.assert_close(code.values[order], expected.values[other], rtol=1e-5, atol=1e-4)
    if case == "plain":
        assert screened == [True]


@pytest.mark.parametrize("threshold", [25.0, torch.tensor([25.0]), 25 + torch.linspace(-5, 5, LATENTS)])
def test_there_is_one_threshold_or_one_for_each_latent(threshold, screened, monkeypatch):
    parts = factors("plain")
    code, expected = above(*parts, threshold), without(monkeypatch, above, *parts, threshold)
    assert screened == [True] and len(code.values) > 100
    assert torch.equal(code.rows, expected.rows) and torch.equal(code.latents, expected.latents)


def test_many_entries_are_left_to_the_whole_product(screened):
    parts = factors("plain")
    code = above(*parts, 0.0)
    assert screened == [False]
    assert len(code.values) == (parts[0] @ parts[1].T + parts[2] > 0).sum()


def test_other_dtypes_and_small_products_are_not_screened(monkeypatch):
    monkeypatch.setattr(screen, "has_bfloat16_units", lambda: True)
    rows, weight, narrow = torch.zeros(2, 1000), torch.zeros(500, 1000), torch.zeros(500, 8)
    assert screen.worthwhile(rows, weight, torch.float32)
    assert not screen.worthwhile(rows[:, :8], narrow, torch.float32)
    assert not screen.worthwhile(rows, weight[:0], torch.float32)  # a share without dead latents
    assert not screen.worthwhile(rows, weight, torch.bfloat16)
    assert not screen.worthwhile(rows.to("meta"), weight.to("meta"), torch.float32)


def test_a_threshold_is_guessed_once_also_if_the_whole_product_is_made(screened):
    """Processes guess together."""
    guesses = []
    above(*factors("plain"), lambda piece: guesses.append(0.0) or 0.0)
    assert screened == [False] and guesses == [0.0]
