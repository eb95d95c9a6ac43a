"""Latents are named after the words that they make."""

import json
import re

import pytest
import torch

from diffusers_rtsae import load_dictionary
from diffusers_rtsae.analysis.exchanged import ExchangedStates
from diffusers_rtsae.analysis.find import top_features
from diffusers_rtsae.analysis.names import name_features
from diffusers_rtsae.analysis.record import record
from diffusers_rtsae.analysis.vocabulary import Exchange, Exchanges
from diffusers_rtsae.dictionary import read_contents, search_names
from diffusers_rtsae.files import read_lines
from diffusers_rtsae.worlds import WORLDS, bundled, load_bundled

CALL = {"num_inference_steps": 6, "guidance_scale": 3.0}
PROMPTS = read_lines(bundled(WORLDS["shapes"].prompts))


@pytest.fixture(scope="module")
def pipe():
    pipe = load_bundled("shapes-sd")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_rtsae(bundled("shapes-rtsae"))
    return pipe


@pytest.fixture(scope="module")
def names(pipe):
    return name_features(pipe, PROMPTS, ["red"], pictures=2, **CALL)


def test_latents_have_the_names_of_what_they_make(names):
    by_index = {name.index: name for name in names}
    assert by_index[1511].name == "red", "which the label `red` moves, too"
    assert by_index[1659].name == "cyan"
    assert all(0.7 <= name.confidence <= 1 and name.effect > 0 for name in names)
    assert names.measured > len(names) and len(names.words) == 8
    assert "1511" in str(names)


def test_names_are_kept_with_the_dictionary_and_shown(pipe, names, tmp_path):
    dictionary = load_dictionary(bundled("shapes-rtsae"), dtype=torch.float32)
    dictionary.names = names.content()
    dictionary.save(tmp_path)
    assert read_contents(tmp_path).names == json.loads((tmp_path / "names.json").read_text()) == names.content()
    loaded = load_dictionary(tmp_path)
    (site,) = loaded.sites
    assert loaded.name_of(site, 1511) == "red" and loaded.name_of(site, 0) is None
    assert "reds" not in str(search_names(loaded)) and search_names(loaded, "reddish")[0][2]["name"] == "red"
    assert "## Names of latents" in (tmp_path / "README.md").read_text()
    pipe.load_rtsae(loaded, "named")
    table = top_features(record(pipe, ["a red star"], "named", **CALL), count=30)
    pipe.delete_rtsae("named")
    made = {feature.index: feature.makes for feature in table}
    assert "red" in made.values() and re.search(r"makes +labels", str(table))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"mid_block": {}}, "names for each site of .*up_blocks.1.attentions.1.*got .*mid_block"),
        ({"up_blocks.1.attentions.1": {"5000": {}}}, "expected latents 0 to 2047 .*5000"),
        ({"up_blocks.1.attentions.1": {"5": {"name": 3}}}, "for latent 5 a string `name`"),
    ],
)
def test_names_that_are_wrong_are_refused(content, said, tmp_path):
    load_dictionary(bundled("shapes-rtsae")).save(tmp_path)
    (tmp_path / "names.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said):
        load_dictionary(tmp_path)


def test_first_order_agrees_with_what_is_measured(pipe):
    changed = [Exchange(0, "red", "a large red star"), Exchange(0, "blue", "a large blue star")]
    states = ExchangedStates(pipe, Exchanges(["a large star"], changed), steps=2, **CALL)
    small = load_dictionary(bundled("shapes-rtsae"), dtype=torch.float32)
    (site,) = small.sites
    added = states.slopes(lambda: None).added[site][states.exchanges.words.index("red")]
    latents = [(site, int(index)) for index in added.abs().topk(3).indices]
    small.sites[site].typical_activation *= 1e-3  # so little is added that first order is all there is
    pipe.load_rtsae(small, "small")
    moved = ExchangedStates(pipe, states.exchanges, "small", steps=2, **CALL).measure(latents, lambda: None)
    pipe.delete_rtsae("small")
    measured = 2e3 * moved.along[:, 0] / moved.between[0, 0]
    torch.testing.assert_close(measured, torch.stack([added[index] for _, index in latents]), rtol=0.05, atol=1e-4)


def test_words_that_change_nothing_are_said(pipe):
    prompts = [f"a red star {nothing}" for nothing in (",", ";", ".")]
    with pytest.raises(ValueError, match="no two words"):
        name_features(pipe, prompts, **CALL)
