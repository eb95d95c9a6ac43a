"""The loop over training steps: several dictionaries on one pass over the data."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from diffusers_rtsae import SparseDictionary
from diffusers_rtsae.models import LinearDynamics

from ..common.processes import Processes
from ..common.seeds import step_generator
from ..data.split import Data
from ..data.stream import Stream
from ..recipe import Recipe
from .checkpoints import Checkpoints
from .trainer import DictionaryTrainer, measure_activations, new_dictionary
from .watch import Watch

STATISTICS_TOKENS = 200_000  # trajectories from which the statistics of the latents are made


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the host to a device, without waiting for it."""
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
) -> dict[str, SparseDictionary]:
    """
    Train several dictionaries on one pass over the data. Each process trains its share of the latents.

    Args:
        recipes, dynamics, sites: the recipe, dynamics and site of each dictionary, by its name.
        collected (`str`): fingerprint of the data; checkpoints with another fingerprint are refused.

    Returns:
        the dictionaries by name on the main process, nothing on the others.
    """
    device, first = accelerator.device, next(iter(recipes.values()))
    processes = Processes(accelerator.process_index, accelerator.num_processes)
    marks, trainers = {}, {}
    for name, recipe in recipes.items():
        sae = new_dictionary(sites[name], anchors, recipe, dynamics[name])
        sample, _ = data.sample(sites[name], 8192, step_generator(recipe.seed, -1))
        trainers[name] = DictionaryTrainer(sae, recipe.train, dynamics[name], sample.float(), device, processes)
        train = recipe.train.model_dump(exclude={"checkpoints", "checkpoint_every", "validate_every", "log_with"})
        mark = {"trajectories": collected, "seed": recipe.seed, "fit": recipe.fit.model_dump(), "train": train}
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
        batches, prefixes = {}, {}
        for name, trainer in trainers.items():
            settings, site = trainer.settings, sites[name]
            if step >= settings.steps:
                continue
            if site not in batches:
                generator = step_generator(first.seed, step)
                sample = data.sample(site, first.train.batch_size, generator, processes)
                batches[site] = [copied(tensor, device).float() for tensor in sample]
                length = int(torch.randint(1, len(anchors), (), generator=generator))
                prefixes[site] = length, torch.rand((), generator=generator).item()
            length, draw = prefixes[site]
            prefix = length if draw < settings.prefix else None
            trajectories, metadata = batches[site]
            inputs = processes.whole(trainer.inputs(trajectories), first.train.batch_size)
            metadata = processes.whole(metadata, first.train.batch_size)
            parts = zip(inputs.chunk(settings.accumulate), metadata.chunk(settings.accumulate), strict=True)
            losses = [trainer.backward(part, prefix, len(part) / len(inputs), its) for part, its in parts]
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
                figures = watch(step + 1, name, trainer, losses[-1], validation, rate)
                progress.set_postfix(fvu=f"{figures['fvu_validation']:.3f}", dead=f"{figures['dead']:.1%}")
        if (step + 1) % first.train.checkpoint_every == 0 or step + 1 == steps:
            checkpoints.save(step + 1, trainers, marks, stream)
    finished = {}
    for name, trainer in trainers.items():
        sae, site = trainer.finish(), sites[name]
        if not accelerator.is_main_process:
            continue
        trainer.objective.calibrate(data.calibration[site].float().to(device))
        rows, size = data.train[site], max(256, 2**23 // sae.config.num_latents)
        measured = torch.arange(min(len(rows), STATISTICS_TOKENS))
        measure_activations(sae, (rows[part].float() for part in measured.split(size)))
        finished[name] = sae.cpu()
    return finished
