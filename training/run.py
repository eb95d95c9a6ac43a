"""All stages of a recipe: collect, fit, train, evaluate, save. Each continues where it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from diffusers_rtsae import Dictionary, SparseDictionary, load_dictionary
from diffusers_rtsae.analysis.scorer import FactorScorer
from diffusers_rtsae.denoiser import get_denoiser
from diffusers_rtsae.dictionary import CONFIG_NAME, signature
from diffusers_rtsae.files import whole, write_json
from diffusers_rtsae.models import LinearDynamics

from .common.memory import enough_memory, keep_freed_memory
from .data.collect import anchor_timesteps, collect
from .data.fingerprint import fingerprint
from .data.prompts import Sample, read_samples
from .data.split import Data, stored_data
from .data.store import TrajectoryStore
from .data.stream import Stream
from .evaluation.reconstruction import evaluate
from .loop.checkpoints import Checkpoints
from .loop.dynamics import fit_dynamics
from .loop.loop import train_dictionaries
from .plan import plan
from .recipe import Recipe, bundled


def fitted(recipe: Recipe, site: str, train, validation, path: Path, mark: str) -> tuple[LinearDynamics, dict]:
    """The dynamics of a site, and their R²: read from `path` if its mark is `mark`, else fitted and written."""
    if path.exists():
        tensors = load_file(path)
        facts = json.loads(bytes(tensors.pop("told").tolist()))
        if facts["mark"] == mark:
            dynamics = LinearDynamics(*tensors["mean"].shape)
            dynamics.load_state_dict(tensors)
            return dynamics, facts["fitted"]
    dynamics, fit = fit_dynamics(train, validation, **recipe.fit.model_dump())
    facts = json.dumps({"mark": mark, "fitted": fit}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path, os.getpid()) as partial:  # several processes may fit at once
        save_file(dynamics.state_dict() | {"told": torch.tensor(list(facts), dtype=torch.uint8)}, partial)
    print(f"{site}: R² of the predictors {fit['r2']}", flush=True)
    return dynamics, fit


def announce(recipe: Recipe, samples: int, store: TrajectoryStore) -> None:
    """Print how much disk the collection takes; raise `OSError` if there is too little."""
    try:
        expected = plan(recipe, 1.0)
    except (ValueError, AttributeError, RuntimeError) as error:  # a denoiser that a dry run does not know
        print(f"The size of the collection is not known beforehand: {error}")
        return
    share = samples / recipe.collect.count
    needed = int(sum(site["trajectories_gib"] for site in expected["sites"].values()) * share * 2**30)
    present = sum(path.stat().st_size for path in store.folder.glob("shard-*.safetensors"))
    free = shutil.disk_usage(store.folder).free
    print(f"{samples} pictures, {needed / 2**30:.2f} GiB of trajectories in {store.folder}", flush=True)
    if needed - present > free:
        raise OSError(
            f"{store.folder} has {free / 2**30:.2f} GiB free, {(needed - present) / 2**30:.2f} GiB are needed. Keep "
            "fewer `tokens_per_image` or prompts, choose another --work, or stream (`collect.buffer`)."
        )


def new_accelerator(recipe: Recipe, work: Path, cpu: bool) -> Accelerator:
    """An accelerator for this process, with the recipe's trackers."""
    waits = InitProcessGroupKwargs(timeout=timedelta(days=1))  # for the slowest process to finish collecting
    log_with = recipe.train.log_with
    accelerator = Accelerator(cpu=cpu, log_with=log_with or None, project_dir=work, kwargs_handlers=[waits])
    if log_with:
        accelerator.init_trackers("diffusers-rtsae")
    return accelerator


class Source(NamedTuple):
    """
    What dictionaries are trained on.

    Args:
        data (`Data`): of all sites.
        moments (`dict`): for each site the trajectories to fit its dynamics to, and those to measure R² on.
        mark (`str`): fingerprint of the trajectories.
        stream (`Stream`, *optional*): renews the data while training.
    """

    data: Data
    moments: dict[str, tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]
    mark: str
    stream: Stream | None = None


def load_pipeline(recipe: Recipe, device: torch.device) -> tuple[DiffusionPipeline, list[Sample], list[int]]:
    """The recipe's pipeline, the pictures to make with it, and the timesteps to keep."""
    pipe = DiffusionPipeline.from_pretrained(bundled(recipe.pipeline), dtype=getattr(torch, recipe.dtype))
    pipe.to(device).set_progress_bar_config(disable=True)
    return pipe, read_samples(recipe.collect, recipe.seed), anchor_timesteps(pipe, recipe.collect, recipe.anchors)


def collect_stage(
    recipe: Recipe, work: Path, accelerator: Accelerator, shards: str | None, pipe, samples, anchors
) -> TrajectoryStore:
    """
    Collect this process' shards of the trajectories, and wait for the other processes.

    Args:
        shards (`str`, *optional*): a URL for the shards; `work` then keeps copies of those that are read.
    """
    scorer = FactorScorer.from_pretrained(bundled(recipe.scorer)).to(accelerator.device) if recipe.scorer else None
    made_of = fingerprint(recipe, samples, anchors, pipe, scorer)
    store = TrajectoryStore(shards or work / "trajectories", made_of, cache=work / "trajectories")
    if accelerator.is_main_process:
        announce(recipe, len(samples), store)
    collect(pipe, samples, recipe, anchors, store, scorer, (accelerator.process_index, accelerator.num_processes))
    accelerator.wait_for_everyone()
    return store


def from_disk(recipe: Recipe, store: TrajectoryStore) -> Source:
    """Collected trajectories as a source."""
    data, train, held_out = stored_data(recipe, store)
    moments = {s: ([store.load(p, s) for p in train], [store.load(p, s) for p in held_out]) for s in recipe.sites}
    return Source(data, moments, store.fingerprint)


