"""Small trainings: dictionaries of made-up trajectories whose features are known."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from diffusers_rtsae.models import LinearDynamics
from training.data.split import Data
from training.loop.loop import train_dictionaries
from training.recipe import Recipe

ROOT = Path(__file__).parents[1]
D, ANCHORS = 16, [900, 500, 1]
#: A whole run on the bundled pipeline.
RECIPE = {
    "pipeline": str(ROOT / "examples" / "shapes-sd"),
    "base_model": "shapes-sd",
    "seed": 0,
    "sites": ["up_blocks.1.attentions.1"],
    "anchors": 3,
    "collect": {
        "prompts": "shapes", "count": 12, "steps": 5, "guidance_scale": 4.0, "batch_size": 2, "tokens_per_image": 32,
    },
    "train": {
        "num_latents": 64, "k": 4, "steps": 20, "batch_size": 64, "learning_rate": 1e-3,
        "dead_after": 1000, "validation": 0.3, "checkpoint_every": 10,
    },
}  # fmt: skip


def recipe(variants: dict | None = None, **changes) -> Recipe:
    train = {
        "num_latents": 32, "k": 3, "steps": 40, "batch_size": 128, "learning_rate": 3e-3, "dead_after": 1000,
        "validate_every": 20, "checkpoint_every": 10,
    }  # fmt: skip
    collect = {
        "prompts": "shapes", "count": 1, "steps": 3, "guidance_scale": 1.0, "batch_size": 1, "tokens_per_image": 1,
    }  # fmt: skip
    return Recipe(
        pipeline="none", base_model="none", sites=["mid_block"], anchors=3, collect=collect, train=train | changes,
        variants=variants or {},
    )  # fmt: skip


def sparse_data(count: int = 4096, features: int = 24, seed: int = 0) -> torch.Tensor:
    """Trajectories that are sums of three of 24 known features."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(
        torch.randn(features, 3 * D, generator=torch.Generator().manual_seed(7)), dim=1
    )
    chosen = torch.rand(count, features, generator=generator).topk(3, dim=1).indices
    code = torch.zeros(count, features).scatter(1, chosen, 4 + torch.rand(count, 3, generator=generator))
    return (code @ directions).unflatten(1, (3, D)).half()


def step_data(count: int = 4096, features: int = 24, seed: int = 0) -> torch.Tensor:
    """Trajectories each step of which is a sum of three of 24 known features, larger at later steps."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(features, D, generator=torch.Generator().manual_seed(7))
    chosen = torch.rand(3 * count, features, generator=generator).topk(3, dim=1).indices
    code = torch.zeros(3 * count, features).scatter(1, chosen, 4 + torch.rand(3 * count, 3, generator=generator))
    steps = (code @ torch.nn.functional.normalize(directions, dim=1)).unflatten(0, (count, 3))
    return (steps * torch.tensor([0.8, 1.0, 1.2])[:, None] + torch.tensor([0.0, 0.2, 0.4])[:, None]).half()


def dynamics_of(data: torch.Tensor) -> LinearDynamics:
    dynamics = LinearDynamics(3, D)
    dynamics.mean.copy_(data.float().mean(0))
    dynamics.scale.copy_((data.float() - dynamics.mean).square().mean((0, 2)).sqrt())
    return dynamics


def with_told(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"mid_block": rows, "mid_block/told": torch.rand(len(rows), 3, generator=torch.Generator().manual_seed(9))}


def train(work: Path, *recipes: Recipe, data=sparse_data):
    """Train one dictionary for each recipe, on one pass over the same data."""
    made, data = data, data()
    named = {f"r{i}": one for i, one in enumerate(recipes)}
    trained = train_dictionaries(
        named, Data(with_told(data), *({"mid_block": made(500, seed=seed)} for seed in (2, 3))),
        dict.fromkeys(named, dynamics_of(data)), dict.fromkeys(named, "mid_block"), ANCHORS, work,
        Accelerator(cpu=True), "data",
    )  # fmt: skip
    return list(trained.values())


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def launch(script: Path, text: str, *arguments) -> None:
    """Run `text` in two real processes of one group."""
    script.write_text(text)
    root = ROOT
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "127.0.0.1:0", "--local_addr", "127.0.0.1", script, *arguments]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# neither latents nor rows are even; latents die, rows share a budget, and half of the batches show a beginning
SHARED_ARMS = {
    name: recipe(num_latents=33, batch_size=127, steps=20, validate_every=5, dead_after=130, **changes)
    for name, changes in {
        "batch_topk": {}, "topk": {"architecture": "topk"}, "matryoshka": {"architecture": "matryoshka"},
        "jump_relu": {"architecture": "jump_relu"}, "per_step": {"layout": "per_step"}, "parts": {"accumulate": 2},
        "tide": {"kind": "tide"}, "mixture": {"kind": "mixture", "experts": 2}, "atm": {"architecture": "atm"},
    }.items()
}  # fmt: skip
