"""Find the latents that stand for a concept, from what changes in them with the prompt, and check them causally."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..denoiser import get_denoiser
from ..dictionary import Dictionary
from ..pipeline import get_dictionary, own_size
from ..steering import as_mask
from .effect import FirstOrder, Intervention, Pass, adding, check_pairs, first_order, frozen, memory_told
from .record import Recorder, Recording, kind_of, record
from .states import States

_EARLY = 0.35  # of denoising: what is present then steers
_PASSES = 16  # backward passes that rank all latents
_SHORTLIST, _STATES = 3, 12  # as many times the features asked for are then measured, on so many batches of states
_SAMPLE, _HALVED = 4, (4, 8)  # states of such a batch; after so many batches the worse third is measured no further
_DUPLICATE = 0.9  # cosine of two trajectories from which on they are one feature


@dataclass
class Feature:
    """
    A latent that was found.

    Args:
        site (`str`), index (`int`): which; `pipe.set_rtsae_features({(site, index): 1.0})` steers it.
        score (`float`): what the table is sorted by: the effect of strength 1 on the prediction, of 1 that changing
            the prompt has, or `present * specific`.
        slope (`float`): how fast that effect grows from strength 0; `None` if it was ranked by presence.
        present (`float`): how much more present it is with the concept than without, at its best step, in units of its
            typical full activation.
        specific (`float`): from 0, as present without the concept (or everywhere in the training data), to 1, only
            with it.
        timestep (`float`): when the difference is largest.
        labels (`list[str]`): of the dictionary, that contain it.
        duplicates (`list[int]`): latents with almost the same trajectory that were left out.
        verified (`dict`): what steering it does, if that was asked for.
        pictures (`list`): of the negative prompts, steered, if it was verified.
    """

    site: str
    index: int
    score: float
    present: float
    specific: float
    timestep: float
    labels: list[str] = field(default_factory=list)
    duplicates: list[int] = field(default_factory=list)
    verified: dict[str, float] = field(default_factory=dict)
    slope: float | None = None
    pictures: list = field(default_factory=list, repr=False)

    def told(self) -> dict:
        """All but the pictures, as JSON can hold it."""
        return {name: value for name, value in vars(self).items() if name != "pictures"}


class FeatureTable(list):
    """A list of [`Feature`] that prints as a table. `plain` are the pictures on which verified features were
    steered; [`plots.plot_strip`] shows them."""

    plain: list = []

    def to_pandas(self):
        """As a `pandas.DataFrame`, one row a feature; pandas must be installed."""
        import pandas

        return pandas.DataFrame([(row := f.told()) | row.pop("verified") for f in self])

    def __repr__(self) -> str:
        if not self:
            return "no features"
        measured = list(dict.fromkeys(key for f in self for key in f.verified))
        by_effect = [] if self[0].slope is None else ["slope"]
        head = ["site", "index", "score", *by_effect, "present", "specific", "timestep", *measured, "labels"]
        rows = [
            [
                f.site, str(f.index), f"{f.score:.3f}", *(f"{f.slope:.3f}" for _ in by_effect),
                f"{f.present:.3f}", f"{f.specific:.2f}", f"{f.timestep:g}",
                *(f"{f.verified[key]:.3f}" if key in f.verified else "" for key in measured), ", ".join(f.labels),
            ]
            for f in self
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
        )


def labels_of(dictionary: Dictionary, site: str, index: int) -> list[str]:
    """The labels that are seen by a latent."""
    return [
        name
        for name, label in dictionary.labels.items()
        if any(e["site"] == site and index in e["latents"] for e in label.get("seen") or label["features"])
    ]


def rank(
    dictionary: Dictionary,
    site: str,
    timesteps: Sequence[float],
    present: torch.Tensor,
    absent: torch.Tensor,
    count: int,
    order: FirstOrder | None = None,
) -> FeatureTable:
    """
    The latents of a site that are more present with a concept than without, or that have most effect.

    Args:
        order (`FirstOrder`, *optional*): their effects; ranked by presence without it.
        present, absent (`torch.Tensor`): mean presence at each step, `(steps, num_latents)`.
    """
    sae = dictionary.sites[site]
    difference, when = (present - absent).max(0)
    steps = when[None]
    with_it, without = present.gather(0, steps)[0], absent.gather(0, steps)[0]
    usual = (sae.mean_activation / sae.typical_activation).cpu()  # a latent that is often active says little
    scale = sae.spread[:, None]
    specific = (with_it - torch.maximum(without, usual)) / (with_it + torch.maximum(without, usual)).clamp(min=1e-9)
    score = difference.clamp(min=0) * specific.clamp(min=0)
    table = FeatureTable()
    score = score if order is None else torch.where(sae.density.cpu() > 0, order.added / order.added_length, 0.0)
    for index in score.nan_to_num().argsort(descending=True).tolist():
        if len(table) == count or score[index] <= 0:
            break
        path = (sae.feature_trajectories([index]).detach() / scale).flatten()
        kept = (sae.feature_trajectories([f.index for f in table]).detach() / scale).flatten(1)
        same = torch.cosine_similarity(kept, path[None]) > _DUPLICATE
        if same.any():
            table[int(same.int().argmax())].duplicates.append(index)
            continue
        table.append(
            Feature(
                site, index, round(score[index].item(), 4), round(difference[index].item(), 4),
                round(specific[index].item(), 4), timesteps[when[index]], labels_of(dictionary, site, index),
                slope=None if order is None else round(order.added[index].item(), 4),
            )
        )  # fmt: skip
    return table


def _generators(count: int, seeds: int) -> list[torch.Generator]:
    """The same few seeds for each of several prompts."""
    return [torch.Generator().manual_seed(seed) for _ in range(count) for seed in range(seeds)]


@torch.no_grad()
def record_images(
    pipeline, images: Sequence[Image.Image], adapter_name: str | None = None, caption: str = ""
) -> Recording:
    """
    What a dictionary sees in given pictures: each is encoded, noised to every anchor with the same noise (seed 0), and
    shown to the denoiser.

    Args:
        pipeline (`StableDiffusionPipeline`): with a dictionary loaded.
        images (`Sequence`): PIL pictures; resized to the model's size.
        caption (`str`): of all of them.

    The latents that see something in a picture need not be those that a prompt paints it with: verify before steering.
    """
    dictionary = get_dictionary(pipeline, adapter_name)
    if type(pipeline).__name__ != "StableDiffusionPipeline" or not hasattr(pipeline.scheduler, "alphas_cumprod"):
        raise ValueError(
            "Pictures can be read with a StableDiffusionPipeline and its noise schedule only, not with "
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
    with Recorder(pipeline, sites, activation=kind_of(dictionary, sites)) as recorder:
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
    The features of a loaded dictionary that stand for what the positive examples have and the negative have not.

    Args:
        pipeline (`DiffusionPipeline`): with a dictionary loaded; it need not steer.
        positive, negative (`Sequence`): prompts, or pictures (PIL). By effect, prompts one to one that differ in
            nothing else.
        count (`int`): how many features, of each site.
        seeds (`int`): pictures made of each prompt, with the same seeds for all.
        verify (`int` or `bool`): steer so many of the best (`True`: five) on the negative prompts and other noise, and
            say what that does.
        scorer (*optional*): from a list of PIL pictures to one number each, larger where they show the concept. With
            it the verified features are sorted by how much they raise it.
        strength (`float`): to verify with.
        caption (`str`): of all pictures, if examples are pictures: what they share, not what they differ in.
        until (`float`, *optional*): the beginning of denoising, 0 to 1, in which presence counts. By default 0.35 for
            prompts, as features that are there early steer and later ones mostly follow; all of it for pictures.
        by (`str`, *optional*): rank by `"effect"`, what adding a latent does to the prediction of the negative prompts
            towards that of the positive ones (see [`analysis.effect`]), of all latents to first order and of the first
            30 or so as it is, the default for prompts; or by `"presence"`, the default for pictures.
        unchanged (`Sequence[str]`): prompts that have nothing to do with it, to tell the `harm` of verified features.
        batch_size (`int`): pictures drawn at once by effect and to verify, and states of one gradient, up to eight.
        checkpointing (`bool`): trade time for memory in the denoiser's gradients.
        progress (`bool`): show a bar.
        call: passed to the pipeline.

    Returns:
        [`FeatureTable`]: sorted by score. `verified` holds `effect`, the share of what changing the prompt does, and
        `harm`, the change of `unchanged` prompts in the same unit; `image_distance`, the RMS change of the pictures,
        0 to 1; `prediction_change`, of the denoiser's output, relative to its length; and `gain` of the scorer.

    Raises:
        `ValueError`: if there are no examples, by effect if they are no pairs of different prompts, if prompts are
        needed and there are none, or `until` is out of range.

    Example:
        ```py
        >>> find_features(pipe, ["a red star", "a red circle"], ["a star", "a circle"], verify=True)
        ```
    """
    by = _ranking(positive, negative, by, until)
    prompts = [example for example in negative if isinstance(example, str)]
    if verify and not prompts:
        raise ValueError("Features are verified on negative prompts, and there are none.")
    shared = {"adapter_name": adapter_name, "batch_size": batch_size, **call}
    pairs = check_pairs(list(zip(negative, positive, strict=True))) if by == "effect" else []
    with memory_told(batch_size):
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
                _judge(best, judges, strength)
            if scorer is not None:
                table.sort(key=lambda f: -f.verified.get("gain", float("-inf")))
    return table


