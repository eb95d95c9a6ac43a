"""What trajectories were made of, as JSON that is stored beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..recipe import Recipe

# components that latents do not depend on, and configuration keys that concern only the file
_OF_PICTURES = {"vae", "image_encoder", "feature_extractor", "safety_checker", "watermark"}
_OF_FILES = {"transformers_version", "architectures", "dtype", "torch_dtype"}


def fingerprint(
    recipe: Recipe, samples: Sequence, anchors: Sequence[int], pipe: DiffusionPipeline, scorer: torch.nn.Module | None
) -> str:
    """
    Everything that trajectories, and a scorer's readings of the pictures, depend on.

    Args:
        samples: pairs of a prompt and a seed.
        anchors: the timesteps to keep.
        scorer (*optional*): reads the pictures. Without one nothing depends on how latents are decoded.
    """
    prompts = _digest(json.dumps(samples).encode())
    made_of = json.loads(recipe.collected) | {"anchors": list(anchors), "prompts": prompts}
    options = {name: value for name, value in pipe.config.items() if not isinstance(value, tuple | list)}
    made_of["pipe"] = {"class": type(pipe).__name__} | _settings(options)
    parts = {name: part for name, part in pipe.components.items() if scorer is not None or name not in _OF_PICTURES}
    for name, part in (parts | {"scorer": scorer}).items():
        if part is not None:
            made_of[name] = _component(part)
    return json.dumps(made_of, sort_keys=True)


def _digest(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _settings(config: dict) -> dict:
    """A configuration without the keys that say where it was loaded from."""
    kept = {name: value for name, value in config.items() if not name.startswith("_") and name not in _OF_FILES}
    return json.loads(json.dumps(kept, sort_keys=True, default=str))


def _component(part) -> str | dict:
    """A scheduler's settings; of larger components their class and a digest."""
    name = type(part).__name__
    if isinstance(part, SchedulerMixin):
        return {"class": name} | _settings(dict(part.config))
    if isinstance(part, torch.nn.Module):
        config = getattr(part, "config", {})
        config = config.to_diff_dict() if hasattr(config, "to_diff_dict") else dict(config)
        return f"{name} {_digest(json.dumps(_settings(config)).encode(), *_weights(part))}"
    if hasattr(part, "get_vocab"):
        return f"{name} {_digest(json.dumps(_tokenizer(part), sort_keys=True, default=str).encode())}"
    return f"{name} {_digest(json.dumps(_settings(dict(getattr(part, 'config', {})))).encode())}"


def _weights(module: torch.nn.Module) -> Iterator[bytes]:
    for name, tensor in module.state_dict().items():
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _tokenizer(tokenizer) -> dict:
    """What determines the tokens of a text, without the padding of the latest call."""
    rules = {}
    if hasattr(tokenizer, "backend_tokenizer"):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules = {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
    special = dict(tokenizer.special_tokens_map)
    settings = {"length": tokenizer.model_max_length, "side": tokenizer.padding_side, "special": special}
    return settings | {"rules": rules or tokenizer.get_vocab()}
