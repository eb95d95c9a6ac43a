"""The methods a pipeline gains: `load_rtsae`, `set_rtsae_features`, `rtsae_steering` and their companions."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
from abc import ABC
from collections.abc import Callable
from dataclasses import fields
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .denoiser import DENOISERS, PIPELINES, find_caller, get_denoisers, unwrapped
from .dictionary import Dictionary, load_dictionary
from .models import SparseDictionary
from .steering import (
    Adapter,
    Controller,
    Edit,
    PromptCodes,
    SiteEdit,
    as_mask,
    as_strength,
    check_text_edit,
    check_text_site,
    check_width,
    is_in_text,
)

Name = str | int | tuple[str, int] | PromptCodes
Strength = float | list[float] | torch.Tensor | Callable[[float], float | list[float]]


def own_size(pipeline) -> dict[str, bool]:
    """Arguments for a call of `pipeline` that make it draw at the size of its own model. PixArt and related pipelines
    otherwise choose among the sizes of the published models, and raise for models of other sizes."""
    known = inspect.signature(pipeline.__call__).parameters
    return {"use_resolution_binning": False} if "use_resolution_binning" in known else {}


def _controller_or_none(pipeline) -> Controller | None:
    denoisers = get_denoisers(pipeline).values()
    return next((vars(one)["_rtsae_controller"] for one in denoisers if _has_controller(one)), None)


def _controller(pipeline, create: bool = False) -> Controller:
    denoisers, controller = get_denoisers(pipeline), _controller_or_none(pipeline)
    if controller is None:
        if not create:
            raise ValueError("No dictionary is loaded; call `load_rtsae` first.")
        controller = Controller()
    if create:
        for denoiser in denoisers.values():
            vars(denoiser)["_rtsae_controller"] = controller
    return controller


def _has_controller(denoiser) -> bool:
    return "_rtsae_controller" in getattr(denoiser, "__dict__", {})


def _name(controller: Controller, adapter_name: str | None) -> str:
    """`adapter_name`, or the name of the only dictionary; raises `ValueError` if there is no such dictionary."""
    if adapter_name is None and len(controller.adapters) == 1:
        return next(iter(controller.adapters))
    if adapter_name not in controller.adapters:
        raise ValueError(f"Expected `adapter_name` to be one of {list(controller.adapters)}, got {adapter_name!r}.")
    return adapter_name


def get_dictionary(pipeline, adapter_name: str | None = None) -> Dictionary:
    """A dictionary that is loaded into a pipeline, by its name."""
    controller = _controller(pipeline)
    return controller.adapters[_name(controller, adapter_name)].dictionary


def _edits(
    pipeline, adapter_name: str | None, features: dict[Name, Strength], mask=None, where=None, source=None, **options
) -> tuple[SiteEdit, ...]:
    """The edits of these features at each site. Options that are not given are taken from the labels."""
    controller = _controller(pipeline)
    name_of_adapter = _name(controller, adapter_name)
    dictionary = controller.adapters[name_of_adapter].dictionary
    if not isinstance(features, dict):
        raise ValueError(f"Expected features as a dict {{label or index: strength}}, got {type(features).__name__}.")
    fixed = {"latents", "weights", "strength", "map", "vectors", "bounds"}
    known = sorted({f.name for f in fields(Edit)} - fixed)
    unknown = options.keys() - set(known)
    if unknown:
        raise ValueError(f"Unknown option {min(unknown)!r}; an edit has {known}.")
    options = {key: value for key, value in options.items() if value is not None}
    mask, result = as_mask(mask), []
    for name, strength in features.items():
        strength = as_strength(strength)
        if isinstance(name, PromptCodes):
            entries, verified = _of_prompt(name, dictionary), {}
        else:
            entries, verified = dictionary.features(name, options.get("operation"))
        for entry in entries:
            gate = entry.get("where") if where is None else None
            if where is not None and where != "everywhere":
                gate = _rows(dictionary, where, entry["site"])
            is_blind = where == "everywhere" and options.get("operation") == "erase"
            edit = Edit(
                latents=() if is_blind else tuple(entry["latents"]),
                weights=() if is_blind else tuple(entry["weights"]),
                strength=strength,
                where=None if gate is None else tuple(gate),
                source=None if source is None else tuple(_rows(dictionary, source, entry["site"])),
                mask=mask,
                **_of_site(entry["site"]) | _defaults(verified, options) | options | _part(entry, dictionary, options),
            )
            if is_in_text(entry["site"]):
                check_text_edit(entry["site"], edit)
            result.append(SiteEdit(name_of_adapter, entry["site"], edit))
    return tuple(result)


def _of_prompt(codes: PromptCodes, dictionary: Dictionary) -> list[dict]:
    """The entry that the codes of a prompt stand for."""
    sae = dictionary.sites.get(codes.site)
    if sae is None or sae.config.in_channels != codes.vectors.shape[1]:
        raise ValueError(
            f"The codes of {codes.prompt!r} are of {codes.site}; this dictionary has {[*dictionary.sites]}."
        )
    return [{"site": codes.site, "latents": [], "weights": [], "vectors": codes.vectors}]


def _of_site(site: str) -> dict:
    """The options that differ from those of other sites if they are not given."""
    return {"apply_to": "cond"} if is_in_text(site) else {}


def _part(entry: dict, dictionary: Dictionary, options: dict) -> dict:
    """The arguments of [`Edit`] that a part of a fitted label fixes; `clip=False` lifts the outer bound."""
    if "vectors" in entry:
        return {"vectors": entry["vectors"], "clip": False}
    if "bounds" not in entry:
        return {}
    low, high = entry["bounds"]
    operation = entry.get("operation", "add")
    if operation == "add" and not options.get("clip", True):
        low, high = low and -math.inf, high and math.inf
    rows = dictionary.maps[entry["map"]] if "map" in entry else None
    return {"operation": operation, "bounds": (low, high), "clip": False, "map": rows}


def _defaults(verified: dict, options: dict) -> dict:
    """
    The options that a label was verified with, without those that the caller gives. None of them if the caller asks
    for another operation; neither `start` nor `end` if the caller gives one of the two.
    """
    operation = verified.get("operation", "add")
    if options.get("operation", operation) != operation:
        return {}
    given = set(options) | ({"start", "end"} if {"start", "end"} & set(options) else set())
    return {key: value for key, value in verified.items() if key not in given}


def _rows(dictionary: Dictionary, features: Name | list[Name], site: str) -> list[int]:
    """The latents at `site` of one or several features."""
    named = features if isinstance(features, list) else [features]
    entries = [entry for one in named for entry in dictionary.seen(one)]
    return [row for entry in entries if entry["site"] == site for row in entry["latents"]]


def _install(pipeline) -> None:
    _controller(pipeline).install(get_denoisers(pipeline), pipeline)


def resting(pipeline):
    """Inside the `with` block no dictionary of the pipeline acts, in this thread or asyncio task."""
    return _controller(pipeline).steering(get_denoisers(pipeline), None, pipeline)


class RTSAELoaderMixin(ABC):  # noqa: B024 - pipelines are registered with it
    """
    Methods of pipelines that load sparse dictionaries into the denoiser and steer with their features.

    Every diffusers pipeline is an instance of this class. To let a type checker know these methods, write

        >>> assert isinstance(pipe, RTSAELoaderMixin)
    """

    if TYPE_CHECKING:  # pipelines have other attributes, which are not typed here

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
        def __getattr__(self, name: str) -> Any: ...

    def load_rtsae(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, SparseDictionary] | Dictionary,
        adapter_name: str | None = None,
        layers: list[str] | None = None,
        dtype: torch.dtype | None = None,
        **hub_kwargs,
    ) -> None:
        """
        Load a dictionary, in the format of this package or of another one (see `load_dictionary`). Pictures do not
        change until features are set.

        Args:
            pretrained_model_name_or_path_or_dict: Hub id, local folder, `{site: SparseDictionary}` or [`Dictionary`].
            adapter_name (`str`, *optional*): name of the dictionary in this pipeline; `"default"` by default.
            layers (`list[str]`, *optional*): the sites to load; all by default.
            dtype (`torch.dtype`, *optional*): dtype of the weights in memory.
            hub_kwargs: `site`, `subfolder`, `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`;
                see [`load_dictionary`].

        Raises:
            `OSError`: there is no dictionary that can be read. `ValueError`: the dictionary does not fit this
                pipeline, or the name is taken.
        """
        denoisers = get_denoisers(self)
        dictionary = load_dictionary(pretrained_model_name_or_path_or_dict, layers, dtype, **hub_kwargs)
        widths = {}
        for site, sae in dictionary.sites.items():
            if is_in_text(site):
                widths |= {site: found} if len(found := check_text_site(self, site, sae)) > 1 else {}
        for denoiser in denoisers.values():
            dictionary.check(denoiser)
            for site, sae in dictionary.sites.items():
                if not is_in_text(site):
                    check_width(denoiser, site, sae.config.in_channels)
        name = adapter_name or "default"
        if name in self.get_list_rtsae():
            raise ValueError(
                f"A dictionary named {name!r} is loaded already; pass another `adapter_name` or call `unload_rtsae`."
            )
        _controller(self, create=True).adapters[name] = Adapter(dictionary, widths=widths)

    def set_rtsae_features(self, features: dict[Name, Strength], adapter_name: str | None = None, **options) -> None:
        """
        Steer all following generations of this pipeline with these features, instead of those set before. Other
        pipelines with the same denoiser use them, too, unless they have features of their own. In a running generation
        they act from its next step on.

        Args:
            features (`dict`): strengths by feature, which is a label, an index or `(site, index)`. 1.0 is the
                feature's typical full activation. At a site of a text encoder the [`PromptCodes`] of a whole prompt
                are a feature, too; there 1.0 is what the prompt itself has. A list has one strength per prompt. A
                tensor or array `(steps,)` or `(steps, prompts)`, or a function of the progress from 0 to 1, is a
                schedule over denoising.
            adapter_name (`str`, *optional*): name of the dictionary; needed if several are loaded.
            options: `operation`, `source`, `where`, `mask`, `start`, `end`, `apply_to`, `injection`, `clip`,
                `renormalise`; see [`Edit`]. `source` is a feature. `where` is a feature, or a list of them, on whose
                active tokens the edit acts, or `"everywhere"`; with `operation="erase"`, `"everywhere"` replaces all
                tokens under the mask, whatever the feature sees. For options that are not given, a label uses those
                that it was verified with, unless `operation` differs from its own. Giving `start` or `end` replaces
                both of the label's.

        Example:
            ```py
            >>> pipe.set_rtsae_features({"red": 1.5, 1234: -0.5})
            ```
        """
        controller = _controller(self)
        edits = _edits(self, adapter_name, features, **options)
        controller.set_features(self, _name(controller, adapter_name), edits)
        _install(self)

    def set_rtsae_preset(self, name: str, adapter_name: str | None = None) -> None:
        """Steer all following generations with a preset of a dictionary, instead of the features set before."""
        features, options = get_dictionary(self, adapter_name).preset(name)
        self.set_rtsae_features(features, adapter_name, **options)

    @contextlib.contextmanager
    def rtsae_steering(self, features: dict[Name, Strength], adapter_name: str | None = None, **options):
        """
        Steer with these features inside the `with` block, in addition to those that are set. The arguments are those
        of `set_rtsae_features`. The block acts in the thread or asyncio task that entered it, and in no other.

        Example:
            ```py
            >>> with pipe.rtsae_steering({"red": [0.0, 2.0]}, start=0.2, end=0.8, mask=mask_image):
            ...     images = pipe(["a car", "a boat"]).images
            ```
        """
        edits = _edits(self, adapter_name, features, **options)
        with _controller(self).steering(get_denoisers(self), edits, self):
            yield self

    def set_rtsae(self, adapter_names: str | list[str], weights: float | list[float] = 1.0) -> None:
        """Choose which dictionaries act, each with a weight that multiplies the strengths of its `add` edits."""
        controller = _controller(self)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = list(weights) if isinstance(weights, list | tuple) else [weights] * len(names)
        if len(names) != len(weights):
            raise ValueError(f"Expected one weight per adapter, got {len(weights)} weights for {names}.")
        if not all(isinstance(weight, Real) and math.isfinite(weight) for weight in weights):
            raise ValueError(f"Expected finite weights, got {weights}.")
        chosen = {_name(controller, name): weight for name, weight in zip(names, weights, strict=True)}
        for name, adapter in controller.adapters.items():
            adapter.weight = chosen.get(name, 0.0)
        _install(self)

    def get_list_rtsae(self) -> dict[str, list[str]]:
        """The sites of each loaded dictionary, by its name."""
        controller = _controller_or_none(self)
        return {name: list(a.dictionary.sites) for name, a in controller.adapters.items()} if controller else {}

    def get_active_rtsae(self) -> list[str]:
        """The names of the dictionaries that act: they are enabled, and their weight is not 0."""
        controller = _controller_or_none(self)
        return (
            [n for n, a in controller.adapters.items() if a.weight != 0] if controller and controller.enabled else []
        )

    def get_rtsae_features(self, adapter_name: str | None = None) -> dict[str, list[tuple[str, int]]]:
        """The labels of a dictionary, each with the `(site, index)` of the latents that it moves; for a label with a
        linear map the index is `None`."""
        labels = get_dictionary(self, adapter_name).labels
        return {
            name: [
                (entry["site"], index)
                for entry in label["features"]
                for index in ([None] if "map" in entry else entry["latents"])
            ]
            for name, label in labels.items()
        }

    def add_rtsae_label(self, name: str, fitted, adapter_name: str | None = None) -> None:
        """
        Add a fitted feature to a loaded dictionary as a label. `save_rtsae` and `push_rtsae_to_hub` include it.

        Args:
            name (`str`): name of the label; an existing label of this name is replaced.
            fitted (`FittedFeature`): the result of [`analysis.fit.fit_feature`].
            adapter_name (`str`, *optional*): name of the dictionary; needed if several are loaded.

        Example:
            ```py
            >>> pipe.add_rtsae_label("red", fit_feature(pipe, [("a blue star", "a red star")]))
            ```
        """
        get_dictionary(self, adapter_name).add_label(name, fitted.label, fitted.maps)

    def enable_rtsae(self) -> None:
        """Let the loaded dictionaries act again after `disable_rtsae`."""
        _controller(self).enabled = True
        _install(self)

    def disable_rtsae(self) -> None:
        """Let no dictionary act: remove all hooks, but keep dictionaries and features."""
        _controller(self).enabled = False
        _install(self)

    def delete_rtsae(self, adapter_names: str | list[str]) -> None:
        """Remove one or several dictionaries."""
        controller = _controller(self)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        controller.forget([_name(controller, name) for name in names])  # all names are checked before one is deleted
        _install(self)
        if not controller.adapters:
            self.unload_rtsae()

    def unload_rtsae(self) -> None:
        """Remove all dictionaries and features; the pipeline is as it was before `load_rtsae`."""
        vars(self).pop("_rtsae_replaced", None)
        denoisers = get_denoisers(self)
        controllers = {vars(denoiser).pop("_rtsae_controller", None) for denoiser in denoisers.values()} - {None}
        for controller in controllers:
            controller.forget(list(controller.adapters))
            controller.install(denoisers, self)
        vars(self).pop("_rtsae_features", None)

    def save_rtsae(self, save_directory: str | os.PathLike, adapter_name: str | None = None) -> None:
        """Write a loaded dictionary, with a model card, to a folder that `load_rtsae` reads."""
        get_dictionary(self, adapter_name).save(save_directory)

    def push_rtsae_to_hub(self, repo_id: str, adapter_name: str | None = None, **kwargs) -> str:
        """Upload a loaded dictionary, from where `load_rtsae` can load it. The arguments are those of
        [`Dictionary.push_to_hub`]. Returns the URL of the commit."""
        return get_dictionary(self, adapter_name).push_to_hub(repo_id, **kwargs)

    def set_rtsae_device(self, device: torch.device | str, adapter_names: str | list[str] | None = None) -> None:
        """Move whole dictionaries to a device. Steering does not need this: it copies the rows in use by itself."""
        controller = _controller(self)
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names or list(controller.adapters):
            for sae in controller.adapters[_name(controller, name)].dictionary.sites.values():
                sae.to(device)
        _install(self)

    def rtsae_report(self) -> dict[str, list[dict]]:
        """
        What the edits did in the last generation.

        Returns:
            `dict`: for each site a list with one entry per step and edit: its `timestep` and `latents`; `edited`, the
            share of tokens that it changed; `out_of_range`, the share of these on which `clip` kept the latents in the
            range of the training data (`None` without `clip`); and `relative_size`, the size of all edits of the
            dictionary together relative to the activation, on the tokens that they changed. Edits that erase also
            have `everywhere`, the share of pictures left as they are because all of their tokens are to be erased.
        """
        return _controller(self).report()

    def reset_rtsae_state(self) -> None:
        """Let the next call of the denoiser begin a new generation, for calls that no pipeline makes."""
        _controller(self).restart()


class _Replaced:
    """A forward pre-hook of a denoiser that replaced one with dictionaries. It raises `ValueError` when the pipeline
    calls the denoiser, as long as this is the pipeline's last replacement and no dictionary is loaded into it."""

    def __init__(self, component: str, names: list[str]):
        self.component, self.names = component, names

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple) -> None:
        caller = find_caller()
        is_mine = caller is not None and vars(caller.pipeline).get("_rtsae_replaced") is self
        if is_mine and "_rtsae_controller" not in vars(module):
            raise ValueError(
                f"The {self.component} was replaced after `load_rtsae`, and the new one has none of the dictionaries "
                f"{self.names}: call `load_rtsae` again, or `unload_rtsae` first to go on without."
            )


