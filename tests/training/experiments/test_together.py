"""How maps are added up, which prompts are asked, and how far each half of a picture moves."""

import pytest
import torch

from diffusers_rtsae import RTSAE
from diffusers_rtsae.models import LinearMap, Step
from diffusers_rtsae.steering import Edit, PlanState, SitePlan
from training.experiments.together import PROMPTS, WAYS, adding, described, markdown, moved
from training.worlds import load_world


def test_maps_are_added_up_in_each_way():
    torch.manual_seed(0)
    maps, tokens = [0.3 * torch.randn(2, 2, 2 * 6 + 1) for _ in range(2)], torch.randn(1, 4, 6)
    edits = [Edit(latents=(), weights=(), strength=1.0, map=rows, clip=False, apply_to="cond") for rows in maps]
    one, other = (lambda h, rows=rows: LinearMap(rows)(h, Step(999, 0, None)) for rows in maps)
    alone = one(tokens) + other(tokens)
    length = (one(tokens).square().sum(-1) + other(tokens).square().sum(-1)).sqrt()
    expected = {
        "what the others move": one(tokens + other(tokens)) + other(tokens + one(tokens)),
        "what is there": alone,
        "in turn": one(tokens) + other(tokens + one(tokens)),
        "again": alone + 0.5 * (one(tokens + alone) + other(tokens + alone)),
        "shortened": alone * (length / alone.norm(dim=-1)).clamp(max=1)[..., None],
    }
    assert expected.keys() == WAYS.keys()
    for way, change in expected.items():
        with adding(way):
            plan = SitePlan(RTSAE("mid_block", 6, [999, 1], 8, 2), edits, None)
            torch.testing.assert_close(plan.conditional(PlanState(), tokens, 999, None), change)
            alone_still = SitePlan(RTSAE("mid_block", 6, [999, 1], 8, 2), edits[:1], None)
            torch.testing.assert_close(alone_still.conditional(PlanState(), tokens, 999, None), one(tokens))


def test_prompts_name_what_their_kind_says():
    world = load_world("shapes")
    scene = {
        "shape": "heart",
        "colour": "cyan",
        "size": "small",
        "place": "top",
        "background": "white",
        "style": "flat",
    }
    wanted = {"colour": "red", "size": "large"}
    texts = {kind: described(world, [scene], wanted, kind, 0)[0] for kind in PROMPTS}
    assert "cyan" in texts["contradicting"] and "cyan" not in texts["open"] and "white" in texts["open"]
    assert "heart" in texts["terse"] and "white" not in texts["terse"] and len(texts["terse"].split()) < 6


def test_the_mean_of_each_way_is_weighed_by_its_pictures():
    every = {"what": "two at once", "labels": ["red", "star"], "valid": 1.0}
    rows = [
        every | {"way": way, "prompts": kind, "all": reached, "n": n}
        for way, kind, reached, n in (
            ("what is there", "open", 0.5, 2), ("what is there", "terse", 1.0, 6), ("prompt", "named", 1.0, 2)
        )
    ]  # fmt: skip
    lines = [line.replace("  ", " ") for line in markdown(rows).splitlines()]
    assert any(
        line.startswith("| what is there | 0.50 / 1.00 | 1.00 / 1.00 |") and "0.88 / 1.00 | 8 |" in line
        for line in lines
    )
    assert any(line.startswith("| red + star | 0.88 / 1.00 | 1.00 / 1.00") for line in lines)


def test_halves_are_measured_apart():
    plain = torch.rand(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    images = plain.clone()
    images[..., :4] += 0.5
    images[..., 4:] -= 0.25
    assert moved(images, plain) == pytest.approx((0.5, 0.25), abs=1e-6)


def test_the_mean_of_what_was_painted_is_told():
    rows = [
        {"what": "half painted", "labels": [name], "n": 10, "inside": inside, "outside": 0.25, "valid": 1.0}
        for name, inside in (("dark", 0.5), ("woman", 1.0))
    ]
    assert "| **mean** | 0.75 | 0.25 | 1.00 | 20 |" in markdown(rows)
