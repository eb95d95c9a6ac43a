import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_rtsae.steering import Edit, as_mask


def edit(**changes):
    return Edit(**({"latents": (0,), "weights": (1.0,), "strength": 1.0} | changes))


def test_window_is_in_noise_levels():
    window = edit(start=0.2, end=0.8)
    assert [window.acts_at(t) for t in (900, 800, 500, 200, 100)] == [False, True, True, True, False]


def test_idle_edits():
    assert edit(strength=0.0).is_idle and edit(strength=(0.0, 0.0)).is_idle
    assert edit(operation="scale", strength=1.0).is_idle
    assert not edit(operation="set", strength=0.0).is_idle and not edit(strength=(0.0, 1.0)).is_idle


def test_schedules():
    for schedule in (torch.tensor([0.0, 1.0, 0.0]), lambda progress: 1 - abs(2 * progress - 1)):
        ramp = edit(strength=schedule)
        assert [ramp.strength_at(t)[0] for t in (1000, 750, 500, 0)] == pytest.approx([0, 0.5, 1, 0])
        assert not ramp.is_idle
    assert edit(strength=torch.tensor([[1.0, 2.0], [3.0, 4.0]])).strength_at(500) == pytest.approx((2.0, 3.0))
    assert edit(strength=torch.tensor([2.0])).strength_at(300) == (2.0,)
    assert edit(strength=torch.zeros(3)).is_idle


def test_masks_of_all_kinds():
    picture = Image.new("L", (8, 4), 255)
    for mask in (picture, np.ones((4, 8)), torch.ones(4, 8), torch.ones(1, 1, 4, 8)):
        assert as_mask(mask).shape == (1, 4, 8) and as_mask(mask).max() == 1
    assert as_mask(np.ones((3, 4, 8), dtype=bool)).shape == (3, 4, 8)


def test_an_array_that_is_a_picture_is_a_mask():
    mask = np.zeros((6, 8), np.float32)
    mask[:, :4] = 1
    expected = torch.from_numpy(mask)[None]
    pictures = [mask[..., None], np.stack([mask] * 3, -1), np.stack([mask * 255] * 3, -1).astype(np.uint8)]
    for picture in [*pictures, (mask * 255).astype(np.uint8), mask.astype(np.uint8), mask.astype(bool)]:
        assert torch.equal(as_mask(picture), expected)
    assert as_mask(np.stack([mask, mask])).shape == (2, 6, 8)
