"""A training step of a sparse autoencoder, ours beside the public packages': time, memory, and what is learned.

    python -m tests.benchmarks.peers --environments FOLDER                    # two sizes; writes peers.json and .md
    python -m tests.benchmarks.peers --environments FOLDER --data runs/shapes/trajectories --steps 300   # and the FVU

makes an environment for each package (some minutes; they stay in FOLDER, if one is given). Each contender has a
process of its own, in its own environment; they take turns, one step at a time, as does the encoder's product alone. A
step is the whole of it: sparsity, auxiliary loss, decoder norm, gradient clipping, Adam, bookkeeping. Memory is the
peak of a process, from the first weights on, beyond what it imports and the data. With `--only` fewer are in memory at
once; the rows of the others stay as they are.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_suffix(".json")
SIZES = {"1,280 → 20,480": (1280, 20480), "6,400 → 16,384": (6400, 16384)}
SAYS = "contender says "  # what a contender's lines begin with, among those that packages print


class Product:
    """The encoder's product alone, of a dictionary of that size."""

    dtype = torch.float32

    def __init__(self, first, latents, k, steps, rate):
        self.weight = torch.randn(latents, first.shape[1]).to(self.dtype)

    def step(self, batch):
        batch.to(self.dtype) @ self.weight.T


class ProductBfloat16(Product):
    dtype = torch.bfloat16


class Ours:
    """A step of `DictionaryTrainer`."""

    precision = "no"

    def __init__(self, first, latents, k, steps, rate):
        from tests.benchmarks.training import Ours
        from training.common.memory import keep_freed_memory

        keep_freed_memory()
        self.ours = Ours(first, latents, k, steps, rate, self.precision)
        self.step = self.ours.step

    def weights(self):
        sae = self.ours.trainer.sae
        return sae.encoder.flatten(1), sae.encoder_bias, sae.decoder.flatten(1), sae.decoder_bias.flatten()


class OursBfloat16(Ours):
    precision = "bf16"


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


class Overcomplete:
    """`train_sae` on one batch, with a `BatchTopKSAE`."""

    def __init__(self, first, latents, k, steps, rate):
        models = ModuleType("overcomplete.models")  # vision models, which need torchvision; no autoencoder uses them
        models.__getattr__ = lambda name: None if name[0] != "_" else getattr(ModuleType, name)
        sys.modules["overcomplete.models"] = models
        from overcomplete.sae import BatchTopKSAE

        self.sae = BatchTopKSAE(first.shape[1], latents, top_k=k * len(first))  # which it counts in the whole batch
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=rate)

    def step(self, batch):
        from overcomplete.sae import train_sae

        train_sae(self.sae, [batch], squared_error, self.optimizer, nb_epochs=1, monitoring=0)


def squared_error(x, reconstruction, pre_codes, codes, dictionary):
    return (x - reconstruction).square().mean()


CONTENDERS = {  # by name: its class, its environment in tests/formats/compare.py, its package
    "the encoder's product, float32": (Product, None, None),
    "the encoder's product, bfloat16": (ProductBfloat16, None, None),
    "ours": (Ours, None, "diffusers-rtsae"),
    "ours, bfloat16": (OursBfloat16, None, "diffusers-rtsae"),
    "dictionary-learning": (DictionaryLearning, "dictionary_learning", "dictionary-learning"),
    "SAELens": (SAELens, "saelens", "sae-lens"),
    "sparsify (TopK, no auxiliary loss)": (Sparsify, "sparsify", "eai-sparsify"),
    "overcomplete (no auxiliary loss)": (Overcomplete, "overcomplete", "overcomplete"),
}


@torch.no_grad()
def unexplained(weights, data: torch.Tensor, k: int) -> float:
    """FVU of BatchTopK codes on data that no one saw."""
    encoder, bias, decoder, centre = weights
    pre = ((data - centre) @ encoder.T + bias).relu()
    threshold = pre.flatten().topk(k * len(data)).values[-1]
    error = torch.where(pre >= threshold, pre, 0.0) @ decoder + centre - data
    return (error.square().sum() / (data - data.mean(0)).square().sum()).item()


