import pytest
import torch
from safetensors.torch import save_file

from training.data.store import TrajectoryStore

SETTINGS = '{"steps": 5, "scheduler": {"class": "DDIM", "beta_end": 0.02}}'


def shard(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "mid_block": torch.randn(6, 3, 4, generator=generator).half(),
        "mid_block/image": torch.zeros(6, dtype=torch.int32),
        "mid_block/token": torch.arange(6, dtype=torch.int32),
    }


@pytest.fixture
def store(tmp_path):
    store = TrajectoryStore(tmp_path, SETTINGS)
    store.write(0, shard(0), [{"valid": "yes"}])
    store.write(1, shard(1))
    return store


def test_shards_come_back_in_order(store):
    assert [path.name for path in store.shards()] == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert torch.equal(store.load(store.shards()[1], "mid_block"), shard(1)["mid_block"])
    image, token, readings = store.load_origin(store.shards()[0], "mid_block")
    assert token.tolist() == list(range(6)) and readings == [{"valid": "yes"}]
    assert store.check(0) and not store.check(2)


def test_what_a_killed_writer_left_is_not_read(store):
    store.path(2).with_suffix(".partial").write_bytes(b"half")
    assert len(store.shards()) == 2 and not store.check(2)


def zeros(content: bytes) -> bytes:
    return content[:-100] + bytes(100)


@pytest.mark.parametrize("spoil", [
    lambda content: content[:-20], zeros, lambda content: content[:-3] + b"\xff\x7e" + content[-1:],
], ids=["truncated", "zeros", "NaN"])  # fmt: skip
def test_a_damaged_shard_is_named_and_collected_again(store, spoil):
    path = store.path(1)
    path.write_bytes(spoil(path.read_bytes()))
    again = TrajectoryStore(store.folder, SETTINGS)
    with pytest.raises(OSError, match=r"shard-00001.safetensors is damaged.* Run the same command again, which coll"):
        again.load(path, "mid_block")
    with pytest.warns(UserWarning, match=r"shard-00001.safetensors is damaged .*: it is collected again"):
        assert not again.check(1) and again.check(0)
    again.write(1, shard(1))
    assert again.check(1) and torch.equal(again.load(path, "mid_block"), shard(1)["mid_block"])


def test_other_settings_are_refused_and_named(store):
    other = SETTINGS.replace("5", "6").replace(', "beta_end": 0.02', "")
    with pytest.raises(ValueError, match="otherwise: scheduler.beta_end 0.02 there, nothing now; steps 5 th"):
        TrajectoryStore(store.folder, other).check(0)


def test_a_site_that_was_not_collected(store):
    with pytest.raises(ValueError, match=r"holds no site 'up'.*\['mid_block'\]"):
        store.load(store.path(0), "up")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_are_never_written(store, value):
    broken = shard()
    broken["mid_block"][0, 0, 0] = value
    with pytest.raises(ValueError, match="mid_block: the activations hold NaN or inf"):
        store.write(2, broken)
    assert not store.check(2)


def test_a_file_that_is_no_shard(store):
    save_file({"mid_block": torch.zeros(1)}, store.path(2))
    with pytest.raises(ValueError, match="of an earlier version, which did not .* Delete .* to collect again"):
        store.check(2)


def test_rows_of_many_shards_are_read_as_one(store):
    rows = store.rows(store.shards(), "mid_block")
    whole = torch.cat([shard(0)["mid_block"], shard(1)["mid_block"]])
    chosen = torch.tensor([11, 0, 6, 5, 6])
    assert len(rows) == 12 and rows.shape == (12, 3, 4) and torch.equal(rows[chosen], whole[chosen])


def test_shards_behind_a_url(tmp_path):
    store = TrajectoryStore("memory://bucket/run", SETTINGS, cache=tmp_path / "a")
    store.write(0, shard(0))
    elsewhere = TrajectoryStore("memory://bucket/run", SETTINGS, cache=tmp_path / "b")
    assert elsewhere.check(0) and not elsewhere.check(1)
    assert torch.equal(elsewhere.load(elsewhere.shards()[0], "mid_block"), shard(0)["mid_block"])
    with pytest.raises(ValueError, match="collected otherwise: steps 5 there, 6 now"):
        TrajectoryStore("memory://bucket/run", SETTINGS.replace("5", "6"), cache=tmp_path / "c").check(0)
    with pytest.raises(ValueError, match="need a local `cache`"):
        TrajectoryStore("memory://bucket/run", SETTINGS)


def test_a_full_disk_keeps_what_was_written(store, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.data.store.save_file", full)
    with pytest.raises(
        OSError, match=r"shard-00002.* could not be written .*No space left.*the shards before it are kept"
    ):
        store.write(2, shard(2))
    assert len(store.shards()) == 2 and not list(store.folder.glob("*.partial"))
