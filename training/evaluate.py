"""How well dictionaries describe held-out trajectories, and what the denoiser makes of their reconstruction.

    python -m training.evaluate examples/shapes-rtsae --pipeline examples/shapes-sd --prompts shapes --out runs/report

Works with any pipeline and dictionary; writes `report.json`, `report.md` and plots.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_rtsae import RTSAE, SparseDictionary, load_dictionary
from diffusers_rtsae.analysis.record import Recorder
from diffusers_rtsae.denoiser import Arguments, Block, Call, Tap, get_denoisers
from diffusers_rtsae.files import write_json
from diffusers_rtsae.pipeline import own_size

from .collect import anchor_timesteps, trajectories
from .dictionary import residual_code
from .prompts import read_samples
from .recipe import Collect, Recipe, bundled


class Unexplained:
    """Fraction of variance unexplained, from streamed sums: per anchor, and over all anchors (ratio of sums)."""

    def __init__(self):
        self.count, self.error, self.total, self.sum = 0, 0.0, 0.0, 0.0

    def add(self, found: torch.Tensor, wanted: torch.Tensor) -> None:
        """`found` instead of `wanted`, both `(tokens, G, d)`."""
        self.count += len(wanted)
        self.error += (found - wanted).double().square().sum((0, 2))
        self.total += wanted.double().square().sum((0, 2))
        self.sum += wanted.double().sum(0)

    def result(self) -> tuple[list[float], float]:
        variance = self.total - self.sum.square().sum(1) / self.count
        return [round(v, 4) for v in (self.error / variance).tolist()], round(
            (self.error.sum() / variance.sum()).item(), 4
        )


@torch.no_grad()
def evaluate(sae: SparseDictionary, trajectories: torch.Tensor, k: int) -> dict:
    """
    Reconstruction, sparsity and causality of a dictionary.

    Args:
        trajectories (`torch.Tensor`): `(tokens, G, d)`, not trained on.
        k (`int`): latents that BatchTopK keeps, for comparison with the threshold.

    Returns:
        `dict`: FVU of the activation per anchor and over all, where anchors are weighed by their own variance (each
        divided by its spread): `online` rolls the reconstruction out from the first anchor, `teacher_forced` predicts
        each anchor from the true one before; of a kind that predicts nothing the two are the same. L0 of a trajectory
        or, of a kind that has a code for each step, of a step; share of latents that never fired when their statistics
        were measured; cosine of the online reconstruction, of the whole and per anchor. Of an RTSAE also the FVU of
        the residuals, L0 with BatchTopK, and how well the code of each prefix agrees with the whole: cosine of the
        codes, and the share of the whole code's active latents that the prefix finds.
    """
    anchors, spread, is_whole = len(sae.config.anchors), sae.spread[:, None], isinstance(sae, RTSAE)
    unexplained = {name: Unexplained() for name in ("residual", "online", "teacher_forced")}
    device = sae.encoder.device
    sums, topk_l0 = torch.zeros(3, anchors, device=device), 0.0
    cosine, cosines, length = 0.0, torch.zeros(anchors, device=device), max(256, 2**23 // sae.config.num_latents)
    for part in trajectories.split(length):
        part = part.to(device, torch.float32)
        codes = [sae.encode(part[:, : g + 1]) for g in range(anchors)]
        online, forced = sae.reconstruct(part), sae.reconstruct(part, teacher_forced=True)
        unexplained["online"].add(online / spread, part / spread)
        unexplained["teacher_forced"].add(forced / spread, part / spread)
        cosine += torch.cosine_similarity((online / spread).flatten(1), (part / spread).flatten(1)).sum().item()
        cosines += torch.cosine_similarity(online, part, dim=2).sum(0)
        if is_whole:
            residuals = sae.dynamics.residuals(part)
            unexplained["residual"].add(sae.decode_residuals(codes[-1]), residuals)
            topk_l0 += (residual_code(sae, residuals, k).values > 0).sum().item()
        for g, code in enumerate(codes):
            both = ((code > 0) & (codes[-1] > 0)).sum()
            sums[:, g] += torch.stack([torch.cosine_similarity(code, codes[-1]).sum(), both, (code > 0).sum()])
    count = len(trajectories)
    agreement, found, l0 = sums / count
    result = {"tokens": count}
    for name, of in unexplained.items():
        if of.count:
            result[f"fvu_{name}_per_anchor"], result[f"fvu_{name}"] = of.result()
    result |= {
        "cosine_online": round(cosine / count, 4),
        "cosine_online_per_anchor": [round(v, 4) for v in (cosines / count).tolist()],
        "l0_threshold": round((l0[-1] if is_whole else l0.mean()).item(), 2),
        "dead": round((sae.density == 0).float().mean().item(), 4),
    }
    if not is_whole:
        return result | {"l0_per_anchor": [round(v, 2) for v in l0.tolist()]}
    return result | {
        "l0_batch_topk": round(topk_l0 / count, 2),
        "prefix_cosine": [round(v, 4) for v in agreement.tolist()],
        "prefix_recall": [round(v, 4) for v in (found / l0[-1]).tolist()],
        "prefix_l0": [round(v, 2) for v in l0.tolist()],
    }


@torch.no_grad()
def timing(sae: SparseDictionary) -> dict:
    """
    When features act: histograms over anchors of the peak, onset and lifetime of the latents that are alive (see
    `SparseDictionary.feature_times`); the first number of lifetime is of those that last one anchor.
    """
    times, anchors = sae.feature_times(sae.density > 0), len(sae.config.anchors)
    found = {"peak": times.peak, "onset": times.onset, "lifetime": times.lifetime - 1}
    return {name: torch.bincount(values, minlength=anchors).tolist() for name, values in found.items()}


@torch.no_grad()
def stability(saes: Sequence[SparseDictionary]) -> float:
    """
    Mean over ordered pairs of dictionaries of how well the features of one are found in the other: the largest cosine
    between their whole trajectories, weighed by how often a feature is active.
    """
    paths = []
    for sae in saes:
        path = (sae.feature_trajectories() / sae.spread[:, None]).flatten(1)
        paths.append(torch.nn.functional.normalize(path, dim=1))
    found = []
    for i, a in enumerate(paths):
        weight = saes[i].density / saes[i].density.sum()
        found += [(weight * (a @ b.T).amax(1)).sum().item() for j, b in enumerate(paths) if j != i]
    return round(sum(found) / len(found), 4)


class _Calls:
    """Keeps a denoiser's conditional calls at chosen timesteps (to the nearest integer) while a pipeline runs."""

    def __init__(self, timesteps: Sequence[int]):
        self.timesteps, self.kept, self.tap = timesteps, {}, Tap(self)

    def begin(self, call: Call, arguments: Arguments) -> None:
        """The denoiser is called."""
        if call.rows_of("cond", call.rows) is not None and (timestep := round(call.timestep)) in self.timesteps:
            self.kept[timestep] = call, self.tap.last.component, arguments.args, arguments.kwargs


