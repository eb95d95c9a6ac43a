"""Recipes: YAML files that describe a training run, checked before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from .registry import ARCHITECTURES, KINDS

ROOT = Path(__file__).parents[1]  # of a clone, or of what an installed package has of one
INDEX = "model_index.json"  # what every pipeline has
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def _one_of(names: Collection[str]) -> AfterValidator:
    """A check for a name of a registry, as it is when a recipe is read."""

    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"there is no {name!r}, expected one of {sorted(names)}")
        return name

    return AfterValidator(check)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Collect(Section):
    """Which pictures are generated, and which of their trajectories are kept."""

    prompts: str  # a world ("shapes"); a .txt, .jsonl or .parquet file; or the name of a dataset on the Hub
    split: str = "train"  # of a dataset on the Hub
    column: str = "prompt"  # of everything that has columns; a column "seed" is used if there is one
    count: Positive
    steps: Positive
    guidance_scale: float | Annotated[list[float], Field(min_length=1)]  # a list: the shards take turns
    batch_size: Positive  # prompts a shard
    tokens_per_image: Positive
    streams: Literal["cond", "both"] = "cond"  # guidance branches that are kept
    buffer: Positive | None = None  # keep so many trajectories in memory and none on disk (streaming)
    reuse: float = Field(4.0, gt=0)  # while streaming: how often each trajectory is trained on, on average

    @property
    def scales(self) -> list[float]:
        return self.guidance_scale if isinstance(self.guidance_scale, list) else [self.guidance_scale]

    def guidance(self, first: int) -> float:
        """The guidance scale of the shard that begins with this picture."""
        return self.scales[first // self.batch_size % len(self.scales)]


class Fit(Section):
    """The linear dynamics."""

    ridge: float = Field(1e-3, ge=0)
    residualize: bool = True  # false: a dictionary of raw activations


class Train(Section):
    """The dictionary."""

    kind: Annotated[str, _one_of(KINDS)] = "rtsae"
    architecture: Annotated[str, _one_of(ARCHITECTURES)] = "batch_topk"
    layout: Literal["concatenated", "per_step"] = "concatenated"
    num_latents: Positive
    k: Positive
    steps: Positive
    batch_size: Positive
    accumulate: Positive = 1  # parts in which a batch is computed
    learning_rate: float = Field(gt=0)
    auxiliary: float = 1 / 32  # weight of the loss that revives dead latents
    dead_after: Positive = 10_000_000  # trajectories without firing
    prefix: Share = 0.5  # share of batches of which the encoder sees only the first anchors
    validation: Share = 0.1  # share of shards held out: one half sets thresholds, the other is measured on
    validate_every: Positive = 500
    checkpoint_every: Positive = 500
    checkpoints: Positive = 1  # how many are kept
    precision: Literal["no", "bf16", "fp16"] = "no"  # of the encoder's product; weights stay float32
    log_with: list[Literal["tensorboard", "wandb"]] = []
    nested: list[Share] = [1 / 16, 1 / 4, 1.0]  # of matryoshka: sizes that reconstruct alone, as shares of the latents
    bandwidth: float = Field(
        0.25, gt=0
    )  # of jump_relu: how near pre-activations move a threshold, in first thresholds
    experts: Annotated[int, Field(ge=2)] = 8  # of a mixture
    shared: Share = 0.25  # of a mixture: share of the latents that belong to no expert
    # of a mixture: what its router reads
    metadata: list[Literal["time", "row", "column", "guidance"]] = ["time", "row", "column", "guidance"]
    masked: Annotated[float, Field(ge=0, lt=1)] = 0.25  # of a mixture: share of channels that the encoder does not see
    penalty: float = Field(0.3, ge=0)  # of jump_relu: weight of the squared relative difference of L0 from k
    importance: Literal["mean", "product"] = "mean"  # of atm: how a latent's three running means are combined
    mask_above: float = 0.0  # of atm: latents are masked below the mean importance plus so many standard deviations
    mask_rate: float = Field(1.0, gt=0)  # of atm: how fast the chance of masking grows below that

    @model_validator(mode="after")
    def _check(self):
        if self.k > self.num_latents:
            raise ValueError(f"`k` {self.k} is more than the {self.num_latents} latents there are")
        if self.kind == "mixture" and (self.architecture == "topk" or self.experts > self.num_latents):
            raise ValueError(
                f"a mixture takes a threshold and at most as many experts as latents, got {self.architecture} and "
                f"{self.experts}"
            )
        if self.layout != "concatenated" and not KINDS[self.kind].of_trajectories:
            whole = [name for name, kind in KINDS.items() if kind.of_trajectories]
            raise ValueError(f"`layout` {self.layout} is for {', '.join(whole)}: {self.kind} has a code for each step")
        return self


SHARED = {"batch_size", "validation", "checkpoint_every", "checkpoints", "log_with"}  # all variants have the same


OF_PIPELINES = ("pipeline", "sites", "anchors", "collect")  # what a recipe needs to draw pictures


class Recipe(Section):
    """
    A whole run, on trajectories that a pipeline draws for it, or on `trajectories` that exist, of any process.
    `variants` are several dictionaries that share one pass over the data: names, and their changes.
    """

    trajectories: str | None = None  # a folder of safetensors, with tensors (samples, steps, width)
    pipeline: str | None = None
    base_model: str  # what the trajectories are of
    license: str = "unknown"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the pipeline
    seed: int = 0
    sites: Annotated[list[str], Field(min_length=1)] | None = (
        None  # of trajectories that exist: all tensors by default
    )
    anchors: int | list[int] | None = None  # how many, evenly spaced over the sampler's steps; or which timesteps
    activation: Literal["output", "update"] = "output"
    scorer: str | None = None
    collect: Collect | None = None
    fit: Fit = Fit()
    train: Train
    variants: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _check(self):
        given = [name for name in OF_PIPELINES if name != "sites" and getattr(self, name) is not None]
        missing = [name for name in OF_PIPELINES if getattr(self, name) is None]
        if self.trajectories is not None and given:
            raise ValueError(f"`trajectories` that exist take no {given}, which are for those that a pipeline draws")
        if self.trajectories is None and missing:
            raise ValueError(f"expected {missing}, or `trajectories` that exist")
        if self.trajectories is None:
            count = self.anchors if isinstance(self.anchors, int) else len(set(self.anchors))
            if not 2 <= count <= self.collect.steps:
                raise ValueError(
                    f"`anchors` must be at least 2 and at most the {self.collect.steps} steps, got {count}"
                )
            self.check_anchors(count)
        for name in self.variants:
            self.variant(name)
        return self

    def each(self) -> dict[str, Recipe]:
        """The recipe of each variant by its name; without variants this one, named `""`."""
        return {name: self.variant(name) for name in self.variants} or {"": self}

    def check_anchors(self, count: int) -> None:
        """Raise `ValueError` unless dictionaries of trajectories with so many anchors can be trained."""
        if self.train.layout == "per_step" and self.train.num_latents < count:
            raise ValueError(f"`layout` per_step needs a latent for each of the {count} anchors")

    def variant(self, name: str) -> Recipe:
        """The recipe of a variant: this one, with the variant's `seed` and its settings in `fit` and `train`."""
        changes = dict(self.variants[name])
        whole = self.model_dump() | {"variants": {}, "seed": changes.pop("seed", self.seed)}
        if shared := SHARED & changes.keys():
            raise ValueError(f"variant {name!r} changes {sorted(shared)}, which all variants share")
        for key, value in changes.items():
            section = section_of(key)
            if section is None:
                raise ValueError(
                    f"variant {name!r} changes {key!r}; it may change `seed`, and what is in fit and train"
                )
            whole[section][key] = value
        return Recipe.model_validate(whole)

    @property
    def collected(self) -> str:
        """The settings that determine the trajectories, as JSON."""
        settings = {name: getattr(self, name) for name in ("pipeline", "dtype", "seed", "sites", "activation")}
        return json.dumps(settings | {"collect": self.collect.model_dump()}, sort_keys=True)


