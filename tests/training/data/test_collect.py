"""Collection with the bundled pipeline: which prompts, what lands in the shards, and what happens after a kill."""

import pytest
import torch
from small_pipelines import sd3

from diffusers_rtsae.analysis.record import Recorder
from training.data.collect import anchor_timesteps, collect, trajectories
from training.data.prompts import read_samples
from training.data.store import NOWHERE, TrajectoryStore, metadata_name
from training.recipe import Collect, Recipe

SITE = "up_blocks.1.attentions.1"
COLLECT = {
    "prompts": "shapes", "count": 5, "steps": 5, "guidance_scale": 4.0, "batch_size": 2, "tokens_per_image": 10,
}  # fmt: skip
TRAIN = {"num_latents": 8, "k": 2, "steps": 1, "batch_size": 4, "learning_rate": 1e-3}


def recipe(sites=(SITE,), activation="output", **changes) -> Recipe:
    collect = Collect(**(COLLECT | changes))
    return Recipe(
        pipeline="x", base_model="x", sites=list(sites), anchors=3, activation=activation, collect=collect, train=TRAIN
    )


@pytest.fixture
def samples():
    return read_samples(recipe().collect, seed=0)


def test_shards_hold_the_trajectories_of_sampled_tokens(pipe, scorer, samples, tmp_path):
    anchors, store = anchor_timesteps(pipe, recipe().collect, 3), TrajectoryStore(tmp_path, "x")
    collect(pipe, samples, recipe([SITE, "mid_block"]), anchors, store, scorer)
    assert len(store.shards()) == 3
    image, token, readings = store.load_origin(store.shards()[1], SITE)
    assert image.tolist() == [2] * 10 + [3] * 10 and len(readings) == 2 and "style" in readings[0]
    assert all(len(set(part.tolist())) == 10 for part in token.split(10)) and token.max() < 64
    values = store.load(store.shards()[1], SITE)
    assert values.shape == (20, 3, 160) and values.dtype == torch.float16 and values.float().std() > 0
    assert store.load(store.shards()[2], "mid_block").shape[0] == 10


def test_tokens_that_lie_on_no_grid_are_nowhere(pipe, samples, monkeypatch):
    def none(*asked):
        raise ValueError("no grid")

    monkeypatch.setattr(Recorder, "size", none)
    anchors = anchor_timesteps(pipe, recipe().collect, 3)
    tensors, _ = trajectories(pipe, samples[:1], 0, recipe(), anchors)
    told = tensors[metadata_name(SITE)]
    assert (told[:, :2] == NOWHERE).all() and (told[:, 2] > 0).all()


def test_shards_say_where_a_token_is_and_take_turns_with_guidance(pipe, samples, tmp_path):
    mine = recipe(guidance_scale=[2.0, 30.0])
    anchors, store = anchor_timesteps(pipe, mine.collect, 3), TrajectoryStore(tmp_path, "x")
    collect(pipe, samples, mine, anchors, store)
    for shard, guidance in zip(store.shards(), (0.1, 1.0, 0.1), strict=True):
        (row, column, scale), token = store.load(shard, f"{SITE}/told").T, store.load_origin(shard, SITE)[1]
        assert torch.equal((row * 8).int() * 8 + (column * 8).int(), token) and torch.all(scale == guidance)
    again, first = TrajectoryStore(tmp_path / "again", "x"), store.shards()[0]
    collect(pipe, samples[:2], recipe(guidance_scale=2.0), anchors, again)
    assert torch.equal(store.load(first, SITE), again.load(again.shards()[0], SITE))


def test_both_halves_of_guidance_and_the_update_of_a_site(pipe, samples, tmp_path):
    anchors, found = anchor_timesteps(pipe, recipe().collect, 3), {}
    for streams, activation in (("cond", "output"), ("both", "output"), ("cond", "update")):
        store, mine = (
            TrajectoryStore(tmp_path / streams / activation, "x"),
            recipe((SITE,), activation, streams=streams),
        )
        collect(pipe, samples[:2], mine, anchors, store)
        found[streams, activation] = store.load(store.shards()[0], SITE)
    both = found["both", "output"]
    assert torch.equal(both[:20], found["cond", "output"]) and len(both) == 40
    assert not torch.equal(both[20:], both[:20])  # another prompt: none
    assert not torch.equal(found["cond", "update"], found["cond", "output"])


def test_processes_share_the_shards(pipe, samples, tmp_path):
    anchors, whole, shared = (
        anchor_timesteps(pipe, recipe().collect, 3),
        TrajectoryStore(tmp_path / "a", "x"),
        tmp_path / "b",
    )
    collect(pipe, samples, recipe(), anchors, whole)
    for rank, expected in ((0, [0, 2]), (1, [0, 1, 2])):
        store = TrajectoryStore(shared, "x")
        collect(pipe, samples, recipe(), anchors, store, process=(rank, 2))
        assert [store.path(i) for i in expected] == store.shards()
    for a, b in zip(whole.shards(), store.shards(), strict=True):
        assert torch.equal(whole.load(a, SITE), store.load(b, SITE))


def test_a_killed_collection_loses_only_the_current_shard(pipe, samples, tmp_path, monkeypatch):
    anchors = anchor_timesteps(pipe, recipe().collect, 3)
    whole, store = TrajectoryStore(tmp_path / "a", "x"), TrajectoryStore(tmp_path / "b", "x")
    collect(pipe, samples, recipe(), anchors, whole)
    original, calls = store.write, []

    def write_then_die(index, *rest):
        if len(calls) == 1:
            store.path(index).with_suffix(".partial").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        calls.append(index)
        original(index, *rest)

    monkeypatch.setattr(store, "write", write_then_die)
    with pytest.raises(KeyboardInterrupt):
        collect(pipe, samples, recipe(), anchors, store)
    assert len(store.shards()) == 1
    monkeypatch.undo()
    collect(pipe, samples, recipe(), anchors, store)
    for a, b in zip(whole.shards(), store.shards(), strict=True):
        assert torch.equal(whole.load(a, SITE), store.load(b, SITE))


def test_anchors_are_steps_of_the_sampler_from_first_to_last(pipe):
    whole = recipe(steps=25).collect
    assert anchor_timesteps(pipe, whole, 5) == [961, 721, 481, 241, 1]
    assert anchor_timesteps(pipe, whole, [1, 481, 961]) == [961, 481, 1]
    with pytest.raises(ValueError, match=r"anchors \[500\] are not among the timesteps of the sampler, \[961, 921"):
        anchor_timesteps(pipe, whole, [961, 500])


def test_a_transformer_that_was_trained_on_flows_keeps_its_own_sampler(pipe, tmp_path, monkeypatch):
    flow, site, width = sd3(pipe)
    flow.set_progress_bar_config(disable=True)

    def encode_prompt(prompt, **options):  # it has no text encoder
        count = 1 if isinstance(prompt, str) else len(prompt)
        generator = torch.Generator().manual_seed(count)
        text = torch.randn(2, count, 7, 48, generator=generator), torch.randn(2, count, 32, generator=generator)
        return text[0][0], text[0][1], text[1][0], text[1][1]

    monkeypatch.setattr(flow, "encode_prompt", encode_prompt)
    mine, store = recipe([site], count=4), TrajectoryStore(tmp_path, "x")
    anchors = anchor_timesteps(flow, mine.collect, 3)
    assert anchors[0] == 1000 and anchors == sorted(anchors, reverse=True)
    collect(flow, read_samples(mine.collect, 0)[:2], mine, anchors, store)
    assert type(flow.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert store.load(store.shards()[0], site).shape == (20, 3, width)
