"""Latents are named after the words that they make."""

import json
import re

import pytest
import torch

from diffusers_rtsae import load_dictionary
from diffusers_rtsae.analysis.exchanged import ExchangedStates
from diffusers_rtsae.analysis.find import top_features
from diffusers_rtsae.analysis.looks import LOOKS, Looks, measure_looks
from diffusers_rtsae.analysis.names import name_features
from diffusers_rtsae.analysis.plots import plot_presence
from diffusers_rtsae.analysis.record import record
from diffusers_rtsae.analysis.vocabulary import Exchange, Exchanges, whole_words
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
    recording = record(pipe, ["a red star"], "named", **CALL)
    table = top_features(recording, count=30)
    (legend,) = plot_presence(recording, [1511]).axes[0].get_legend().get_texts()
    assert legend.get_text() == "1511 (red)"
    pipe.delete_rtsae("named")
    made = {feature.index: feature.makes for feature in table}
    assert "red" in made.values() and re.search(r"makes +labels", str(table))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"mid_block": {}}, "names for each site of .*up_blocks.1.attentions.1.*got .*mid_block"),
        ({"up_blocks.1.attentions.1": {"5000": {}}}, "expected latents 0 to 2047 .*5000"),
        ({"up_blocks.1.attentions.1": {"5": {"name": 3}}}, "for latent 5 a string `name`"),
        (
            {"up_blocks.1.attentions.1": {"5": {"name": "red", "effect": 1, "confidence": 1, "by": "eye"}}},
            '"word" or "look" as `by`',
        ),
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


def test_looks_are_measured_on_pictures_that_have_them():
    dark = torch.zeros(1, 3, 32, 32)
    left, right, large = (dark.clone() for _ in range(3))
    left[:, :, 12:20, 6:14] = right[:, :, 12:20, 18:26] = large[:, :, 8:24, 8:24] = 1.0
    higher, red = left.roll(-4, 2), left * torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
    values = measure_looks(torch.cat([dark, left, right, large, higher, red, 1 - left])).T.tolist()
    of = dict(zip(LOOKS, values, strict=True))
    assert of["side"][1] < 0.35 < 0.65 < of["side"][2] and of["side"][1] == pytest.approx(of["side"][4], abs=1e-3)
    assert of["height"][4] - of["height"][1] == pytest.approx(4 / 31, abs=0.01)
    assert of["brightness"][3] > of["brightness"][1] > of["brightness"][0] == 0
    assert of["contrast"][3] > of["contrast"][1] > of["contrast"][0]
    assert of["warmth"][5] == of["saturation"][5] > 0 == of["saturation"][1]
    assert of["background"][6] == pytest.approx(1) and of["background"][1] == 0


def test_first_order_says_how_a_change_of_the_prediction_looks(pipe):
    states = ExchangedStates(pipe, Exchanges(["a red star", "a large blue heart"], []), steps=2, **CALL)
    call = states._batches[0].calls[-1]
    rows = range(call.rows)
    plain = call.replay(rows, rows).float().detach()
    looks = Looks(pipe, [call])
    gradients = looks.gradients(call, plain)
    assert gradients.shape == (len(LOOKS), *plain.shape)
    change = 1e-2 * torch.randn(plain.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        moved = (looks._measure(call, plain + change) - looks._measure(call, plain - change)) / 2 / looks._units
    said = (gradients * change).flatten(2).sum(2).T
    torch.testing.assert_close(said, moved, rtol=0.1, atol=2e-3)


def test_what_no_word_says_is_told_of_pictures(names):
    looks = [name for name in names if name.by == "look"]
    assert looks and {name.name for name in looks} <= {one for both in LOOKS.values() for one in both}
    assert all(0 <= number <= 1 for name in names for number in name.place)


def test_without_prompts_words_are_those_of_the_tokenizer(pipe):
    assert {"red", "star", "large"} <= set(whole_words(pipe.tokenizer))
    names = name_features(pipe, None, ["red", "blue", "small", "large"], pictures=1, **CALL)
    assert names.words == ["blue", "large", "red", "small"] and {"red", "blue"} & {name.name for name in names}
    with pytest.raises(ValueError, match=r"Expected prompts, or two words .*\['red'\]"):
        name_features(pipe, None, ["red"], **CALL)


def test_words_that_change_nothing_are_said(pipe):
    prompts = [f"a red star {nothing}" for nothing in (",", ";", ".")]
    with pytest.raises(ValueError, match="no two words"):
        name_features(pipe, prompts, **CALL)
