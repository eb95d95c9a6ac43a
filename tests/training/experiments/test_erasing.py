"""What erasing is judged by."""

import torch

from training.experiments.erase import Artefacts
from training.worlds import load_world


def test_artefacts_are_activations_that_pictures_do_not_have():
    plain = torch.randn(40, 16, 3, 8, generator=torch.Generator().manual_seed(0))
    edits = {"none": plain, "of others": plain.roll(1, 0), "too long": 10 * plain, "one dimension": plain.clone()}
    edits["one dimension"][..., 5] += 100
    found = {}
    for name, values in edits.items():
        after = plain.clone()
        after[:, :4] = values[:, :4]
        found[name] = Artefacts({"site": plain}).figures({"site": plain}, {"site": after})
    assert found["none"] == {"length": None, "dimensions": None, "edited": 0.0}
    assert all(one["edited"] == 0.25 for name, one in found.items() if name != "none")
    assert 0 < found["of others"]["length"] < 0.03 and 0 < found["of others"]["dimensions"] < 0.03
    assert found["too long"]["length"] == 1 and found["too long"]["dimensions"] > 0.5
    assert found["one dimension"]["length"] == 1 and 0.125 < found["one dimension"]["dimensions"] < 0.15


def test_a_picture_is_empty_if_it_shows_the_background_alone():
    world = load_world("shapes")
    scene = world.sample(1, 0, held_out=True)[0] | {"place": "centre", "size": "large"}
    background = torch.rand(3, 64, 1, generator=torch.Generator().manual_seed(0)).expand(3, 64, 64) / 4
    full = torch.where(world.masks([scene], 64) > 0, torch.tensor([0.9, 0.1, 0.1])[:, None, None], background)
    left = background.clone()
    left[0, 2:10, 2:10] = 0.9
    assert world.is_empty(background, scene, full)
    assert not world.is_empty(full, scene, full) and not world.is_empty(left, scene, full)
    assert not world.is_empty(torch.ones(3, 64, 64), scene, full)
