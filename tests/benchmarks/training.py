"""A training step of a sparse autoencoder, beside the encoder's product, and one of two processes that share it.

`tests.benchmarks.peers` has it beside the steps of public packages.
"""

from __future__ import annotations

import json
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from diffusers_rtsae.models import LinearDynamics
from tests.simulated_device import NAME, simulated
from training.common.memory import keep_freed_memory
from training.common.processes import ALONE, Processes
from training.loop.trainer import DictionaryTrainer, new_dictionary
from training.recipe import Recipe

from .timing import CUDA, DEVICE, per_step, rows, seconds, take_turns


class Ours:
    """A step of `DictionaryTrainer`."""

    def __init__(
        self,
        first: torch.Tensor,
        latents: int,
        k: int,
        steps: int,
        rate: float,
        precision: str = "no",
        processes: Processes = ALONE,
    ):
        collect = {
            "prompts": "x", "count": 1, "steps": 2, "guidance_scale": 1, "batch_size": 1, "tokens_per_image": 1,
        }  # fmt: skip
        train = {
            "num_latents": latents, "k": k, "steps": steps, "batch_size": len(first), "learning_rate": rate,
            "precision": precision,
        }  # fmt: skip
        recipe = Recipe(pipeline="x", base_model="x", sites=["x"], anchors=2, collect=collect, train=train)
        dynamics = LinearDynamics(2, first.shape[1] // 2)
        sae, sample = new_dictionary("x", [2, 1], recipe, dynamics), first.unflatten(1, (2, -1))
        self.trainer = DictionaryTrainer(sae, recipe.train, dynamics, sample, first.device, processes)
        self.processes, self.done = processes, 0

    def step(self, batch: torch.Tensor) -> None:
        """A step on a batch, of which each process is given its share."""
        whole = self.processes.whole(self.processes.share(batch), len(batch))
        self.trainer.backward(whole.unflatten(1, (2, -1)), None)
        self.trainer.update(self.done)
        self.done += 1


class OursBfloat16(Ours):
    def __init__(self, *arguments):
        super().__init__(*arguments, precision="bf16")


def share(rank: int, folder: str, count: int, width: int, latents: int, rounds: int) -> None:
    """One of two processes of one thread; the first one writes how long steps took, alone and shared."""
    torch.set_num_threads(1)
    keep_freed_memory()
    processes = Processes(rank, 2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=processes.count)
    data = torch.randn(2 * count, width, generator=torch.Generator().manual_seed(0))
    both = Ours(data[:count].clone(), latents, 32, 10_000, 3e-4, processes=processes)
    one = Ours(data[:count].clone(), latents, 32, 10_000, 3e-4) if rank == 0 else None

    def clocked(ours: Ours | None) -> float:
        batch = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(both.done))[:count]]
        processes.wait()
        started = time.perf_counter()
        if ours is not None:
            ours.step(batch)
        processes.wait()
        return time.perf_counter() - started

    contenders = {"one process": partial(clocked, one), "two processes": partial(clocked, both)}
    taken = take_turns(contenders, 0, rounds)
    if rank == 0:
        Path(folder, "taken.json").write_text(json.dumps(taken))
    dist.destroy_process_group()


def share_a_step(count: int, width: int, latents: int, rounds: int) -> list[dict]:
    """The same step by two processes, beside one; clock time, because they wait for each other."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(share, (folder, count, width, latents, rounds), nprocs=2)
        taken = json.loads(Path(folder, "taken.json").read_text())
    return rows(taken, f"a training step on {count:,} x {width:,} with {latents:,} latents by the clock, ")


def counted(steps: int = 11) -> dict[str, float]:
    """How often a step of a small dictionary waits for the device and copies."""
    with simulated() as device:
        data, counts = torch.randn(64, 32).to(NAME), []
        ours = Ours(data, 128, 4, steps, 3e-4)
        for _ in range(steps):
            device.reset()
            ours.step(data)
            counts.append(device.own)
    return per_step(counts)


def measure(budget: float) -> list[dict]:
    """
    Our step on batches of 1,024 x 1,280 with 20,480 latents and k = 32, beside the encoder's product; on a CPU also
    shared by two processes, and so is that of a small dictionary.
    """
    keep_freed_memory()
    count, width, latents = 1024, 1280, 20_480
    data, weight, found = torch.randn(2 * count, width, device=DEVICE), torch.randn(latents, width, device=DEVICE), []
    for precision, dtype, trainer in (("float32", torch.float32, Ours), ("bfloat16", torch.bfloat16, OursBfloat16)):
        ours = trainer(data[:count].clone(), latents, 32, 10_000, 3e-4)
        works = {
            f"the encoder's product, {precision}": partial(torch.matmul, data[:count].to(dtype), weight.to(dtype).T),
            f"a training step, {precision}": lambda ours=ours: ours.step(data[torch.randperm(len(data))[:count]]),
        }
        found += rows(take_turns({name: partial(seconds, work) for name, work in works.items()}, budget / 2))
        found[-1] |= counted()
    if not CUDA:
        found += share_a_step(count, width, latents, 10) + share_a_step(count, 768, 2048, 60)
    return found
