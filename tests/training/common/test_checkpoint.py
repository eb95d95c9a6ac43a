"""A checkpoint is read whole or not at all."""

import pytest
import torch

from training.common.checkpoint import load_checkpoint, save_checkpoint


def test_checkpoint_without_file_starts_at_zero(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    assert load_checkpoint(tmp_path / "none", {"p": parameter}, torch.optim.Adam([parameter]), "x") == 0


def test_a_damaged_checkpoint_names_the_file_and_the_remedy(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter])
    save_checkpoint(tmp_path / "c", 1, {"p": parameter}, optimizer, "x")
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:-3])
    with pytest.raises(OSError, match="c is damaged .*Delete it to train from the beginning"):
        load_checkpoint(tmp_path / "c", {"p": parameter}, optimizer, "x")
