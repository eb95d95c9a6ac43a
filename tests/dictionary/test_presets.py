"""Named edits travel with a dictionary and steer as what they stand for."""

import json
from dataclasses import replace

import pytest
import torch

from diffusers_rtsae import Dictionary, load_dictionary

SITE = "up_blocks.1.attentions.1"


def with_no_features(pipe):
    pipe.set_rtsae_features({})
    return pipe


@pytest.fixture
def with_presets(dictionary, latent):
    presets = {
        "warm": {"features": [["red", 0.8], [599, 0.5]], "options": {"start": 0.1, "apply_to": "cond"}},
        "local": {"features": [[[SITE, latent("red")], 1.0]], "options": {"where": [SITE, latent("square")]}},
        "moved": {"features": [["red", 1.0]], "options": {"operation": "transfer", "source": "green"}},
    }
    return replace(dictionary, presets=presets)


def test_a_preset_is_the_edit_it_stands_for(pipe, with_presets, draw, latent):
    pipe.load_rtsae(with_presets)
    pipe.set_rtsae_features({"red": 0.8, 599: 0.5}, start=0.1, apply_to="cond")
    expected = draw(pipe)
    pipe.set_rtsae_preset("warm")
    assert (draw(pipe) == expected).all()
    prompt = "a large blue square on the left, flat, on white"
    plain = draw(with_no_features(pipe), prompt)
    pipe.set_rtsae_preset("local")
    local = draw(pipe, prompt)
    pipe.set_rtsae_features({(SITE, latent("red")): 1.0}, where=(SITE, latent("square")))
    assert (draw(pipe, prompt) == local).all() and not (local == plain).all()


def test_presets_are_saved_with_a_dictionary_and_go_with_it(with_presets, tmp_path):
    small = Dictionary(
        {SITE: type(with_presets.sites[SITE])(SITE, 160, [9, 1], 1024, 2)},
        presets={"strong": {"features": [[1000, 2.0]]}},
    )
    small.save(tmp_path)
    assert json.loads((tmp_path / "presets.json").read_text()) == small.presets
    loaded = load_dictionary(tmp_path)
    assert loaded.presets == small.presets and loaded.preset("strong") == ({1000: 2.0}, {})
    loaded.presets = {}
    loaded.save(tmp_path)
    assert not (tmp_path / "presets.json").exists() and load_dictionary(tmp_path).presets == {}


def test_a_source_and_a_place_may_be_preset(pipe, with_presets, draw):
    pipe.load_rtsae(with_presets)
    plain = draw(pipe, "a large green star on the left, flat, on white")
    pipe.set_rtsae_preset("moved")
    moved = draw(pipe, "a large green star on the left, flat, on white")
    assert not (moved == plain).all()
    pipe.set_rtsae_features({"red": 1.0}, operation="transfer", source="green")
    assert torch.equal(torch.tensor(moved), torch.tensor(draw(pipe, "a large green star on the left, flat, on white")))