def _replace_denoiser(pipeline, component: str, before, after) -> None:
    """Called when a component of a pipeline was replaced: mark the pipeline if dictionaries are lost with it."""
    mark = vars(pipeline).pop("_rtsae_replaced", None)
    before, after = unwrapped(before), unwrapped(after)
    controller = getattr(before, "_rtsae_controller", None)
    names = list(controller.adapters) if controller is not None else mark.names if mark is not None else []
    if names and "_rtsae_controller" not in getattr(after, "__dict__", {}):
        mark = vars(pipeline)["_rtsae_replaced"] = _Replaced(component, names)
        if isinstance(after, nn.Module):
            after.register_forward_pre_hook(mark)


def attach(pipeline_class: type) -> None:
    """Add the methods of `RTSAELoaderMixin` to a pipeline class and so to its subclasses, and wrap its `__setattr__`
    to notice when a denoiser is replaced."""
    for name, method in vars(RTSAELoaderMixin).items():
        if not name.startswith("_"):
            setattr(pipeline_class, name, method)
    RTSAELoaderMixin.register(pipeline_class)
    PIPELINES.append(pipeline_class)

    set_attribute = pipeline_class.__setattr__

    def __setattr__(self, name, value):
        before = vars(self).get(name) if name in DENOISERS else None
        set_attribute(self, name, value)
        if name in DENOISERS and value is not before:
            _replace_denoiser(self, name, before, value)

    pipeline_class.__setattr__ = __setattr__
