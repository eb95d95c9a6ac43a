"""Does the method hold for another process than denoising? Two small language models, and no picture.

    python -m training.experiments.sequences --out training/results/sequences.json

The paper says that the method carries over to any sequential process with learnable linear dynamics (2605.27813). Two
networks learn to predict the next character of the docstrings of Python's standard library: a recurrent one (GRU),
whose states over eight characters are one trajectory, and a transformer, whose residual stream over its layers is one
for each character. On each, dictionaries of every kind are trained alike, with as many active latents in a trajectory
(a code for each step has its share of them), and measured on modules that neither network nor dictionary was trained
on. Beside them the linear dynamics alone, and an autoencoder of the differences between neighbouring steps.

Rows are added to the JSON as they are measured; the same command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import ast
import platform
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from diffusers_rtsae import SparseDictionary, load_dictionary
from diffusers_rtsae.files import whole

from ..commands import Adding
from ..evaluation.reconstruction import Unexplained
from ..loop.dynamics import fit_dynamics
from ..recipe import Recipe
from ..run import run
from .results import Results, spread, table

CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]  # all others count as the first
CONTEXT = 64  # characters that a network is shown
WIDTH, LAYERS, WINDOW = 64, 6, 8
KINDS = {  # and what each changes in a recipe
    "rtsae": {},
    "raw": {"residualize": False},
    "per-step": {"layout": "per_step", "prefix": 0.0},
    "topk": {"kind": "static", "architecture": "topk"},
    "batch-topk": {"kind": "static"},
    "jump-relu": {"kind": "static", "architecture": "jump_relu"},
    "tide": {"kind": "tide", "architecture": "topk"},
    "differences": {"kind": "static"},
}
WHOLE = ("rtsae", "raw", "per-step")  # have one code for a trajectory
PASSES = {"states": [kind for kind in KINDS if kind != "differences"], "differences": ["differences"]}
EVERY = 3  # of the contexts are recorded
DYNAMICS = "linear dynamics alone"
FIGURES = {
    "l0": "active latents",
    "fvu_online": "FVU",
    "fvu_causal": "FVU, as it goes on",
    "fvu_teacher_forced": "FVU, each step from the true one before",
    "recovered": "next character recovered",
}


def docstrings() -> list[str]:
    """The docstrings of each module of Python's standard library."""
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        nodes = ast.walk(ast.parse(path.read_bytes()))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) for node in nodes if isinstance(node, documented)]
        texts.append("\n".join(text for text in found if text))
    return texts


def contexts(texts: list[str]) -> torch.Tensor:
    """The characters of these texts in a row, `(contexts, CONTEXT + 1)`, each with the one that follows."""
    places = {character: i for i, character in enumerate(CHARACTERS)}
    ids = torch.tensor([places.get(character, 0) for character in "\n".join(texts)])
    return ids.unfold(0, CONTEXT + 1, CONTEXT)