def section_of(key: str) -> str | None:
    """The section of a recipe, of those about dictionaries, that has this key: `"fit"` or `"train"`."""
    return next((name for name, of in (("fit", Fit), ("train", Train)) if key in of.model_fields), None)


def bundled(path: str | Path) -> str:
    """`path` if it exists, else the file of that name that came with the trainer (`examples/…`, `training/recipes/…`).
    Anything else, such as the id of a repository, is returned as it is."""
    return str(ROOT / path) if not Path(path).exists() and (ROOT / path).exists() else str(path)


def load_recipe(path: Path, changes: list[str] = ()) -> Recipe:
    """
    Read a recipe; `changes` are like `"train.k=8"`.

    Raises:
        `ValueError`: if keys or values are unknown, missing or out of range (the message names each), or if a key is
            changed twice.
    """
    try:
        content = yaml.safe_load(Path(bundled(path)).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no recipe: expected a mapping with {sorted(Recipe.model_fields)}.")
    names = [change.partition("=")[0] for change in changes]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"Expected each key once, got {twice[0]!r} {names.count(twice[0])} times.")
    for change in changes:
        name, _, value = change.partition("=")
        *parents, last = name.split(".")
        section = content
        try:
            for parent in parents:
                section = section.setdefault(parent, {})
            section[last] = yaml.safe_load(value)
        except (yaml.YAMLError, TypeError, AttributeError):
            raise ValueError(f"Expected a change like train.k=8, got {change!r}.") from None
    return checked(content, str(path))


def checked(content: dict, source: str) -> Recipe:
    """The recipe with this content; raises `ValueError`, which names the source and each problem."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg']}" for e in error.errors()]
        raise ValueError(f"{source}: " + "; ".join(problems)) from None
