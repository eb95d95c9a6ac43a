"""Train the dictionaries of a recipe: collect, fit, train, evaluate, save.

    python -m training.train training/recipes/shapes.yaml --out examples/shapes-rtsae
    accelerate launch -m training.train training/recipes/shapes.yaml --out runs/dictionary

Every stage continues where it was stopped; a GPU is used if there is one, several processes share the work.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from diffusers_rtsae import RTSAE, Dictionary, load_dictionary
from diffusers_rtsae.analysis.scorer import FactorScorer
from diffusers_rtsae.denoiser import get_denoiser
from diffusers_rtsae.dictionary import CONFIG_NAME, signature
from diffusers_rtsae.files import whole, write_json
from diffusers_rtsae.models import LinearDynamics

from .checkpoint import Checkpoints, step_generator
from .collect import anchor_timesteps, collect
from .dictionary import DictionaryTrainer, calibrate, measure_activations, new_dictionary
from .evaluate import evaluate
from .fingerprint import fingerprint
from .fit import fit_dynamics
from .memory import enough_memory, keep_freed_memory
from .plan import plan
from .processes import ALONE, Processes
from .prompts import Sample, read_samples
from .recipe import Recipe, bundled
from .store import Rows, TrajectoryStore, told_of
from .stream import Stream
from .watch import Watch

STATISTICS_TOKENS = 200_000  # whose activations make the statistics of the latents
MEASURED_TOKENS = 16_384  # that set thresholds, and that figures are measured on


class Data:
    """
    Trajectories of each site: to train on, with what is told of them, and from other pictures to set thresholds on
    (`calibration`) and to measure on (`validation`).
    """

    def __init__(
        self,
        train: dict[str, Rows | torch.Tensor],
        calibration: dict[str, torch.Tensor],
        validation: dict[str, torch.Tensor],
    ):
        self.train, self.calibration, self.validation = train, calibration, validation

    def sample(
        self, site: str, count: int, generator: torch.Generator, processes: Processes = ALONE
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A process' share of `count` random trajectories, with row, column and guidance `(rows, 3)` of each."""
        chosen = processes.share(torch.randint(len(self.train[site]), (count,), generator=generator))
        return self.train[site][chosen], self.train[told_of(site)][chosen]


def stored_data(recipe: Recipe, store: TrajectoryStore) -> tuple[Data, list[Path], list[Path]]:
    """The data of a filled store, and its shards: to train on, and held out."""
    shards = store.shards()
    held = max(1, round(recipe.train.validation * len(shards)))
    if held >= len(shards):
        raise ValueError(
            f"{store.folder} holds {len(shards)} shards: two are needed, one to train on and one held out."
        )
    train = {name: store.rows(shards[:-held], name) for site in recipe.sites for name in (site, told_of(site))}
    generator, halves = torch.Generator().manual_seed(recipe.seed), ({}, {})
    for site in recipe.sites:
        rows = store.rows(shards[-held:], site)
        picture = torch.cat([store.load_origin(shard, site)[0] for shard in shards[-held:]])
        for side, half in enumerate(halves):
            own = (picture % 2 == side).nonzero()[:, 0]
            half[site] = rows[own[torch.randperm(len(own), generator=generator)[:MEASURED_TOKENS]]]
    if not all(len(half[site]) for half in halves for site in recipe.sites):
        raise ValueError(
            f"{store.folder} holds out one picture only, two are needed: collect more, or raise `validation`."
        )
    return Data(train, *halves), shards[:-held], shards[-held:]


