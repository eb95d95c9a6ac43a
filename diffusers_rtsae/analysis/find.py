"""Find the latents that stand for a concept, by their effect or by their presence, and verify them by steering."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from tqdm import tqdm

from ..denoiser import get_denoiser
from ..pipeline import get_dictionary
from ..steering import as_mask
from .effect import Intervention, Pass, adding, check_pairs, explain_out_of_memory, first_order, frozen
from .features import Feature, FeatureTable, rank
from .record import Recorder, Recording, activation_of, record
from .states import States
from .verify import generators, judge, verify_features

_EARLY = 0.35  # of denoising; features that are present in this part steer
_PASSES = 16  # backward passes that rank all latents
_SHORTLIST, _STATES = 3, 12  # measured features for each one asked for, and batches of states to measure them on
_SAMPLE, _UNSURE = 8, 2.0  # states in such a batch; standard errors by which a feature must be behind to be dropped


@torch.no_grad()
def record_images(
    pipeline, images: Sequence[Image.Image], adapter_name: str | None = None, caption: str = ""
) -> Recording:
    """
    Record what a dictionary reads from given pictures. Each picture is encoded by the VAE, noised to every anchor with
    the same noise (seed 0), and denoised by one step there.

    The latents that are active on something in a given picture need not be the ones that draw it from a prompt, so
    verify them before steering.

    Args:
        pipeline (`StableDiffusionPipeline`): with a dictionary loaded.
        images (`Sequence`): PIL pictures; resized to the model's size.
        caption (`str`): one prompt for all pictures.
    """
    dictionary = get_dictionary(pipeline, adapter_name)
    if type(pipeline).__name__ != "StableDiffusionPipeline" or not hasattr(pipeline.scheduler, "alphas_cumprod"):
        raise ValueError(
            "Reading pictures needs a StableDiffusionPipeline and a scheduler with alphas_cumprod, got "
            f"{type(pipeline).__name__} and {type(pipeline.scheduler).__name__}."
        )
    denoiser, vae = get_denoiser(pipeline), pipeline.vae
    size = denoiser.config.sample_size * pipeline.vae_scale_factor
    pixels = pipeline.image_processor.preprocess(list(images), size, size).to(vae.device, vae.dtype)
    clean = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    noise = torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(0)).to(clean)
    text, _ = pipeline.encode_prompt(caption, denoiser.device, 1, False)
    sites = list(dictionary.sites)
    anchors = {anchor for site in sites for anchor in dictionary.sites[site].config.anchors}
    with Recorder(pipeline, sites, activation=activation_of(dictionary, sites)) as recorder:
        for anchor in sorted(anchors, reverse=True):
            alpha = pipeline.scheduler.alphas_cumprod[anchor].to(clean)
            noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
            denoiser(noisy, torch.tensor(anchor), encoder_hidden_states=text.expand(len(clean), -1, -1))
    return Recording(
        list(images), [caption] * len(images), recorder.timesteps, {s: recorder.trajectories(s) for s in sites},
        {s: recorder.size(s) for s in sites}, dictionary, pipeline.scheduler.alphas_cumprod,
    )  # fmt: skip


def find_features(
    pipeline,
    positive: Sequence[str | Image.Image],
    negative: Sequence[str | Image.Image],
    count: int = 10,
    adapter_name: str | None = None,
    seeds: int = 2,
    verify: int | bool = False,
    scorer: Callable[[list], Sequence[float]] | None = None,
    strength: float = 1.0,
    caption: str = "",
    until: float | None = None,
    by: str | None = None,
    unchanged: Sequence[str] = (),
    batch_size: int = 16,
    checkpointing: bool = False,
    progress: bool = False,
    **call,
) -> FeatureTable:
    """
    Find the features of a loaded dictionary that stand for a concept which the positive examples have and the negative
    examples do not have.

    Args:
        pipeline (`DiffusionPipeline`): with a dictionary loaded. Nothing has to be set on it.
        positive, negative (`Sequence`): prompts, or PIL pictures. To rank by effect they are prompts, one to one, that
            differ in the concept alone.
        count (`int`): the number of features of each site.
        adapter_name (`str`, *optional*): of the dictionary.
        seeds (`int`): pictures drawn of each prompt, with the same seeds for all prompts.
        verify (`int` or `bool`): steer this many of the best features (`True`: five) on the negative prompts with
            other noise, and measure what that does.
        scorer (*optional*): maps a list of PIL pictures to one number each, larger if the picture shows the concept.
            The table is then sorted by how much the verified features raise it.
        strength (`float`): used to verify.
        caption (`str`): for examples that are pictures: a prompt that describes what they have in common.
        until (`float`, *optional*): presence counts in the part of denoising from 0 to `until`, at most 1. The default
            is 0.35 for prompts, as features that are present early steer and later ones mostly follow, and 1 for
            pictures.
        by (`str`, *optional*): `"effect"`, the default for prompts, ranks by how far adding a latent moves the
            prediction of the negative prompts towards that of the positive prompts (see [`analysis.effect`]): to first
            order for all latents, then measured for about the first 30. `"presence"`, the default for pictures, ranks
            by how active a latent is.
        unchanged (`Sequence[str]`): prompts that have nothing to do with the concept, to measure the `harm` of
            verified features.
        batch_size (`int`): pictures drawn at once; also the states in one gradient, up to eight.
        checkpointing (`bool`): gradients of the denoiser need less memory and more time.
        progress (`bool`): show a bar.
        call: passed to the pipeline.

    Returns:
        [`FeatureTable`]: sorted by score. `verified` of a feature holds

        - `effect` (1: what changing the prompt does) and `harm`, the change of `unchanged` prompts in the same unit
        - `image_distance`: the root mean square change of the pixels, 0 to 1
        - `prediction_change`: the change of the denoiser's output, relative to its length
        - `gain`: the change of the scorer

    Raises:
        `ValueError`: there are no examples; `by="effect"` and they are not pairs of different prompts; `verify` and
        there are no negative prompts; or `until` is out of range.

    Example:
        ```py
        >>> find_features(pipe, ["a red star", "a red circle"], ["a star", "a circle"], verify=True)
        ```
    """
    by = _ranking(positive, negative, by, until)
    prompts = [example for example in negative if isinstance(example, str)]
    if verify and not prompts:
        raise ValueError("Expected negative prompts to verify features on, got none.")
    shared = {"adapter_name": adapter_name, "batch_size": batch_size, **call}
    pairs = check_pairs(list(zip(negative, positive, strict=True))) if by == "effect" else []
    with explain_out_of_memory(batch_size):
        if by == "effect":
            with frozen(pipeline, checkpointing):
                states = States(pipeline, pairs * seeds, progress=progress, **shared)
                table = _rank_by_effect(states, count, until, progress)
        else:
            with torch.no_grad():
                table = _rank_by_presence(
                    pipeline, positive, negative, count, adapter_name, seeds, until, caption, **call
                )
        table.sort(key=lambda f: -f.score)
        if verify:
            best = table[: 5 if verify is True else verify]
            table.plain = verify_features(pipeline, best, prompts, scorer, strength, seeds=seeds, **shared)
            if by == "effect":
                held_out = pairs * seeds + [(prompt, prompt) for prompt in unchanged]
                judges = States(pipeline, held_out, seed=1_000_000, codes=False, progress=progress, **shared)
                judge(best, judges, strength)
            if scorer is not None:
                table.sort(key=lambda f: -f.verified.get("gain", float("-inf")))
    return table


def _ranking(positive: Sequence, negative: Sequence, by: str | None, until: float | None) -> str:
    """`"effect"` or `"presence"`; raises `ValueError` if these examples cannot be ranked by it, or `until` is out of
    range."""
    if not positive or not negative:
        raise ValueError(f"Expected positive and negative examples, got {len(positive)} and {len(negative)}.")
    if until is not None and not 0 < until <= 1:
        raise ValueError(f"Expected 0 < until <= 1, got {until!r}.")
    are_prompts = isinstance(positive[0], str)
    by = by or ("effect" if are_prompts else "presence")
    if by not in ("effect", "presence") or by == "effect" and not are_prompts:
        raise ValueError(f"Expected by='effect', for prompts, or 'presence', got {by!r}.")
    if by == "effect" and len(positive) != len(negative):
        raise ValueError(
            f"Expected as many prompts with the concept as without, one to one; got {len(positive)} and "
            f"{len(negative)}. by='presence' takes any number."
        )
    return by


def _rank_by_effect(states: States, count: int, until: float | None, progress: bool) -> FeatureTable:
    table, passes = FeatureTable(), []
    orders = first_order(Intervention({}, states), _PASSES, torch.Generator().manual_seed(0), passes=passes)
    for site, order in orders.items():
        steps, present, absent = states.presence(site)
        early = sum(1000 - t <= 1000 * (until or _EARLY) for t in steps) or 1
        presence = steps[:early], present[:early], absent[:early]
        shortlist = rank(states.dictionary, site, *presence, _SHORTLIST * count, order)
        with tqdm(total=_STATES, desc="measured", unit="batch", leave=False, disable=not progress) as bar:
            table += _score(states, shortlist, passes[:_STATES], count, bar)
    return table


@torch.no_grad()
def _score(states: States, features: FeatureTable, passes: Sequence[Pass], count: int, bar) -> FeatureTable:
    """
    The features of a site with the largest effect. The `score` of each becomes the effect of strength 1: its slope
    plus the mean difference between effect and slope on some states, which varies less than the effects do. Features
    that are behind by more than they may be wrong are dropped on the way.
    """
    shortfalls: dict[int, list[float]] = {feature.index: [] for feature in features}
    left, site = list(features), features[0].site if features else ""
    sae, models = states.dictionary.sites.get(site), {f.index: adding(f.site, f.index, states) for f in features}
    for one_pass in passes:
        state, chosen = one_pass.state, one_pass.rows[:_SAMPLE]
        distances = states.distances(state, chosen)
        predictions = states.predictions(state, chosen, [models[f.index] for f in left])
        for feature, prediction in zip(left, predictions, strict=True):
            gain = distances - states.squared_distance(state, chosen, prediction, state.target).cpu()
            path = sae.directions([feature.index]).at(states.step(site, state))[0].float().cpu()
            typical = float(sae.typical_activation[feature.index])
            linear = one_pass.slopes[site][: len(chosen)] @ path * typical
            shortfalls[feature.index].append(one_pass.weight * float((gain - linear).mean()))
            feature.score = round(feature.slope + statistics.mean(shortfalls[feature.index]), 4)
        bar.update()
        left = _in_reach(left, shortfalls, count)
    return FeatureTable(sorted(left, key=lambda f: -f.score)[:count])


def _in_reach(left: list[Feature], shortfalls: dict[int, list[float]], count: int) -> list[Feature]:
    """The features that may still be among the best `count`."""
    ranked = sorted(left, key=lambda f: -f.score)
    if len(shortfalls[ranked[0].index]) < 2 or len(ranked) <= count:
        return left
    last, kept = ranked[count - 1], ranked[:count]
    for feature in ranked[count:]:
        pairs = zip(shortfalls[last.index], shortfalls[feature.index], strict=True)
        differences = [one - other for one, other in pairs]
        error = statistics.stdev(differences) / len(differences) ** 0.5
        if last.score - feature.score <= _UNSURE * error:
            kept.append(feature)
    return kept


def _rank_by_presence(
    pipeline, positive, negative, count: int, adapter_name, seeds: int, until, caption: str, **call
) -> FeatureTable:
    def read(examples: Sequence) -> Recording:
        if isinstance(examples[0], str):
            prompts = [prompt for prompt in examples for _ in range(seeds)]
            return record(pipeline, prompts, adapter_name, generator=generators(len(examples), seeds), **call)
        return record_images(pipeline, examples, adapter_name, caption)

    with_it, without = read(list(positive)), read(list(negative))
    if with_it.timesteps != without.timesteps:
        raise ValueError("Expected either prompts or pictures for both positive and negative examples, got a mix.")
    until = until or (_EARLY if isinstance(positive[0], str) else 1.0)
    early = [t for t in with_it.timesteps if 1000 - t <= 1000 * until] or with_it.timesteps[:1]
    table, dictionary = FeatureTable(), get_dictionary(pipeline, adapter_name)
    for site in dictionary.sites:
        present, absent = (r.presence(site).mean(0)[: len(early)] for r in (with_it, without))
        table += rank(dictionary, site, early, present, absent, count)
    return table


def top_features(recording: Recording, image: int = 0, mask=None, count: int = 10) -> FeatureTable:
    """
    The features that are most active in a recorded picture, and when.

    Args:
        recording (`Recording`): as [`record`] returns it.
        image (`int`): the index of the picture in the recording.
        mask (*optional*): image, array or tensor `(height, width)`: rank by how much more active a feature is inside
            the mask than outside. Without it: than on average over the training data.
        count (`int`): the number of features.
    """
    table = FeatureTable()
    for site, sae in recording.dictionary.sites.items():
        if site not in recording.trajectories:
            continue
        present = recording.presence(site, mask)[image]
        if mask is None:
            usual = (sae.mean_activation / sae.typical_activation).cpu()[None].expand_as(present)
            table += rank(recording.dictionary, site, recording.timesteps, present, usual, count)
        else:
            elsewhere = recording.presence(site, 1 - as_mask(mask))[image]
            table += rank(recording.dictionary, site, recording.timesteps, present, elsewhere, count)
    table.sort(key=lambda f: -f.score)
    return FeatureTable(table[:count])