def contend(name: str, data: Path, latents: int, k: int, steps: int, batch: int, rate: float) -> None:
    """One contender's process: makes a step for each line it is given, and says how long it took."""
    made, _, package = CONTENDERS[name]
    rows, unseen = (torch.load(data / f"{part}.pt") for part in ("seen", "unseen"))
    generator = torch.Generator().manual_seed(0)
    made(torch.randn(batch, 16), 64, k, steps, rate)  # a small one, so that what is imported is not counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contender = made(rows[:batch].clone(), latents, k, steps, rate)
    print(SAYS + json.dumps(importlib.metadata.version(package) if package else ""), flush=True)
    for _ in sys.stdin:
        chosen = rows[torch.randint(len(rows), (batch,), generator=generator)]
        started = time.perf_counter()
        contender.step(chosen)
        print(SAYS + json.dumps(time.perf_counter() - started), flush=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    fvu = unexplained(contender.weights(), unseen, k) if len(unseen) and hasattr(contender, "weights") else None
    print(SAYS + json.dumps([memory / 2**10, fvu]), flush=True)


class Contender:
    """A contender in its own process."""

    def __init__(self, name: str, python: Path, data: Path, arguments: list):
        command = [python, "-m", "tests.benchmarks.peers", "--contender", name, data, *map(str, arguments)]
        self.errors = tempfile.TemporaryFile("w+")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, **pipes)
        self.version, self.taken = self.said(), []

    def said(self):
        for line in self.process.stdout:
            if line.startswith(SAYS):
                return json.loads(line.removeprefix(SAYS))
        self.errors.seek(0)
        raise RuntimeError(f"{self.process.args} ended.\n{self.errors.read()[-2000:]}")

    def step(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.taken.append(self.said())

    def end(self) -> tuple[float, float | None]:
        self.process.stdin.close()
        return self.said()


def load(folder: Path) -> torch.Tensor:
    """Stored trajectories as vectors, standardised."""
    from safetensors.torch import load_file

    tensors = [load_file(path) for path in sorted(folder.glob("shard-*.safetensors"))]
    site = next(key for key in tensors[0] if "/" not in key)
    data = torch.cat([t[site] for t in tensors]).float()
    return ((data - data.mean(0)) / (data - data.mean(0)).square().mean((0, 2), keepdim=True).sqrt()).flatten(1)


def compete(names: list[str], pythons: dict, data: Path, a, latents: int) -> list[dict]:
    """A row for each contender: its seconds, and the median and quartiles of its ratios to the float32 product."""
    arguments = [latents, a.k, a.steps, a.batch, a.rate]
    running = {}
    for name in names:
        running[name] = Contender(name, pythons[CONTENDERS[name][1]], data, arguments)
    for _ in range(a.steps):
        for contender in running.values():
            contender.step()
    found, reference = [], running[names[0]].taken[1:]
    for name, contender in running.items():
        memory, fvu = contender.end()
        ratios = [own / other for own, other in zip(contender.taken[1:], reference, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        memory = None if a.data else memory  # which loading the data hides
        row = {"name": name, "version": contender.version, "seconds": statistics.median(contender.taken[1:])}
        found.append(row | {"ratio": middle, "quartiles": [low, high], "memory": memory, "fvu": fvu})
    return found


def page(results: dict) -> str:
    lines = []
    for size, one in results.items():
        lines += [f"**{size}**, {one['about']}", "", "| | step s | of the product | quartiles | peak MiB | FVU |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for row in one["rows"]:
            low, high = row["quartiles"]
            cells = [f"{row['name']} {row['version']}".strip(), f"{row['seconds']:.2f}", f"{row['ratio']:.2f}"]
            cells += [f"{low:.2f} to {high:.2f}", f"{row['memory']:,.0f}" if row["memory"] is not None else ""]
            cells += [f"{row['fvu']:.3f}" if row["fvu"] is not None else ""]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, help="where the packages are installed, and stay")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--latents", type=int, default=2048, help="with --data")
    parser.add_argument("--steps", type=int, default=8, help="of each; the first is not counted")
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES), help="of synthetic data")
    parser.add_argument("--data", type=Path, help="train on stored trajectories instead, and report the FVU")
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), help="beside the product")
    parser.add_argument("--contender", nargs=7, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.contender:
        name, data, *sizes, rate = a.contender
        contend(name, Path(data), *map(int, sizes), float(rate))
        return
    from diffusers_rtsae.files import write_json
    from tests.formats.compare import PACKAGES, environment

    first = next(iter(CONTENDERS))
    names = [first, *(name for name in a.only if name != first)]
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        pythons = {None: Path(sys.executable)}
        for package, requirements in PACKAGES.items():
            if any(CONTENDERS[name][1] == package for name in names):
                pythons[package] = environment((a.environments or Path(temporary)) / package, requirements)
        sizes = {"stored trajectories": (None, a.latents)} if a.data else {size: SIZES[size] for size in a.sizes}
        for size, (width, latents) in sizes.items():
            rows, unseen = torch.randn(4 * a.batch, width or 1), torch.empty(0)
            if a.data:
                rows = load(a.data)
                rows, unseen = rows[:-4096], rows[-4096:]
            for part, tensor in {"seen": rows, "unseen": unseen}.items():
                torch.save(tensor.clone(), Path(temporary, f"{part}.pt"))
            about = f"batches of {a.batch:,}, k = {a.k}, {a.steps} steps each, {torch.get_num_threads()} threads"
            found = compete(names, pythons, Path(temporary), a, latents)
            own = {row["name"]: row for row in [*results.get(size, {}).get("rows", []), *found]}
            ordered = [own[name] for name in CONTENDERS if name in own]
            sizes_of_data = f"{rows.shape[1]:,} → {latents:,}, " if a.data else ""
            results[size] = {"about": sizes_of_data + about, "rows": ordered}
            write_json(RESULTS, results)
            RESULTS.with_suffix(".md").write_text(page(results))
            print(page({size: results[size]}), flush=True)


if __name__ == "__main__":
    main()
