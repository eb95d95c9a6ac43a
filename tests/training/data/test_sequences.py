"""Trajectories of anybody: read from files and from memory, split by samples, and what is wrong with them said."""

import json

import pytest
import torch
from safetensors.torch import save_file

from training.data.sequences import read_folder, read_tensors
from training.data.store import metadata_name
from training.recipe import Train

TRAIN = Train(num_latents=8, k=2, steps=1, batch_size=4, learning_rate=1e-3, validation=0.25)


def numbered(first: int, count: int, *tokens: int) -> torch.Tensor:
    """Samples whose every value is their number."""
    return torch.arange(first, first + count).float().view(count, *[1] * (len(tokens) + 2)).expand(-1, *tokens, 3, 4)


def numbers(rows: torch.Tensor) -> set[int]:
    return {int(n) for n in rows[:, 0, 0]}


@pytest.fixture
def folder(tmp_path):
    for i, (first, dtype) in enumerate([(0, torch.float16), (7, torch.float32)]):
        save_file({"states": numbered(first, 7, 2).to(dtype).contiguous()}, tmp_path / f"{i}.safetensors")
    return tmp_path


def test_the_last_samples_are_held_out_whole_and_in_two_halves(folder):
    data, moments = read_folder(folder).split(TRAIN, seed=0)
    rows = data.train["states"]
    assert len(rows) == 20 and rows.shape == (20, 3, 4) and rows.dtype == torch.float32
    assert numbers(rows[torch.arange(20)]) == set(range(10)) and len(data.train[metadata_name("states")]) == 20
    assert numbers(data.calibration["states"]) == {10, 12} and numbers(data.validation["states"]) == {11, 13}
    assert [numbers(torch.cat([p.float() for p in parts])) for parts in moments["states"]] == [
        set(range(10)), set(range(10, 14)),
    ]  # fmt: skip


def test_parts_of_one_sample_make_two_halves_too():
    data, _ = read_tensors((numbered(i, 1) for i in range(8)), "states").split(TRAIN, seed=0)
    assert numbers(data.calibration["states"]) == {6} and numbers(data.validation["states"]) == {7}


def test_the_fingerprint_follows_the_content(folder):
    mark = read_folder(folder).mark
    assert mark == read_folder(folder).mark
    save_file({"states": numbered(1, 7, 2).contiguous()}, folder / "1.safetensors")
    before, now = (json.loads(text)["trajectories"] for text in (mark, read_folder(folder).mark))
    assert before["0.safetensors"] == now["0.safetensors"] and before["1.safetensors"] != now["1.safetensors"]


@pytest.mark.parametrize("tensor, message", [
    (torch.zeros(5, 3), r"1.safetensors: expected 'states' as floats \(samples, steps, width\), got \(5, 3\) of"),
    (torch.zeros(5, 3, 4).int(), r"1.safetensors: expected 'states' as floats .* of torch.int32"),
    (torch.zeros(5, 1, 4), r"1.safetensors: expected 'states' .* with 2 to 1000 steps, got \(5, 1, 4\)"),
    (numbered(0, 5).expand(5, 3, 4)[..., :2], r"1.s.*: expected 'states' as \(samples, 3, 4\), as in .*0.s.*, got"),
    (torch.full((5, 3, 4), torch.nan), r"1.safetensors: expected finite numbers in 'states', got NaN .* sample 0"),
])  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(tmp_path, tensor, message):
    save_file({"states": numbered(0, 5).contiguous()}, tmp_path / "0.safetensors")
    save_file({"states": tensor.contiguous()}, tmp_path / "1.safetensors")
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(OSError, match="There is no folder .*none: expected one of safetensors"):
        read_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"Expected files \*.safetensors in .*, found nothing"):
        read_folder(tmp_path)
    save_file({"states": numbered(0, 5).contiguous()}, tmp_path / "0.safetensors")
    with pytest.raises(ValueError, match=r"0.safetensors: expected a tensor 'layers', it holds \['states'\]"):
        read_folder(tmp_path, ["layers"])
    save_file({name: numbered(0, 5).contiguous() for name in ("states", "layers")}, tmp_path / "1.safetensors")
    with pytest.raises(
        ValueError, match=r"1.safetensors: expected the tensors \['states'\], as in .*0.safetensors, it"
    ):
        read_folder(tmp_path)
    assert len(read_folder(tmp_path, ["states"]).parts["states"]) == 2
    (tmp_path / "1.safetensors").write_bytes(b"half")
    with pytest.raises(OSError, match="1.safetensors: expected safetensors, found a damaged file"):
        read_folder(tmp_path)


def test_what_is_wrong_in_memory_is_said():
    with pytest.raises(ValueError, match="Expected trajectories .samples, steps, width., got none"):
        read_tensors([], "states")
    with pytest.raises(ValueError, match="part 1 of the trajectories: expected 'states'"):
        read_tensors([numbered(0, 2), numbered(0, 2)[:, :2]], "states")
    with pytest.raises(ValueError, match="a name like 'states' or 'layers.3', got '../up'"):
        read_tensors(numbered(0, 2), "../up")
    with pytest.raises(ValueError, match="Expected 3 samples of 'states' or more, two of them .* got 2"):
        read_tensors(numbered(0, 2), "states").split(TRAIN, seed=0)