def _ranking(positive: Sequence, negative: Sequence, by: str | None, until: float | None) -> str:
    """What these examples are ranked by; raises `ValueError` if they cannot be, or `until` is out of range."""
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
        seen = steps[:early], present[:early], absent[:early]
        shortlist = rank(states.dictionary, site, *seen, _SHORTLIST * count, order)
        with tqdm(total=_STATES, desc="measured", unit="batch", leave=False, disable=not progress) as bar:
            table += _score(states, shortlist, passes[:_STATES], count, bar)
    return table


@torch.no_grad()
def _score(states: States, features: FeatureTable, passes: Sequence[Pass], count: int, bar) -> FeatureTable:
    """
    The features of a site that have most effect, with the effect of strength 1 as their `score`: the slope, and what
    the effect on some states falls short of their own slopes, which varies less than effects do. Those that are behind
    after a few states are measured no further (sequential halving: Karnin, Koren and Somekh 2013).
    """
    short: dict[int, list[float]] = {feature.index: [] for feature in features}
    left, site = list(features), features[0].site if features else ""
    sae, models = states.dictionary.sites.get(site), {f.index: adding(f.site, f.index, states) for f in features}
    for measured, seen in enumerate(passes, start=1):
        chosen = seen.rows[:_SAMPLE]
        distances = states.distances(seen.state, chosen)
        predictions = states.predictions(seen.state, chosen, [models[f.index] for f in left])
        for feature, prediction in zip(left, predictions, strict=True):
            gained = distances - states.apart(seen.state, chosen, prediction, seen.state.wanted).cpu()
            path = sae.directions([feature.index]).at(states.step(site, seen.state))[0].float().cpu()
            typical = float(sae.typical_activation[feature.index])
            linear = seen.slopes[site][: len(chosen)] @ path * typical
            short[feature.index].append(seen.weight * float((gained - linear).mean()))
            feature.score = round(feature.slope + statistics.mean(short[feature.index]), 4)
        bar.update()
        if measured in _HALVED:
            left = sorted(left, key=lambda f: -f.score)[: max(count, 2 * len(left) // 3)]
    return FeatureTable(sorted(left, key=lambda f: -f.score)[:count])


def _rank_by_presence(
    pipeline, positive, negative, count: int, adapter_name, seeds: int, until, caption: str, **call
) -> FeatureTable:
    def read(examples: Sequence) -> Recording:
        if isinstance(examples[0], str):
            prompts = [prompt for prompt in examples for _ in range(seeds)]
            return record(pipeline, prompts, adapter_name, generator=_generators(len(examples), seeds), **call)
        return record_images(pipeline, examples, adapter_name, caption)

    with_it, without = read(list(positive)), read(list(negative))
    if with_it.timesteps != without.timesteps:
        raise ValueError("Expected examples of one kind: prompts or pictures, for positive and negative alike.")
    until = until or (_EARLY if isinstance(positive[0], str) else 1.0)
    early = [t for t in with_it.timesteps if 1000 - t <= 1000 * until] or with_it.timesteps[:1]
    table, dictionary = FeatureTable(), get_dictionary(pipeline, adapter_name)
    for site in dictionary.sites:
        present, absent = (r.presence(site).mean(0)[: len(early)] for r in (with_it, without))
        table += rank(dictionary, site, early, present, absent, count)
    return table


@torch.no_grad()
def _judge(features: Sequence[Feature], states: States, strength: float) -> None:
    """Write the true effect and harm of each feature alone on other states into its `verified`."""
    for feature in features:
        effects = states.effects(adding(feature.site, feature.index, states, strength))
        told = {"effect": round(float(effects[states.told].mean()), 4)}
        if not states.told.all():
            told["harm"] = round(float(-effects[~states.told].mean()), 4)
        feature.verified = told | feature.verified


class _Outputs:
    """Keeps what the denoiser returns while a pipeline runs."""

    def __init__(self, denoiser):
        self.denoiser, self.kept = denoiser, []

    def __enter__(self):
        self._hook = self.denoiser.register_forward_hook(
            lambda module, args, output: self.kept.append(
                (output[0] if isinstance(output, tuple) else output.sample).float()
            )
        )
        return self

    def __exit__(self, *error):
        self._hook.remove()


@torch.no_grad()
def verify_features(
    pipeline, features: Sequence[Feature], prompts: Sequence[str], scorer=None, strength: float = 1.0,
    adapter_name: str | None = None, seeds: int = 2, batch_size: int = 16, **call,
) -> list:  # fmt: skip
    """Steer each feature alone on `prompts`, and write into its `verified` and `pictures` what that does; returns the
    plain pictures. See [`find_features`]."""

    def generate() -> tuple[list, torch.Tensor, list[torch.Tensor]]:
        repeated, generators = [p for p in prompts for _ in range(seeds)], _generators(len(prompts), seeds)
        options, images = own_size(pipeline) | call, []
        with _Outputs(get_denoiser(pipeline)) as outputs:
            for start in range(0, len(repeated), batch_size):
                part = slice(start, start + batch_size)
                images += pipeline(repeated[part], generator=generators[part], **options).images
        return images, _pixels(images), outputs.kept

    images, pixels, outputs = generate()
    before = scorer(images) if scorer is not None else None
    for feature in features:
        with pipeline.rtsae_steering({(feature.site, feature.index): strength}, adapter_name):
            steered, steered_pixels, steered_outputs = generate()
        pairs = zip(steered_outputs, outputs, strict=True)
        changes = [((new - old).norm() / old.norm()).item() for new, old in pairs]
        feature.pictures = list(steered)
        feature.verified = {
            "image_distance": round((steered_pixels - pixels).square().mean((1, 2, 3)).sqrt().mean().item(), 4),
            "prediction_change": round(sum(changes) / len(changes), 4),
        }
        if scorer is not None:
            after = scorer(steered)
            feature.verified["gain"] = round(
                sum(float(a) - float(b) for a, b in zip(after, before, strict=True)) / len(after), 4
            )
    return list(images)


def _pixels(images: list) -> torch.Tensor:
    """PIL pictures as `(images, height, width, 3)` in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images]) / 255)


def top_features(recording: Recording, image: int = 0, mask=None, count: int = 10) -> FeatureTable:
    """
    What is active in a picture, and when.

    Args:
        image (`int`): which picture of the recording.
        mask (*optional*): `(height, width)`, image, array or tensor: what is active there more than elsewhere in the
            picture. Without it: more than usual, over the training data.
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
