"""The whole command, killed for real in the middle of collecting, then run again."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from diffusers_rtsae import load_dictionary
from training.train import run

ROOT = Path(__file__).parents[2]
RECIPE = {
    "pipeline": str(ROOT / "examples" / "shapes-sd"),
    "base_model": "shapes-sd",
    "seed": 0,
    "sites": ["up_blocks.1.attentions.1"],
    "anchors": 3,
    "collect": {
        "prompts": "shapes", "count": 12, "steps": 5, "guidance_scale": 4.0, "batch_size": 2, "tokens_per_image": 32,
    },
    "fit": {"ridge": 1e-3, "residualize": True},
    "train": {
        "num_latents": 64, "k": 4, "steps": 20, "batch_size": 64, "learning_rate": 1e-3, "auxiliary": 1 / 32,
        "dead_after": 1000, "prefix": 0.5, "validation": 0.3, "checkpoint_every": 10,
    },
}  # fmt: skip


def test_a_command_killed_at_a_random_moment_continues(tmp_path):
    recipe, work, out = tmp_path / "recipe.yaml", tmp_path / "work", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(RECIPE))
    command = [sys.executable, "-m", "training.train", recipe, "--out", out, "--work", work, "--device", "cpu"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(work.glob("trajectories/*.safetensors"))) < 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in work.glob("trajectories/*.safetensors")}
    run(RECIPE, out, work, "cpu")
    assert 2 <= len(kept) < 6 and all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert len(list(work.glob("trajectories/*.safetensors"))) == 6
    whole = run(RECIPE, tmp_path / "whole", tmp_path / "other", "cpu")
    again = load_dictionary(out)
    assert again.config["metrics"] == whole.config["metrics"]