def fitted(recipe: Recipe, site: str, train, validation, path: Path, mark: str) -> tuple[LinearDynamics, dict]:
    """The dynamics of a site: those in `path` if they belong to this run, else fitted and written there."""
    if path.exists():
        tensors = load_file(path)
        facts = json.loads(bytes(tensors.pop("told").tolist()))
        if facts["mark"] == mark:
            dynamics = LinearDynamics(*tensors["mean"].shape)
            dynamics.load_state_dict(tensors)
            return dynamics, facts["fitted"]
    dynamics, found = fit_dynamics(train, validation, **recipe.fit.model_dump())
    facts = json.dumps({"mark": mark, "fitted": found}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path, os.getpid()) as partial:  # every process may fit
        save_file(dynamics.state_dict() | {"told": torch.tensor(list(facts), dtype=torch.uint8)}, partial)
    print(f"{site}: R² of the predictors {found['r2']}", flush=True)
    return dynamics, found


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on a device, for which the host need not wait."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def train_dictionaries(
    recipes: dict[str, Recipe],
    data: Data,
    dynamics: dict[str, LinearDynamics],
    sites: dict[str, str],
    anchors: list[int],
    work: Path,
    accelerator: Accelerator,
    collected: str,
    stream: Stream | None = None,
) -> dict[str, RTSAE]:
    """
    Train several dictionaries on one pass over the data, the latents of each shared among the processes.

    Args:
        recipes, dynamics, sites: for each dictionary by name, its own recipe, dynamics and site.
        collected (`str`): how the data came about; a checkpoint of other data is refused.

    Returns:
        the dictionaries by name, on the main process; on others none.
    """
    device, first = accelerator.device, next(iter(recipes.values()))
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    marks, trainers = {}, {}
    for name, recipe in recipes.items():
        sae = new_dictionary(sites[name], anchors, recipe, dynamics[name])
        sample, _ = data.sample(sites[name], 8192, step_generator(recipe.seed, -1))
        trainers[name] = DictionaryTrainer(sae, recipe.train, dynamics[name], sample.float(), device, processes)
        own = recipe.train.model_dump(exclude={"checkpoints", "checkpoint_every", "validate_every", "log_with"})
        mark = {"trajectories": collected, "seed": recipe.seed, "fit": recipe.fit.model_dump(), "train": own}
        marks[name] = json.dumps(mark, sort_keys=True)
    checkpoints = Checkpoints(work / "checkpoints", first.train.checkpoints, processes)
    done, steps = checkpoints.load(trainers, marks, stream), max(r.train.steps for r in recipes.values())
    renew_every = None
    if stream is not None:
        per_batch = first.collect.batch_size * first.collect.tokens_per_image
        renew_every = max(1, round(per_batch * first.collect.reuse / first.train.batch_size))
    progress = tqdm(
        range(done, steps), initial=done, total=steps, desc="train", unit="step", mininterval=5,
        disable=not accelerator.is_main_process,
    )  # fmt: skip
    watch, began = Watch(accelerator, work, done), time.perf_counter()
    for step in progress:
        if stream is not None and step > 0 and step % renew_every == 0:
            stream.renew()
        batches, prefixed = {}, {}
        for name, trainer in trainers.items():
            settings, site = trainer.settings, sites[name]
            if step >= settings.steps:
                continue
            if site not in batches:
                generator = step_generator(first.seed, step)
                sample = data.sample(site, first.train.batch_size, generator, processes)
                batches[site] = [copied(tensor, device).float() for tensor in sample]
                shown = int(torch.randint(1, len(anchors), (), generator=generator))
                prefixed[site] = shown, torch.rand((), generator=generator).item()
            shown, draw = prefixed[site]
            prefix = shown if draw < settings.prefix else None
            trajectories, told = batches[site]
            inputs = processes.whole(trainer.inputs(trajectories), first.train.batch_size)
            told = processes.whole(told, first.train.batch_size)
            parts = zip(inputs.chunk(settings.accumulate), told.chunk(settings.accumulate), strict=True)
            found = [trainer.backward(part, prefix, len(part) / len(inputs), of) for part, of in parts]
            trainer.update(step)
            validates = (step + 1) % settings.validate_every == 0 or step + 1 == settings.steps
            if validates or (step + 1) % first.train.checkpoint_every == 0:
                trainer.check()
            if trainer.failure is not None:
                failed, loss = trainer.failure
                raise ValueError(
                    f"The loss of {name} is {loss} at step {failed}. Lower `learning_rate` and delete "
                    f"{checkpoints.folder}."
                )
            if validates:
                rate = (step + 1 - done) * first.train.batch_size / (time.perf_counter() - began)
                validation = data.validation[site][:4096].float().to(device)
                seen = watch(step + 1, name, trainer, found[-1], validation, rate)
                progress.set_postfix(fvu=f"{seen['fvu_validation']:.3f}", dead=f"{seen['dead']:.1%}")
        if (step + 1) % first.train.checkpoint_every == 0 or step + 1 == steps:
            checkpoints.save(step + 1, trainers, marks, stream)
    finished = {}
    for name, trainer in trainers.items():
        rtsae, site, settings = trainer.finish(), sites[name], trainer.settings
        if not accelerator.is_main_process:
            continue
        calibrate(rtsae, data.calibration[site].float().to(device), settings.k, settings.layout)
        rows, size = data.train[site], max(256, 2**23 // rtsae.config.num_latents)
        measured = torch.arange(min(len(rows), STATISTICS_TOKENS))
        measure_activations(rtsae, (rows[part].float() for part in measured.split(size)))
        finished[name] = rtsae.cpu()
    return finished


def announce(recipe: Recipe, samples: int, store: TrajectoryStore) -> None:
    """Say how much disk the collection takes; raise `OSError` before it starts if there is too little."""
    try:
        found = plan(recipe, 1.0)
    except (ValueError, AttributeError, RuntimeError) as error:  # a denoiser that a dry run does not know
        print(f"The size of the collection is not known beforehand: {error}")
        return
    share = samples / recipe.collect.count
    needed = int(sum(site["trajectories_gib"] for site in found["sites"].values()) * share * 2**30)
    there = sum(path.stat().st_size for path in store.folder.glob("shard-*.safetensors"))
    free = shutil.disk_usage(store.folder).free
    print(f"{samples} pictures, {needed / 2**30:.2f} GiB of trajectories in {store.folder}", flush=True)
    if needed - there > free:
        raise OSError(
            f"{store.folder} has {free / 2**30:.2f} GiB free, {(needed - there) / 2**30:.2f} GiB are needed. Keep "
            "fewer `tokens_per_image` or prompts, choose another --work, or stream (`collect.buffer`)."
        )


def new_accelerator(recipe: Recipe, work: Path, cpu: bool) -> Accelerator:
    """The process' share of the devices, and the recipe's trackers."""
    waits = InitProcessGroupKwargs(timeout=timedelta(days=1))  # for the slowest to have collected
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
        moments (`dict`): for each site the parts to fit its dynamics to, and those to judge them on.
        mark (`str`): what the trajectories were made of.
        stream (`Stream`, *optional*): that renews the data while training.
    """

    data: Data
    moments: dict[str, tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]
    mark: str
    stream: Stream | None = None


def load_pipeline(recipe: Recipe, device: torch.device) -> tuple[DiffusionPipeline, list[Sample], list[int]]:
    """The recipe's pipeline, the pictures to make with it, and the timesteps to keep of each."""
    pipe = DiffusionPipeline.from_pretrained(bundled(recipe.pipeline), dtype=getattr(torch, recipe.dtype))
    pipe.to(device).set_progress_bar_config(disable=True)
    return pipe, read_samples(recipe.collect, recipe.seed), anchor_timesteps(pipe, recipe.collect, recipe.anchors)


def collect_stage(
    recipe: Recipe, work: Path, accelerator: Accelerator, shards: str | None, pipe, samples, anchors
) -> TrajectoryStore:
    """
    Every process makes its shards of the trajectories, and waits for the others.

    Args:
        shards (`str`, *optional*): a URL they are at; then `work` keeps a copy of what is used.
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
    """The collected trajectories."""
    data, train, held_out = stored_data(recipe, store)
    moments = {s: ([store.load(p, s) for p in train], [store.load(p, s) for p in held_out]) for s in recipe.sites}
    return Source(data, moments, store.fingerprint)


def from_stream(recipe: Recipe, work: Path, accelerator: Accelerator, pipe, samples, anchors) -> Source:
    """A buffer of trajectories in memory, full to begin with, or as it was when training stopped."""
    if accelerator.num_processes > 1:
        raise ValueError("Streaming (`collect.buffer`) runs in one process: its buffer is one.")
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
        the dictionaries by the names of the recipe's variants, saved in `out/<name>`; without variants one, in `out`.
    """
    accelerator = accelerator or new_accelerator(recipe, work, cpu=not torch.cuda.is_available())
    pipe, samples, anchors = load_pipeline(recipe, accelerator.device)
    if recipe.collect.buffer is None:
        source = from_disk(recipe, collect_stage(recipe, work, accelerator, shards, pipe, samples, anchors))
    else:
        source = from_stream(recipe, work, accelerator, pipe, samples, anchors)
    variants = {name: recipe.variant(name) for name in recipe.variants} or {"": recipe}
    names, dynamics, facts = {}, {}, {}
    for variant, own in variants.items():
        for site in recipe.sites:
            mark = json.dumps([source.mark, own.fit.model_dump()], sort_keys=True)
            digest = hashlib.blake2b(mark.encode(), digest_size=6).hexdigest()
            name = f"{variant}/{site}".lstrip("/").replace("/", "@")
            names[name] = variant, site
            with accelerator.main_process_first():
                path = work / "dynamics" / f"{site}-{digest}.safetensors"
                dynamics[name], facts[name] = fitted(own, site, *source.moments[site], path, mark)
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
    for variant, own in variants.items() if accelerator.is_main_process else ():
        sites, report = {}, {}
        for name, (whose, site) in names.items():
            if whose == variant:
                sites[site] = trained[name]
                report[site] = facts[name] | evaluate(trained[name], source.data.validation[site].float(), own.train.k)
        print(json.dumps(report, indent=2))
        saved[variant] = save(own, sites, report, out / variant, pipe, anchors)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return saved


def save(recipe: Recipe, sites: dict[str, RTSAE], report: dict, out: Path, pipe, anchors: list[int]) -> Dictionary:
    """Write the dictionary of trained `sites`; labels that are there stay if they are of these very weights."""
    config = {
        "base_model": recipe.base_model, "license": recipe.license, "signature": signature(get_denoiser(pipe)),
        "anchors": anchors, "recipe": recipe.model_dump(), "sampler": type(pipe.scheduler).__name__, "metrics": report,
        "prediction_type": pipe.scheduler.config.get("prediction_type", "flow"),
    }  # fmt: skip
    before = _unchanged(sites, out)
    kept = (before.labels, config, before.presets, before.maps) if before else ({}, config)
    dictionary = Dictionary(sites, *kept)
    dictionary.save(out)
    write_json(out / "metrics.json", report)
    return dictionary


def _unchanged(sites: dict[str, RTSAE], folder: Path) -> Dictionary | None:
    """What `folder` holds, if these are its very dictionaries, so that its labels and presets still hold."""
    if not (folder / CONFIG_NAME).exists():
        return None
    try:
        before = load_dictionary(folder)
    except (OSError, ValueError):  # of another version, or damaged: about to be replaced
        return None
    same = before.sites.keys() == sites.keys() and all(
        torch.equal(before.sites[site].encoder.half(), sites[site].encoder.half()) for site in sites
    )
    return before if same else None


def run_all(recipe: Recipe, out: Path | None, work: Path, shards: str | None, cpu: bool, collect_only: bool) -> None:
    """What the command does, once it knows what it is told."""
    keep_freed_memory()
    accelerator = new_accelerator(recipe, work, cpu or not torch.cuda.is_available())
    if collect_only:
        collect_stage(recipe, work, accelerator, shards, *load_pipeline(recipe, accelerator.device))
    else:
        run(recipe, out, work, accelerator, shards)


if __name__ == "__main__":
    from . import commands

    commands.train()
