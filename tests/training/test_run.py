"""The whole command, killed for real in the middle of collecting, then run again."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from small_training import RECIPE, launch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from diffusers_rtsae import load_dictionary
from training.data import stream as module
from training.data.store import metadata_name
from training.data.stream import Stream
from training.loop.checkpoints import Checkpoints
from training.recipe import Recipe
from training.run import load_pipeline, run

ROOT = Path(__file__).parents[2]
KILLED = """
import os, runpy, signal, sys

written = 0

def kill(event, arguments):
    global written
    if event == "os.rename" and str(arguments[1]).endswith(".safetensors"):
        written += 1
        if written == 3:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
runpy.run_module("training.train", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The metrics of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    return run(Recipe(**RECIPE), folder / "out", folder / "work")[""].config["metrics"]


def test_a_killed_command_continues(tmp_path, uninterrupted):
    """It is killed, for real, when the third of six files was written under its temporary name."""
    recipe, work, out = tmp_path / "recipe.yaml", tmp_path / "work", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(RECIPE))
    command = [sys.executable, "-c", KILLED, recipe, "--out", out, "--work", work, "--cpu"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in work.glob("trajectories/*.safetensors")}
    run(Recipe(**RECIPE), out, work)
    assert len(kept) == 2 and all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert len(list(work.glob("trajectories/*.safetensors"))) == 6
    assert load_dictionary(out).config["metrics"] == uninterrupted


class Exhausted:
    """A hook that runs out of memory when it is called for the nth time."""

    def __init__(self, count: int):
        self.left = count

    def __call__(self, *arguments) -> None:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def test_a_device_that_runs_out_of_memory_loses_nothing(tmp_path, uninterrupted):
    recipe, work, out = Recipe(**RECIPE), tmp_path / "work", tmp_path / "out"
    calls = RECIPE["collect"]["steps"] * 3 - 1  # of the denoiser: in the middle of the third shard
    drawing = Exhausted(calls)
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: drawing() if type(module).__name__ == "UNet2DConditionModel" else None
    )
    with handle, pytest.raises(MemoryError, match="while drawing 2 pictures. .* or lower `collect.batch_size`"):
        run(recipe, out, work)
    shards = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    assert [path.name for path in sorted(shards)] == ["shard-00000.safetensors", "shard-00001.safetensors"]

    handle = register_optimizer_step_pre_hook(Exhausted(RECIPE["train"]["steps"] // 2 + 3))
    try:
        with pytest.raises(MemoryError, match="while training. .*step-00000010; or raise `train.accumulate`"):
            run(recipe, out, work)
    finally:
        handle.remove()
    assert not out.exists() and not list(work.rglob("*.partial"))
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    found = run(recipe, out, work)[""]
    assert load_dictionary(out).config["metrics"] == found.config["metrics"] == uninterrupted


def streaming(**train) -> Recipe:
    collect = RECIPE["collect"] | {"buffer": 150, "reuse": 2.0}
    return Recipe(**RECIPE | {"collect": collect, "train": RECIPE["train"] | train})


def test_streaming_keeps_nothing_on_disk_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    whole = run(streaming(), tmp_path / "whole", tmp_path / "a")[""]
    assert not (tmp_path / "a" / "trajectories").exists()
    original = Checkpoints.save

    def save_then_die(*arguments):
        original(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        run(streaming(), tmp_path / "killed", tmp_path / "b")
    monkeypatch.undo()
    resumed = run(streaming(), tmp_path / "killed", tmp_path / "b")[""]
    site = RECIPE["sites"][0]
    for (name, a), b in zip(
        whole.sites[site].state_dict().items(), resumed.sites[site].state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_the_buffer_of_a_stream_is_a_ring():
    settings, site = streaming(), RECIPE["sites"][0]
    pipe, samples, anchors = load_pipeline(settings, torch.device("cpu"))
    stream = Stream(pipe, samples, settings, anchors, held_out=1)
    expected = torch.cat([stream.generate(1 + i)[site] for i in range(4)])  # 64 rows each, there is room for 150
    stream.renew()
    place = stream.buffer[site].data_ptr()
    stream.renew()
    assert not stream.is_full
    stream.renew()
    stream.renew()
    assert stream.is_full and stream.buffer[site].data_ptr() == place
    kept = torch.arange(256)[-150:]
    assert torch.equal(stream.buffer[site][kept % 150], expected[kept])


def test_every_turn_of_a_stream_draws_other_tokens_and_noise(monkeypatch):
    settings, drawn = streaming(), []

    def drawing(pipe, part, first, *told):
        drawn.append((first, [sample.seed for sample in part]))
        return dict.fromkeys((site, metadata_name(site)), torch.zeros(1)), None

    site = RECIPE["sites"][0]
    monkeypatch.setattr(module, "trajectories", drawing)
    pipe, samples, anchors = load_pipeline(settings, torch.device("cpu"))
    stream = Stream(pipe, samples, settings, anchors, held_out=1)
    for index in range(1, 11):
        stream.generate(index)
    first, seeds = zip(*drawn, strict=True)
    assert first == (2, 4, 6, 8, 10, 14, 16, 18, 20, 22)  # of shards of two, which take turns with guidance
    assert len({seed for some in seeds for seed in some}) == 20


def test_variants_are_saved_each_in_its_folder(tmp_path):
    recipe = Recipe(**RECIPE, variants={"wide": {"num_latents": 96}, "raw": {"residualize": False, "seed": 1}})
    saved = run(recipe, tmp_path / "out", tmp_path / "work")
    assert saved.keys() == {"wide", "raw"}
    wide, raw = (load_dictionary(tmp_path / "out" / name).sites[RECIPE["sites"][0]] for name in ("wide", "raw"))
    assert wide.config.num_latents == 96 and wide.dynamics.transition.abs().sum() > 0
    assert raw.config.num_latents == 64 and raw.dynamics.transition.abs().sum() == 0


def test_two_processes_collect_train_and_save(tmp_path):
    text = """
        import sys; from pathlib import Path; from small_training import RECIPE
        from training.recipe import Recipe; from training.run import run
        run(Recipe(**RECIPE), Path(sys.argv[1]) / "out", Path(sys.argv[1]) / "work")
        """
    launch(tmp_path / "script.py", textwrap.dedent(text), tmp_path)
    assert len(list((tmp_path / "work" / "trajectories").glob("*.safetensors"))) == 6
    assert load_dictionary(tmp_path / "out").config["metrics"]["up_blocks.1.attentions.1"]["l0_threshold"] > 1
