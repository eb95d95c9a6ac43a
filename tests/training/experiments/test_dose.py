"""How even the way between two pictures is."""

import pytest
import torch

from training.experiments.dose import jump


def test_a_jump_is_the_largest_part_of_the_way():
    start, end = torch.rand(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    even = [torch.lerp(start, end, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert jump(even) == pytest.approx(0.25, abs=1e-3)
    assert jump([start, start, start, end, end]) == pytest.approx(1)
    mixed = [torch.lerp(start, end, share) for share in (0.0, 0.1, 0.7, 0.8, 1.0)]
    assert jump(mixed) == pytest.approx(0.6, abs=1e-3)
    assert jump([start[:0]] * 5) is None
