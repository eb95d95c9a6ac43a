import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_rtsae.steering import Edit, as_mask


def edit(**changes):
    return Edit(**({"latents": (0,), "weights": (1.0,), "strength": 1.0} | changes))


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "strong", (), (1.0, float("nan")), None])
def test_strength_must_be_finite(strength):
    with pytest.raises(ValueError, match="finite number"):
        edit(strength=strength)


@pytest.mark.parametrize("name", ["operation", "apply_to", "injection"])
def test_unknown_choices_list_what_exists(name):
    with pytest.raises(ValueError, match=f"`{name}` must be one of"):
        edit(**{name: "sideways"})


@pytest.mark.parametrize(("start", "end"), [(-0.1, 1), (0.6, 0.5), (0, 1.5)])
def test_window_must_be_ordered(start, end):
    with pytest.raises(ValueError, match="start <= end"):
        edit(start=start, end=end)


def test_window_is_in_noise_levels():
    window = edit(start=0.2, end=0.8)
    assert [window.acts_at(t) for t in (900, 800, 500, 200, 100)] == [False, True, True, True, False]


def test_idle_edits():
    assert edit(strength=0.0).is_idle and edit(strength=(0.0, 0.0)).is_idle
    assert edit(operation="scale", strength=1.0).is_idle
    assert not edit(operation="set", strength=0.0).is_idle and not edit(strength=(0.0, 1.0)).is_idle


def test_transfer_and_replace_need_a_source_and_others_have_none():
    for operation in ("transfer", "replace"):
        with pytest.raises(ValueError, match=f"'{operation}' needs a `source` feature"):
            edit(operation=operation)
    with pytest.raises(ValueError, match="`source` is for 'transfer' and 'replace', not for 'add'"):
        edit(source=(1,))
    with pytest.raises(ValueError, match="`source` names no latent of this site"):
        edit(operation="transfer", source=())


def test_schedules():
    for schedule in (torch.tensor([0.0, 1.0, 0.0]), lambda progress: 1 - abs(2 * progress - 1)):
        ramp = edit(strength=schedule)
        assert [ramp.strength_at(t)[0] for t in (1000, 750, 500, 0)] == pytest.approx([0, 0.5, 1, 0])
        assert not ramp.is_idle
    assert edit(strength=torch.tensor([[1.0, 2.0], [3.0, 4.0]])).strength_at(500) == pytest.approx((2.0, 3.0))
    assert edit(strength=torch.tensor([2.0])).strength_at(300) == (2.0,)
    assert edit(strength=torch.zeros(3)).is_idle


def test_schedules_must_give_finite_numbers():
    with pytest.raises(ValueError, match=r"\(steps,\) or \(steps, prompts\)"):
        edit(strength=torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match="The schedule gave nan at progress 0.5"):
        edit(strength=lambda progress: float("nan")).strength_at(500)


def test_masks_of_all_kinds():
    picture = Image.new("L", (8, 4), 255)
    for mask in (picture, np.ones((4, 8)), torch.ones(4, 8), torch.ones(1, 1, 4, 8)):
        assert as_mask(mask).shape == (1, 4, 8) and as_mask(mask).max() == 1
    assert as_mask(np.ones((3, 4, 8), dtype=bool)).shape == (3, 4, 8)


@pytest.mark.parametrize("mask", [np.ones(4), np.ones((2, 3, 4, 5)), np.ones((0, 4))])
def test_mask_shape(mask):
    with pytest.raises(ValueError, match="mask must be"):
        as_mask(mask)


def test_mask_values():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        as_mask(np.full((4, 4), 255))
