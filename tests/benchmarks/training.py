"""A training step of a sparse autoencoder, ours against the public packages': time, memory, and what is learned.

    pip install --no-deps --target peers sae-lens dictionary-learning eai-sparsify     # and what they say is missing
    python -m tests.benchmarks.training --peers peers                          # one synthetic batch, ratios to ours
    python -m tests.benchmarks.training --peers peers --steps 300 --data runs/shapes/trajectories    # also the FVU

`tests.benchmarks.all` measures ours alone, against the encoder's product, and one of two processes that share it.

Each contender has a process of its own; they take turns, one step at a time. A step is the whole of it: sparsity,
auxiliary loss, decoder norm, gradient clipping, Adam, bookkeeping. Parts of the packages that only language models
need, and that are not installed, are replaced by empty modules.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import torch
import torch.distributed as dist

from diffusers_rtsae.models import LinearDynamics
from tests.simulated_device import NAME, simulated
from training.commands import Adding
from training.dictionary import DictionaryTrainer, new_dictionary
from training.memory import keep_freed_memory
from training.processes import ALONE, Processes
from training.recipe import Recipe

from .timing import CUDA, DEVICE, per_step, rows, seconds, take_turns

UNUSED = (
    "nnsight",
    "wandb",
    "nltk",
    "plotly",
    "sentence_transformers",
    "babe",
    "dotenv",
    "IPython",
    "transformers_stream_generator",
)


class Unused:
    """Finds any of the modules that are not needed, and makes it empty."""

    def find_spec(self, name, path=None, target=None):
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in UNUSED else None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__ = [], spec
        return module

    def exec_module(self, module):
        pass


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

    def weights(self):
        r = self.trainer.sae
        return r.encoder.flatten(1), r.encoder_bias, r.decoder.flatten(1), r.decoder_bias.flatten()


class OursBfloat16(Ours):
    def __init__(self, *arguments):
        super().__init__(*arguments, precision="bf16")


class DictionaryLearning:
    """`BatchTopKTrainer.update`."""

    def __init__(self, first, latents, k, steps, rate):
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

        self.trainer = BatchTopKTrainer(
            steps, first.shape[1], latents, k, 0, "none", lr=rate, warmup_steps=min(100, steps - 1), device="cpu",
        )  # fmt: skip
        self.trainer.update(0, first)
        self.done = 1

    def step(self, batch):
        self.trainer.update(self.done, batch)
        self.done += 1

    def weights(self):
        ae = self.trainer.ae
        return ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.T, ae.b_dec


class SAELens:
    """`SAETrainer.step` with a `BatchTopKTrainingSAE`."""

    def __init__(self, first, latents, k, steps, rate):
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer

        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=first.shape[1], d_sae=latents, k=k, device="cpu"))
        config = SAETrainerConfig(
            total_training_samples=steps * len(first), train_batch_size_samples=len(first), lr=rate, lr_end=rate / 10,
            lr_warm_up_steps=min(100, steps - 1), logger=LoggingConfig(log_to_wandb=False), device="cpu",
        )  # fmt: skip
        self.trainer = SAETrainer(config, sae, iter([]))

    def step(self, batch):
        self.trainer.step(batch)

    def weights(self):
        sae = self.trainer.sae
        return sae.W_enc.T, sae.b_enc, sae.W_dec, sae.b_dec


class Sparsify:
    """What `Trainer.fit` does in a step with a `SparseCoder` (TopK: it has no BatchTopK)."""

    def __init__(self, first, latents, k, steps, rate):
        from sparsify.config import SparseCoderConfig
        from sparsify.sparse_coder import SparseCoder

        self.sae = SparseCoder(first.shape[1], SparseCoderConfig(num_latents=latents, k=k), device="cpu")
        self.sae.b_dec.data = first.mean(0)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=rate)

    def step(self, batch):
        self.sae(batch).fvu.backward()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.sae.set_decoder_norm_to_unit_norm()

    def weights(self):
        return self.sae.encoder.weight, self.sae.encoder.bias, self.sae.W_dec, self.sae.b_dec


CONTENDERS = {
    "ours": Ours,
    "ours, bf16": OursBfloat16,
    "dictionary-learning": DictionaryLearning,
    "sae-lens": SAELens,
    "eai-sparsify (TopK)": Sparsify,
}


@torch.no_grad()
def unexplained(weights, data: torch.Tensor, k: int) -> float:
    """FVU of BatchTopK codes on data that no one saw."""
    encoder, bias, decoder, centre = weights
    pre = ((data - centre) @ encoder.T + bias).relu()
    threshold = pre.flatten().topk(k * len(data)).values[-1]
    error = torch.where(pre >= threshold, pre, 0.0) @ decoder + centre - data
    return (error.square().sum() / (data - data.mean(0)).square().sum()).item()


def contend(
    name: str, peers: str, arguments: tuple, data: torch.Tensor, unseen: torch.Tensor, batch: int, pipe
) -> None:
    """One contender's process: makes a step whenever it is told to, and says how long it took."""
    sys.path.append(peers)
    sys.meta_path.append(Unused())
    if name.startswith("ours"):
        keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contender = CONTENDERS[name](data[:batch].clone(), *arguments)
    pipe.send(None)
    while pipe.recv() == "step":
        rows = data[torch.randint(len(data), (batch,), generator=generator)]
        start = time.perf_counter()
        contender.step(rows)
        pipe.send(time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    pipe.send((memory / 2**10, unexplained(contender.weights(), unseen, arguments[1]) if len(unseen) else None))


def load(folder: Path) -> torch.Tensor:
    """Stored trajectories as vectors, standardised."""
    from safetensors.torch import load_file

    tensors = [load_file(path) for path in sorted(folder.glob("shard-*.safetensors"))]
    site = next(key for key in tensors[0] if "/" not in key)
    data = torch.cat([t[site] for t in tensors]).float()
    return ((data - data.mean(0)) / (data - data.mean(0)).square().mean((0, 2), keepdim=True).sqrt()).flatten(1)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="", help="folder the packages were installed to")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--channels", type=int, default=1280)
    parser.add_argument("--latents", type=int, default=20480)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6, help="of each; the first is not counted")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--data", type=Path, help="train on stored trajectories instead, and report the FVU")
    parser.add_argument("--only", nargs="*", action=Adding, default=list(CONTENDERS))
    a = parser.parse_args()
    if a.data:
        data = load(a.data)
        data, unseen = data[:-4096], data[-4096:]
    else:
        data, unseen = torch.randn(a.batch * 4, a.channels), torch.empty(0)
    context, running = multiprocessing.get_context("spawn"), {}
    arguments = (a.latents, a.k, a.steps, a.rate)
    for name in a.only:
        here, there = context.Pipe()
        inputs = (name, a.peers, arguments, data, unseen, a.batch, there)
        process = context.Process(target=contend, args=inputs, daemon=True)
        process.start()
        there.close()
        try:
            here.recv()
            running[name] = here
        except EOFError:
            print(f"{name} could not be started")
    times = {name: [] for name in running}
    for _ in range(a.steps):
        for name, pipe in running.items():
            pipe.send("step")
            times[name].append(pipe.recv())
    x, w = data[: a.batch], torch.randn(a.latents, data.shape[1])
    products = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right, took = x.to(dtype), w.to(dtype), []
        for _ in range(4):
            start = time.perf_counter()
            left @ right.T
            took.append(time.perf_counter() - start)
        products[dtype] = statistics.median(took)
    print(f"N={a.batch} d={data.shape[1]} m={a.latents} k={a.k}, median of {a.steps - 1} steps")
    fast, slow = products[torch.bfloat16], products[torch.float32]
    print(f"the encoder's product alone: float32 {slow:.3f} s, bfloat16 {fast:.3f} s")
    print(f"{'':22} {'step s':>8} {'/ ours':>7} {'/ product':>9} {'peak MiB':>9} {'FVU':>7}")
    ours = statistics.median(times["ours"][1:])
    for name, pipe in running.items():
        pipe.send("stop")
        memory, fvu = pipe.recv()
        step = statistics.median(times[name][1:])
        alone = fast if "bf16" in name else slow
        told = "" if fvu is None else f"{fvu:7.4f}"
        print(f"{name:22} {step:8.3f} {step / ours:7.2f} {step / alone:9.2f} {memory:9.0f} {told}")


if __name__ == "__main__":
    main()
