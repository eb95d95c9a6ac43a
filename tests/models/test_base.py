"""What holds for dictionaries of every kind."""

import operator

import pytest
import torch
from kinds import MADE, OTHERS, random_dictionary

from diffusers_rtsae import Dictionary, SparseDictionary, load_dictionary
from diffusers_rtsae.models import KINDS, Step

ANCHORS, D, M = [900, 500, 100], 6, 24


@pytest.fixture(params=MADE)
def sae(request):
    return random_dictionary(request.param, "mid_block", D, ANCHORS, M, 4)


def trajectories(count: int = 20) -> torch.Tensor:
    return torch.randn(count, 3, D, generator=torch.Generator().manual_seed(1))


def test_a_configuration_names_its_kind(sae, tmp_path):
    sae.save_pretrained(tmp_path)
    kind = KINDS[SparseDictionary.load_config(tmp_path)["_class_name"]]
    assert kind is type(sae) and kind.summary
    torch.testing.assert_close(kind.from_pretrained(tmp_path).encode(trajectories()), sae.encode(trajectories()))


def test_a_folder_and_its_card_say_what_it_is(sae, tmp_path):
    for name in sae.matrices:  # kept in half precision, in which a latent near its threshold may be another's
        matrix = operator.attrgetter(name)(sae)  # a parameter or a buffer
        matrix.data = matrix.half().float()
    Dictionary({"mid_block": sae}).save(tmp_path)
    again = load_dictionary(tmp_path).sites["mid_block"]
    assert type(again) is type(sae)
    torch.testing.assert_close(again.encode(trajectories()), sae.encode(trajectories()))
    card = (tmp_path / "README.md").read_text()
    assert f"| mid_block | {type(sae).__name__} | 6 | 24 | 4 | 900, 500, 100 | output |" in card
    assert f"**{type(sae).__name__}.** {sae.summary}" in card


def test_a_code_knows_nothing_of_later_anchors(sae):
    h = trajectories()
    changed = h.clone()
    changed[:, 2] = 0
    assert torch.equal(sae.encode(h[:, :2]), sae.encode(changed[:, :2]))
    assert not torch.equal(sae.encode(h), sae.encode(changed))


def test_codes_are_sparse_and_not_negative(sae):
    for code in sae.codes(trajectories()):
        assert (code >= 0).all() and 0 < (code > 0).float().mean() < 0.7
        if sae.config.get("sparsity") == "topk":
            assert ((code > 0).sum(1) <= 4).all() and ((code > 0).sum(1) == 4).any()


def test_some_latents_are_read_as_the_whole_code_has_them(sae):
    h, rows = trajectories().unflatten(0, (4, 5)), [7, 3, 20, 11]
    reader = sae.reader(rows, torch.device("cpu"))
    memory = reader.begin()
    for g, timestep in enumerate(ANCHORS):
        read = reader.read(memory, h[:, :, g], Step(timestep, g))
        memory.continue_with(h[:, :, g])
        whole = torch.stack([sae.encode(picture[:, : g + 1]) for picture in h])
        torch.testing.assert_close(read, whole[..., rows], atol=1e-4, rtol=1e-4)


def test_nothing_may_be_read(sae):
    reader = sae.reader([], torch.device("cpu"))
    assert reader.read(reader.begin(), torch.zeros(1, 2, D), Step(900, 0)).shape == (1, 2, 0)


def test_a_reader_does_not_depend_on_the_precision_of_the_rows_or_on_pieces(sae, monkeypatch):
    monkeypatch.setattr("diffusers_rtsae.models.sae._PIECE", 3 * M)
    h, reader = trajectories(), sae.reader([2, 5], torch.device("cpu"))
    read = reader.read(reader.begin(), h[None, :, 0].half(), Step(900, 0))
    torch.testing.assert_close(read[0], sae.encode(h[:, :1].half())[:, [2, 5]], atol=1e-4, rtol=1e-4)


def test_directions_at_the_anchors_are_feature_trajectories(sae):
    directions = sae.directions([4, 9])
    for g, timestep in enumerate(ANCHORS):
        torch.testing.assert_close(directions.at(Step(timestep, g)), sae.feature_trajectories([4, 9])[:, g])
    assert sae.feature_trajectories().shape == (M, 3, D) and sae.spread.shape == (3,)
    assert sae.feature_times([1]).length.shape == (1, 3)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("timestep", [950, 613.5, 1])
def test_a_direction_is_what_one_more_unit_of_a_latent_adds_at_any_step(kind, timestep):
    sae = random_dictionary(kind, "mid_block", D, ANCHORS, M, 4)
    latents = sae.encode_step(trajectories()[:, 0], timestep)
    more = latents.clone()
    more[:, 5] += 1
    added = sae.decode_step(more, timestep) - sae.decode_step(latents, timestep)
    expected = sae.directions([5]).at(Step(timestep, 0.3))
    torch.testing.assert_close(added, expected.expand_as(added), atol=1e-5, rtol=1e-4)


def test_a_reconstruction_is_of_as_many_anchors_as_are_known(sae):
    h = trajectories()
    for teacher_forced in (False, True):
        whole = sae.reconstruct(h, teacher_forced)
        assert whole.shape == h.shape and sae.reconstruct(h[:, :2], teacher_forced).shape == (20, 2, D)
    with pytest.raises(ValueError, match=r"Expected trajectories \(batch, 1 to 3 anchors, 6 channels\)"):
        sae.encode(torch.zeros(2, 4, D))


def test_rows_that_hold_nan_are_not_read(sae):
    needs_all = (sae.reader([20], torch.device("cpu")).computes or 0) >= M
    sae.encoder.data[3] = float("nan")
    with pytest.raises(ValueError, match="The dictionary of mid_block holds NaN or inf"):
        sae.reader([3], torch.device("cpu"))
    if not needs_all:
        sae.reader([20], torch.device("cpu"))