def _with(
    block: Block,
    hidden_states: torch.Tensor,
    block_input: torch.Tensor,
    rows: slice,
    new: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """What a block goes on with, with another activation `(rows, tokens, d)` on some rows of the batch."""
    edited, index = hidden_states.clone(), block.rows(hidden_states, rows)
    if activation == "update":
        new = new.to(block_input) + block.to_tokens(block_input[index])
    edited[index] = block.from_tokens(new, hidden_states[index])
    return edited


class _Replacing:
    """A site whose activation, on the conditional rows of a call, is `new (rows, tokens, d)`."""

    def __init__(self, call: Call, new: torch.Tensor, activation: str):
        self.call, self.new, self.activation, self.tap = call, new, activation, Tap(self)

    def begin(self, call: Call, arguments: Arguments) -> None:
        """The denoiser is called again, by nobody who says what its rows are."""

    def site(
        self, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """The activation with the new one in it."""
        rows = self.call.rows_of("cond", block.batch(hidden_states))
        return _with(block, hidden_states, block_input, rows, self.new, self.activation)


class Reconstructing:
    """At a dictionary's anchors a site's conditional activation is its reconstruction from what it was until then,
    while a pipeline runs inside the `with` block."""

    def __init__(self, pipe: DiffusionPipeline, sae: SparseDictionary):
        self.sae, self.denoisers, self.tap, self.seen = sae, get_denoisers(pipe), Tap(self), {}

    def __enter__(self):
        self.tap.watch(self.denoisers, [self.sae.config.site])
        return self

    def __exit__(self, *error):
        self.tap.watch(self.denoisers, None)

    def begin(self, call: Call, arguments: Arguments) -> None:
        """The denoiser is called."""

    def site(
        self, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor | None:
        """The activation with its reconstruction in it."""
        timestep, anchors = round(call.timestep), list(self.sae.config.anchors)
        rows, activation = call.rows_of("cond", block.batch(hidden_states)), self.sae.config.activation
        if rows is None or timestep not in anchors:
            return None
        anchor = anchors.index(timestep)
        # a sampler may call twice at one step: the later call stands
        self.seen = {g: own for g, own in self.seen.items() if g < anchor}
        tokens = block.activation(activation, block_input, hidden_states)[rows]
        self.seen[anchor] = tokens.to(self.sae.encoder.device, torch.float32)
        known = torch.stack(list(self.seen.values()), 2)
        new = self.sae.reconstruct(known.flatten(0, 1))[:, -1].unflatten(0, known.shape[:2])
        return _with(block, hidden_states, block_input, rows, new, activation)


@torch.no_grad()
def recovered(pipe: DiffusionPipeline, sae: SparseDictionary, prompts: Sequence[str], generators=None, **call) -> dict:
    """
    What the denoiser predicts when a site's activation is replaced by its reconstruction.

    At each anchor of a plain generation the denoiser is called again on the same input, with the conditional rows of
    the site replaced: by the reconstruction from what is known by then, rolled out (`online`) or from the true
    activation before (`teacher_forced`); and by the mean activation of these pictures, which is what 0 stands for.

    Returns:
        `dict`: the share of the mean replacement's error in the noise prediction that the reconstruction recovers, 1
        is all: per anchor, and over all (ratio of sums).
    """
    denoisers, anchors = get_denoisers(pipe), list(sae.config.anchors)
    calls = _Calls(anchors)
    with (
        calls.tap.watching(denoisers, []),
        Recorder(pipe, [sae.config.site], anchors, sae.config.activation) as recorder,
    ):
        pipe(list(prompts), generator=generators, output_type="latent", **own_size(pipe) | call)
    whole = recorder.trajectories(sae.config.site)
    if whole.shape[2] != len(anchors):
        raise ValueError(f"The sampler visited {recorder.timesteps}, not all anchors {anchors}: give its step count.")
    images, tokens = whole.shape[:2]
    h = whole.flatten(0, 1).to(sae.encoder.device)
    errors = {name: torch.zeros(len(anchors), dtype=torch.float64) for name in ("online", "teacher_forced", "mean")}
    for g, timestep in enumerate(anchors):
        call, component, args, kwargs = calls.kept[timestep]
        denoiser = denoisers[component]
        known = h[:, : g + 1]
        replacements = {
            "online": sae.reconstruct(known)[:, g],
            "teacher_forced": sae.reconstruct(known, teacher_forced=True)[:, g],
            "mean": h[:, g].mean(0).expand(len(h), -1),
        }
        truth = denoiser(*args, **kwargs)[0].float()
        rows = call.rows_of("cond", len(truth))
        for name, replacement in replacements.items():
            new = replacement.unflatten(0, (images, tokens)).to(truth.device)
            replacing = _Replacing(call, new, sae.config.activation)
            with replacing.tap.watching({component: denoiser}, [sae.config.site]):
                found = denoiser(*args, **kwargs)[0].float()
            errors[name][g] += (found[rows] - truth[rows]).double().square().mean().item()
    result = {}
    for name in ("online", "teacher_forced"):
        result[f"recovered_{name}_per_anchor"] = [round(v, 4) for v in (1 - errors[name] / errors["mean"]).tolist()]
        result[f"recovered_{name}"] = round((1 - errors[name].sum() / errors["mean"].sum()).item(), 4)
    return result


def report(found: dict[str, dict], folder: Path) -> None:
    """Write `report.json`, `report.md` and `report.png` of the figures of several dictionaries (or sites) by name."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", found)
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    titles = ("FVU, teacher-forced", "FVU, rolled out", "noise prediction recovered, rolled out")
    keys = ("fvu_teacher_forced_per_anchor", "fvu_online_per_anchor", "recovered_online_per_anchor")
    for axis, title, key in zip(axes, titles, keys, strict=True):
        for name, figures in found.items():
            if key in figures:
                axis.plot(range(len(figures[key])), figures[key], marker="o", label=name)
        axis.set_title(title, fontsize=9)
        axis.set(xlabel="anchor (noise → image)", ylim=(0, 1 if "recovered" in key else None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(folder / "report.png", dpi=120)
    plain = [key for key in next(iter(found.values())) if not isinstance(next(iter(found.values()))[key], list | dict)]
    lines = ["| | " + " | ".join(found) + " |", "| --- |" + " --- |" * len(found)]
    lines += [
        f"| {key} | " + " | ".join(str(figures.get(key, "–")) for figures in found.values()) + " |" for key in plain
    ]
    (folder / "report.md").write_text("\n".join(["# Dictionaries", "", *lines, "", "![Per anchor](report.png)", ""]))


@torch.no_grad()
def evaluate_pipeline(pipe: DiffusionPipeline, sae: SparseDictionary, collect: Collect, seed: int = 1) -> dict:
    """All figures of one dictionary, on pictures a pipeline makes now from the prompts of `collect`."""
    anchors = anchor_timesteps(pipe, collect, list(sae.config.anchors))
    train = {"num_latents": 1, "k": 1, "steps": 1, "batch_size": 1, "learning_rate": 1.0}
    recipe = Recipe(
        pipeline="", base_model="", seed=seed, sites=[sae.config.site], anchors=anchors,
        activation=sae.config.activation, collect=collect, train=train,
    )  # fmt: skip
    samples, rows, shares = read_samples(collect, seed), [], []
    for start in range(0, len(samples), collect.batch_size):
        part = samples[start : start + collect.batch_size]
        rows.append(trajectories(pipe, part, start, recipe, anchors)[0][sae.config.site])
        if len(shares) * collect.batch_size < 32:  # three more calls an anchor each
            generators = [torch.Generator().manual_seed(sample.seed) for sample in part]
            prompts = [sample.prompt for sample in part]
            call = {"num_inference_steps": collect.steps, "guidance_scale": collect.guidance(start)}
            shares.append(recovered(pipe, sae, prompts, generators, **call))
    found = evaluate(sae, torch.cat(rows).float(), sae.config.k)
    for key in shares[0]:
        values = torch.tensor([share[key] for share in shares])
        found[key] = (
            [round(v, 4) for v in values.mean(0).tolist()] if values.ndim > 1 else round(values.mean().item(), 4)
        )
    return found | timing(sae)


def evaluate_all(
    dictionaries: Sequence[str], pipeline: str, collect: Collect, seed: int, out: Path, device: str | None = None
) -> None:
    """A report of several dictionaries of one pipeline, on pictures from the prompts of `collect`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = DiffusionPipeline.from_pretrained(bundled(pipeline)).to(device)
    pipe.set_progress_bar_config(disable=True)
    found = {}
    for source in dictionaries:
        dictionary = load_dictionary(bundled(source), dtype=torch.float32)
        for site, sae in dictionary.sites.items():
            name = site if len(dictionaries) == 1 else f"{Path(source).name} {site}"
            found[name] = evaluate_pipeline(pipe, sae, collect, seed)
            print(name, json.dumps(found[name]), flush=True)
    report(found, out)


if __name__ == "__main__":
    from . import commands

    commands.evaluate()
