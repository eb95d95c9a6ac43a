"""Collection with the bundled pipeline: what lands in the shards, and what happens after a kill."""

import pytest
import torch

from training.collect import anchor_timesteps, collect, read_prompts
from training.store import TrajectoryStore

SITE = "up_blocks.1.attentions.1"
SETTINGS = {"steps": 5, "guidance_scale": 4.0, "batch_size": 2, "tokens_per_image": 10}


@pytest.fixture
def prompts():
    return read_prompts("shapes", 5, seed=0)


def test_shards_hold_the_trajectories_of_sampled_tokens(pipe, scorer, prompts, tmp_path):
    anchors = anchor_timesteps(pipe, 5, 3)
    store = TrajectoryStore(tmp_path, "x")
    collect(pipe, prompts, [SITE, "mid_block"], anchors, store, SETTINGS, seed=0, scorer=scorer)
    assert len(store.shards()) == 3
    image, token, readings = store.load_origin(store.shards()[1], SITE)
    assert image.tolist() == [2] * 10 + [3] * 10 and len(readings) == 2 and "style" in readings[0]
    assert all(len(set(part.tolist())) == 10 for part in token.split(10)) and token.max() < 64
    values = store.load(store.shards()[1], SITE)
    assert values.shape == (20, 3, 160) and values.dtype == torch.float16 and values.float().std() > 0
    assert store.load(store.shards()[2], "mid_block").shape[0] == 10


def test_a_killed_collection_loses_only_the_current_shard(pipe, prompts, tmp_path, monkeypatch):
    anchors = anchor_timesteps(pipe, 5, 3)
    whole, store = TrajectoryStore(tmp_path / "a", "x"), TrajectoryStore(tmp_path / "b", "x")
    collect(pipe, prompts, [SITE], anchors, whole, SETTINGS, seed=0)
    original, calls = store.write, []

    def write_then_die(index, *rest):
        if len(calls) == 1:
            store.path(index).with_suffix(".partial").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        calls.append(index)
        original(index, *rest)

    monkeypatch.setattr(store, "write", write_then_die)
    with pytest.raises(KeyboardInterrupt):
        collect(pipe, prompts, [SITE], anchors, store, SETTINGS, seed=0)
    assert len(store.shards()) == 1
    monkeypatch.undo()
    collect(pipe, prompts, [SITE], anchors, store, SETTINGS, seed=0)
    for a, b in zip(whole.shards(), store.shards(), strict=True):
        assert torch.equal(whole.load(a, SITE), store.load(b, SITE))


def test_anchors_are_steps_of_the_sampler_from_first_to_last(pipe):
    anchors = anchor_timesteps(pipe, 25, 5)
    assert anchors == [961, 721, 481, 241, 1]


def test_prompts_from_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dog \n")
    assert sorted(read_prompts(str(path), 10, seed=0)) == ["a cat", "a dog"]
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="holds no prompts: expected one a line"):
        read_prompts(str(path), 10, seed=0)
