"""All stages of a recipe: collect, fit, train, evaluate, save. Each continues where it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
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
from .data.sequences import Sequences, read_folder, read_tensors
from .data.split import Data, stored_data
from .data.store import TrajectoryStore
from .data.stream import Stream
from .evaluation.reconstruction import evaluate
from .loop.checkpoints import Checkpoints
from .loop.dynamics import fit_dynamics
from .loop.loop import train_dictionaries
from .plan import plan
from .recipe import Recipe, bundled, checked, section_of


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
        anchors (`list[int]`): descending timesteps, or the steps 0, 1, … of another process than denoising.
        about (`dict`): what a dictionary's configuration says of the trajectories.
        stream (`Stream`, *optional*): renews the data while training.
    """

    data: Data
    moments: dict[str, tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]]
    mark: str
    anchors: list[int]
    about: dict
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


def about(pipe: DiffusionPipeline) -> dict:
    """What a dictionary's configuration says of a pipeline."""
    return {
        "signature": signature(get_denoiser(pipe)), "sampler": type(pipe.scheduler).__name__,
        "prediction_type": pipe.scheduler.config.get("prediction_type", "flow"),
    }  # fmt: skip


def from_disk(recipe: Recipe, store: TrajectoryStore, pipe: DiffusionPipeline, anchors: list[int]) -> Source:
    """Collected trajectories as a source."""
    data, train, held_out = stored_data(recipe, store)
    moments = {s: ([store.load(p, s) for p in train], [store.load(p, s) for p in held_out]) for s in recipe.sites}
    return Source(data, moments, store.fingerprint, anchors, about(pipe))


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
    return Source(Data(stream.buffer, *halves), moments, made_of, anchors, about(pipe), stream)


def from_sequences(recipe: Recipe, sequences: Sequences) -> Source:
    """Trajectories of another process as a source."""
    steps = {name: sequences.steps(name) for name in sequences.parts}
    if len(set(steps.values())) > 1:
        raise ValueError(f"Expected trajectories of one length, got steps {steps}: train these in a run each.")
    anchors = list(range(next(iter(steps.values()))))
    for settings in recipe.each().values():
        settings.check_anchors(len(anchors))
    data, moments = sequences.split(recipe.train, recipe.seed)
    return Source(data, moments, sequences.mark, anchors, {})


def from_recipe(recipe: Recipe, work: Path, accelerator: Accelerator, shards: str | None) -> Source:
    """The trajectories that a recipe names, or those that its pipeline draws."""
    if recipe.trajectories is not None:
        return from_sequences(recipe, read_folder(recipe.trajectories, recipe.sites))
    pipe, samples, anchors = load_pipeline(recipe, accelerator.device)
    if recipe.collect.buffer is not None:
        return from_stream(recipe, work, accelerator, pipe, samples, anchors)
    store = collect_stage(recipe, work, accelerator, shards, pipe, samples, anchors)
    return from_disk(recipe, store, pipe, anchors)


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
    trained = train_on(from_recipe(recipe, work, accelerator, shards), recipe, work, accelerator)
    saved = {variant: save(dictionary, out / variant) for variant, dictionary in trained.items()}
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return saved


def fit(
    trajectories: str | Path | torch.Tensor | Iterable[torch.Tensor],
    *,
    name: str = "states",
    base_model: str = "an unnamed process",
    license: str = "unknown",
    seed: int = 0,
    work: str | Path | None = None,
    **settings,
) -> Dictionary:
    """
    Train a dictionary on trajectories of any process that goes on in steps, such as the states of a recurrent network
    or what a language model's layers pass on. Its anchors are the steps 0, 1, …, S − 1.

    Args:
        trajectories: one or several tensors `(samples, steps, width)`, which are kept in memory; or a folder of
            safetensors with such tensors, which are read as they are used. Further dimensions between samples and
            steps count as more trajectories of a sample. The last samples are held out (`validation`).
        name (`str`): of what they are trajectories of, where no file says it; the site of the dictionary.
        base_model (`str`): the model or process that they were recorded from.
        license (`str`): of the dictionary.
        seed (`int`): of the first weights and of the batches.
        work (`str` or `Path`, *optional*): a folder for checkpoints, from which a stopped call continues.
        settings: as in `fit` and `train` of a recipe: `num_latents`, `k`, `steps`, `batch_size` and `learning_rate`
            are needed; `kind`, `architecture`, `residualize` and others have defaults.

    Returns:
        `Dictionary`: one dictionary for each name, with what was measured on held-out trajectories in
            `config["metrics"]`. Its `save` writes it.

    Raises:
        `ValueError`: a setting is unknown, or these are no trajectories.

    Example:
        ```py
        >>> dictionary = fit(states, num_latents=512, k=16, steps=1000, batch_size=512, learning_rate=2e-3)
        >>> codes = dictionary.sites["states"].encode(states)  # (samples, steps, width) -> (samples, 512)
        ```
    """
    is_folder = isinstance(trajectories, str | Path)
    content = {"base_model": base_model, "license": license, "seed": seed, "fit": {}, "train": {}}
    for key, value in settings.items():
        content[section_of(key) or "train"][key] = value
    recipe = checked(content | {"trajectories": str(trajectories) if is_folder else "in memory"}, "fit")
    source = from_sequences(recipe, read_folder(trajectories) if is_folder else read_tensors(trajectories, name))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary if work is None else work)
        return train_on(source, recipe, folder, new_accelerator(recipe, folder, not torch.cuda.is_available()))[""]


def train_on(source: Source, recipe: Recipe, work: Path, accelerator: Accelerator) -> dict[str, Dictionary]:
    """The dictionaries of a recipe, by its variants, trained on a source; on the main process alone."""
    variants = recipe.each()
    names, dynamics, facts = {}, {}, {}
    for variant, settings in variants.items():
        for site in source.moments:
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
            {name: site for name, (_, site) in names.items()}, source.anchors, work, accelerator, source.mark,
            source.stream,
        )  # fmt: skip
    dictionaries = {}
    for variant, settings in variants.items() if accelerator.is_main_process else ():
        sites, report = {}, {}
        for name, (whose, site) in names.items():
            if whose == variant:
                sites[site] = trained[name]
                held_out = source.data.validation[site].float()
                report[site] = facts[name] | evaluate(trained[name], held_out, settings.train.k)
        print(json.dumps(report, indent=2))
        config = {
            "base_model": settings.base_model, "license": settings.license, "anchors": source.anchors,
            "recipe": settings.model_dump(), "metrics": report,
        }  # fmt: skip
        dictionaries[variant] = Dictionary(sites, config=config | source.about)
    return dictionaries


def save(dictionary: Dictionary, out: Path) -> Dictionary:
    """Write a trained dictionary. Labels and presets in `out` stay if they belong to the same weights."""
    before = _unchanged(dictionary.sites, out)
    if before is not None:
        dictionary = replace(dictionary, labels=before.labels, presets=before.presets, maps=before.maps)
    dictionary.save(out)
    write_json(out / "metrics.json", dictionary.config["metrics"])
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