def from_stream(recipe: Recipe, work: Path, accelerator: Accelerator, pipe, samples, anchors) -> Source:
    """A full buffer of trajectories in memory as a source; a continued run starts with the buffer it had."""
    if accelerator.num_processes > 1:
        raise ValueError("Streaming (`collect.buffer`) runs in one process, as there is one buffer.")
    per_batch = recipe.collect.batch_size * recipe.collect.tokens_per_image
    held = max(2, round(recipe.train.validation * recipe.collect.buffer / per_batch))
    stream = Stream(pipe, samples, recipe, anchors, held)
    made_of = fingerprint(recipe, samples, anchors, pipe, None)
    halves = stream.held_out_halves(work / "held-out.safetensors", made_of)
    latest = Checkpoints(work / "checkpoints", recipe.train.checkpoints).latest()
    if latest is not None:
        stream.load(latest / "stream.safetensors")
    while not stream.is_full:
        stream.renew()
    moments = {site: (stream.buffer[site].split(8192), [half[site] for half in halves]) for site in recipe.sites}
    return Source(Data(stream.buffer, *halves), moments, made_of, stream)


def run(
    recipe: Recipe, out: Path, work: Path, accelerator: Accelerator | None = None, shards: str | None = None
) -> dict[str, Dictionary]:
    """
    All stages of a recipe.

    Returns:
        the dictionaries by the names of the recipe's variants, saved in `out/<name>`; without variants one dictionary
        named `""`, saved in `out`.
    """
    accelerator = accelerator or new_accelerator(recipe, work, cpu=not torch.cuda.is_available())
    pipe, samples, anchors = load_pipeline(recipe, accelerator.device)
    if recipe.collect.buffer is None:
        source = from_disk(recipe, collect_stage(recipe, work, accelerator, shards, pipe, samples, anchors))
    else:
        source = from_stream(recipe, work, accelerator, pipe, samples, anchors)
    variants = {name: recipe.variant(name) for name in recipe.variants} or {"": recipe}
    names, dynamics, facts = {}, {}, {}
    for variant, settings in variants.items():
        for site in recipe.sites:
            mark = json.dumps([source.mark, settings.fit.model_dump()], sort_keys=True)
            digest = hashlib.blake2b(mark.encode(), digest_size=6).hexdigest()
            name = f"{variant}/{site}".lstrip("/").replace("/", "@")
            names[name] = variant, site
            with accelerator.main_process_first():
                path = work / "dynamics" / f"{site}-{digest}.safetensors"
                dynamics[name], facts[name] = fitted(settings, site, *source.moments[site], path, mark)
    folder = work / "checkpoints"

    def remedy() -> str:
        latest = Checkpoints(folder, 1).latest()
        return (
            "Free the device and run the same command again, which continues from "
            f"{latest or 'the trajectories, as there was no checkpoint yet'}; or raise `train.accumulate`, lower "
            f"`train.batch_size` or `train.num_latents`, and delete {folder}: trajectories are kept."
        )

    with enough_memory("training", remedy):
        trained = train_dictionaries(
            {name: variants[variant] for name, (variant, _) in names.items()}, source.data, dynamics,
            {name: site for name, (_, site) in names.items()}, anchors, work, accelerator, source.mark, source.stream,
        )  # fmt: skip
    saved = {}
    for variant, settings in variants.items() if accelerator.is_main_process else ():
        sites, report = {}, {}
        for name, (whose, site) in names.items():
            if whose == variant:
                sites[site] = trained[name]
                held_out = source.data.validation[site].float()
                report[site] = facts[name] | evaluate(trained[name], held_out, settings.train.k)
        print(json.dumps(report, indent=2))
        saved[variant] = save(settings, sites, report, out / variant, pipe, anchors)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return saved


def save(
    recipe: Recipe, sites: dict[str, SparseDictionary], report: dict, out: Path, pipe, anchors: list[int]
) -> Dictionary:
    """Write the dictionary of trained `sites`. Labels and presets in `out` stay if they belong to the same weights."""
    config = {
        "base_model": recipe.base_model, "license": recipe.license, "signature": signature(get_denoiser(pipe)),
        "anchors": anchors, "recipe": recipe.model_dump(), "sampler": type(pipe.scheduler).__name__, "metrics": report,
        "prediction_type": pipe.scheduler.config.get("prediction_type", "flow"),
    }  # fmt: skip
    before = _unchanged(sites, out)
    contents = (before.labels, config, before.presets, before.maps) if before else ({}, config)
    dictionary = Dictionary(sites, *contents)
    dictionary.save(out)
    write_json(out / "metrics.json", report)
    return dictionary


def _unchanged(sites: dict[str, SparseDictionary], folder: Path) -> Dictionary | None:
    """The dictionary in `folder`, if it has the same weights, so that its labels and presets are still right."""
    if not (folder / CONFIG_NAME).exists():
        return None
    try:
        before = load_dictionary(folder)
    except (OSError, ValueError):  # of another version, or damaged: it will be replaced
        return None
    same = before.sites.keys() == sites.keys() and all(
        torch.equal(before.sites[site].encoder.half(), sites[site].encoder.half()) for site in sites
    )
    return before if same else None


def run_all(recipe: Recipe, out: Path | None, work: Path, shards: str | None, cpu: bool, collect_only: bool) -> None:
    """The command `train` or `collect`, once its arguments are checked."""
    keep_freed_memory()
    accelerator = new_accelerator(recipe, work, cpu or not torch.cuda.is_available())
    if collect_only:
        collect_stage(recipe, work, accelerator, shards, *load_pipeline(recipe, accelerator.device))
    else:
        run(recipe, out, work, accelerator, shards)