class Recurrent(nn.Module):
    """A GRU of characters. Its trajectories are its states over `WINDOW` neighbouring characters."""

    steps, batch = WINDOW, 64

    def __init__(self):
        super().__init__()
        self.embedding, self.cell = nn.Embedding(len(CHARACTERS), WIDTH), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, len(CHARACTERS))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, characters, …)` of the next characters."""
        return self.head(self.states(ids))

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        return self.cell(self.embedding(ids))[0]

    def trajectories(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Trajectories `(samples, steps, width)` of contexts, and what follows the steps that `read` reads."""
        states = self.states(ids[:, :-1]).unflatten(1, (-1, WINDOW))[:, 1:]  # after a beginning
        return states.flatten(0, 1), ids[:, 1:].unflatten(1, (-1, WINDOW))[:, 1:].flatten(0, 1)

    def read(self, states: torch.Tensor) -> torch.Tensor:
        """Logits `(samples, read steps, …)` from trajectories."""
        return self.head(states)


class Layered(nn.Module):
    """A transformer of characters. Its trajectories are the residual stream of a character over the layers."""

    steps, batch = LAYERS + 1, 16

    def __init__(self):
        super().__init__()
        self.embedding, self.place = nn.Embedding(len(CHARACTERS), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, **options) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(CHARACTERS))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.read(self.states(ids))[..., 0, :]

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        stream = [self.embedding(ids) + self.place.weight[: ids.shape[1]]]
        for layer in self.layers:
            stream.append(layer(stream[-1], src_mask=mask, is_causal=True))
        return torch.stack(stream, 2)

    def trajectories(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        every = slice(WINDOW, None, WINDOW)  # as many as of the other network
        return self.states(ids[:, :-1])[:, every].flatten(0, 1), ids[:, 1:, None][:, every].flatten(0, 1)

    def read(self, states: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(states[..., -1:, :]))


NETWORKS = {"recurrent": Recurrent, "layered": Layered}


def trained(name: str, ids: torch.Tensor, steps: int, path: Path) -> Recurrent | Layered:
    """A network that predicts the next character, read from a file or trained and written."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    if path.exists():
        network.load_state_dict(load_file(path))
        return network.eval().requires_grad_(False)
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc=name, unit="step", mininterval=5):
        batch = ids[torch.randint(len(ids), (network.batch,))]
        loss = F.cross_entropy(network(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        save_file(network.state_dict(), partial)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def record(network: Recurrent | Layered, ids: torch.Tensor, path: Path, difference: bool) -> None:
    """Write the trajectories of contexts, or their differences between neighbouring steps, the first as it is."""
    states = torch.cat([network.trajectories(part)[0] for part in ids.split(512)])
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        save_file({"states": differences(states) if difference else states}, partial)


def differences(states: torch.Tensor) -> torch.Tensor:
    return torch.cat([states[:, :1], states.diff(dim=1)], 1)


def recipe(folder: Path, kinds: list[str], steps: int, a: argparse.Namespace) -> Recipe:
    """The training of some kinds on one pass over the same trajectories, named `kind-each-seed`: with `each` active
    latents at a step on average."""
    variants = {}
    for kind in kinds:
        for each in a.each:
            for seed in a.seeds:
                k = each * (steps if kind in WHOLE else 1)
                variants[f"{kind}-{each}-{seed}"] = {"seed": seed, "k": k} | KINDS[kind]
    train = {
        "num_latents": a.latents, "k": 1, "steps": a.training_steps, "batch_size": 256, "learning_rate": 2e-3,
        "dead_after": 50_000, "checkpoint_every": 100,
    }  # fmt: skip
    return Recipe(trajectories=str(folder), base_model="a model of characters", train=train, variants=variants)


class Held:
    """Trajectories of modules that nothing was trained on, and what is measured on them."""

    def __init__(self, network: Recurrent | Layered, ids: torch.Tensor):
        with torch.no_grad():
            self.states, self.following = network.trajectories(ids)
        self.network, self.mean = network, self.states.mean(0)
        self.lost = [self.loss(self.mean.expand_as(self.states)), self.loss(self.states)]

    @torch.no_grad()
    def loss(self, states: torch.Tensor) -> float:
        """Cross-entropy of the next characters, read from these trajectories."""
        return F.cross_entropy(self.network.read(states).flatten(0, 1), self.following.flatten()).item()

    def recovered(self, states: torch.Tensor) -> float:
        """The share that a reconstruction recovers of what the mean state loses of the prediction."""
        mean, true = self.lost
        return round((mean - self.loss(states)) / (mean - true), 4)

    @torch.no_grad()
    def figures(self, sae: SparseDictionary, of_differences: bool) -> dict[str, float]:
        """What is measured of a dictionary."""
        if of_differences:
            inputs = differences(self.states)
            parts = sae.reconstruct(inputs)
            online, before = parts.cumsum(1), F.pad(self.states[:, :-1], (0, 0, 1, 0))
            causal, forced = online, before + parts
        else:
            inputs, online = self.states, sae.reconstruct(self.states)
            known = [self.states[:, : g + 1] for g in range(self.states.shape[1])]
            causal = torch.stack([sae.reconstruct(part)[:, -1] for part in known], 1)
            forced = sae.reconstruct(self.states, teacher_forced=True)
        l0 = sum((code > 0).sum(1).float().mean().item() for code in sae.codes(inputs))
        dead = (sae.density == 0).float().mean().item()
        return {"l0": round(l0, 2), "dead": round(dead, 4), "recovered": self.recovered(causal)} | {
            f"fvu_{name}": self.unexplained(of)
            for name, of in (("online", online), ("causal", causal), ("teacher_forced", forced))
        }

    def unexplained(self, states: torch.Tensor) -> float:
        """Fraction of variance unexplained, each step divided by its spread."""
        scale = (self.states - self.mean).square().mean((0, 2)).sqrt()[:, None]
        sums = Unexplained()
        sums.add(states / scale, self.states / scale)
        return sums.result()[1]

    def of_dynamics(self, fitted_to: torch.Tensor) -> dict[str, float]:
        """What the linear dynamics alone explain, without any code: rolled out from the true first state, and each
        step predicted from the true one before."""
        dynamics, fitted = fit_dynamics(fitted_to.split(8192), self.states.split(8192), ridge=1e-3)
        none = torch.zeros_like(self.states)
        first = dynamics.residuals(self.states)
        online = dynamics.rollout(torch.cat([first[:, :1], none[:, 1:]], 1))
        forced = dynamics.teacher_forced(torch.cat([first[:, :1], none[:, 1:]], 1), self.states)
        found = {"fvu_online": self.unexplained(online), "fvu_teacher_forced": self.unexplained(forced)}
        return found | {"r2": fitted["r2"], "recovered": self.recovered(online)}


def markdown(rows: list[dict]) -> str:
    """The networks and their dynamics, and for each network a table for each number of active latents."""
    alone = [row for row in rows if row["kind"] == DYNAMICS]
    lines = [
        [
            row["process"], f"{row['loss']:.2f}", f"{row['loss_of_mean']:.2f}",
            ", ".join(f"{value:.2f}" for value in row["r2"]),
            *(f"{row[name]:.3f}" for name in ("fvu_online", "fvu_teacher_forced", "recovered")),
        ]
        for row in alone
    ]  # fmt: skip
    heads = ["network", "cross-entropy", "of the mean state", "R² of the dynamics at each later step"]
    heads += ["FVU from the true first state", FIGURES["fvu_teacher_forced"], FIGURES["recovered"]]
    text = [f"The linear dynamics alone, without a code:\n\n{table(heads, lines)}"]
    for one in alone:
        own = [row for row in rows if row["process"] == one["process"] and "each" in row]
        for each in sorted({row["each"] for row in own}):
            lines = []
            for kind in KINDS:
                of = [row for row in own if (row["kind"], row["each"]) == (kind, each)]
                cells = [spread([row[name] for row in of]) for name in list(FIGURES)[1:] if of]
                lines += [[f"`{kind}`", f"{sum(row['l0'] for row in of) / len(of):.1f}", *cells]] if of else []
            count = f"{each * one['steps']} active latents in a trajectory of {one['steps']} steps"
            text.append(f"{one['process'].capitalize()}, {count}:\n\n{table(['kind', *FIGURES.values()], lines)}")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sequences.json"))
    parser.add_argument("--work", type=Path, default=Path("runs/sequences"), help="folder for models and trajectories")
    parser.add_argument("--processes", nargs="*", action=Adding, choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="*", action=Adding, type=int, default=[0, 1, 2])
    parser.add_argument("--each", nargs="*", action=Adding, type=int, default=[1, 8], help="active latents at a step")
    parser.add_argument("--latents", type=int, default=512)
    parser.add_argument("--network-steps", type=int, default=500, help="of training, of a network")
    parser.add_argument("--training-steps", type=int, default=400, help="of a dictionary")
    a = parser.parse_args()
    results = Results(a, [], said_by_rows=("work", "processes"), python=platform.python_version())
    texts = docstrings()
    ids = contexts([text for i, text in enumerate(texts) if i % 10 != 9])
    to_test = contexts([text for i, text in enumerate(texts) if i % 10 == 9])
    for process in a.processes:
        folder = a.work / process
        network = trained(process, ids, a.network_steps, folder / "network.safetensors")
        held, paths = Held(network, to_test[::EVERY]), {}
        for name in ("states", "differences"):
            paths[name] = folder / name / "0.safetensors"
            if not paths[name].exists():
                record(network, ids[::EVERY], paths[name], name == "differences")
        if not results.has(process=process, kind=DYNAMICS):
            loss_of_mean, loss = held.lost
            row = {"process": process, "kind": DYNAMICS, "steps": network.steps, "n": len(held.states)}
            row |= {"loss": round(loss, 4), "loss_of_mean": round(loss_of_mean, 4)}
            results.add(row | held.of_dynamics(load_file(paths["states"])["states"]))
        for name, kinds in PASSES.items():
            asked = recipe(paths[name].parent, kinds, network.steps, a)
            if all(results.has(process=process, dictionary=variant) for variant in asked.variants):
                continue
            run(asked, folder / f"of-{name}", folder / f"work-{name}")
            rows = []
            for variant, settings in asked.variants.items():
                sae = load_dictionary(folder / f"of-{name}" / variant, dtype=torch.float32).sites["states"]
                kind, each, _ = variant.rsplit("-", 2)
                row = {"process": process, "dictionary": variant, "kind": kind, "each": int(each)}
                rows.append(row | {"seed": settings["seed"]} | held.figures(sae, kind == "differences"))
            results.add(*rows)
    results.tell(markdown(results.rows))


if __name__ == "__main__":
    main()
