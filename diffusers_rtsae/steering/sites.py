"""Sites: where a denoiser can be read and edited, and how its activations are laid out."""

from __future__ import annotations

import difflib
import math

import torch
from torch import nn

DENOISERS = ("unet", "transformer")  # as pipelines name them
_BLOCKS = ("Transformer2DModel", "BasicTransformerBlock", "ResnetBlock2D")


def get_denoiser(pipeline) -> nn.Module:
    """The U-Net or transformer of a pipeline."""
    for name in DENOISERS:
        module = getattr(pipeline, name, None)
        if isinstance(module, nn.Module):
            return unwrapped(module)
    raise ValueError(f"{type(pipeline).__name__} has no denoiser: expected a component `unet` or `transformer`.")


def unwrapped(module):
    """A module inside what `torch.compile` returned."""
    return getattr(module, "_orig_mod", module)


def list_sites(model) -> list[str]:
    """
    Paths of the modules that a dictionary can be attached to, in the order they are defined.

    Args:
        model (`DiffusionPipeline` or `nn.Module`): a pipeline or its denoiser.

    Raises:
        `ValueError`: `model` is neither.
    """
    denoiser = model if isinstance(model, nn.Module) else get_denoiser(model)
    sites = []
    for name, module in denoiser.named_modules():
        kinds, depth = [kind.__name__ for kind in type(module).__mro__], name.count(".")
        is_block = depth == 1 and name.split(".")[0].endswith("blocks") or name == "mid_block"
        if name and (is_block or any(kind in _BLOCKS or kind.endswith("TransformerBlock") for kind in kinds)):
            sites.append(name)
    return sites


def get_site(denoiser: nn.Module, name: str) -> nn.Module:
    """The module at path `name`; raises `ValueError` with the closest sites if there is none."""
    modules = dict(denoiser.named_modules())
    if name not in modules or not name:
        near = difflib.get_close_matches(name, list_sites(denoiser), n=3, cutoff=0)
        raise ValueError(
            f"{type(denoiser).__name__} has no site {name!r}. The closest are {near}; `list_sites(denoiser)` has all."
        )
    return modules[name]


def read_output(output) -> torch.Tensor:
    """The hidden states in what a block returns: a tensor, a 1-tuple, `(h, residuals)`, or `(text, image)` streams."""
    if torch.is_tensor(output):
        return output
    if len(output) == 2 and torch.is_tensor(output[1]):  # DiT blocks with two streams: (encoder_hidden_states, h)
        return output[1]
    return output[0]


def replace_output(output, hidden_states: torch.Tensor):
    """What the block would have returned with `hidden_states`; a down block's skip connection is replaced as well."""
    if torch.is_tensor(output):
        return hidden_states
    if len(output) == 2 and torch.is_tensor(output[1]):
        return (output[0], hidden_states)
    if len(output) == 2 and isinstance(output[1], tuple) and output[1][-1] is output[0]:
        return (hidden_states, (*output[1][:-1], hidden_states))
    return (hidden_states, *output[1:])


def read_activation(kind: str, block_input: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """What a dictionary reads at a site as tokens `(B, N, d)`: its `"output"`, its `"update"` (output − input), or its
    `"input"`."""
    if kind == "input":
        return to_tokens(block_input)
    return to_tokens(hidden_states) - to_tokens(block_input) if kind == "update" else to_tokens(hidden_states)


def to_tokens(hidden_states: torch.Tensor) -> torch.Tensor:
    """View `(B, C, H, W)` or `(B, N, C)` as tokens `(B, N, C)`."""
    return hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states


def from_tokens(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Lay tokens `(B, N, C)` (or `(B, 1, C)`, to be broadcast) out as the activation `like`, in its dtype."""
    tokens = tokens.to(like.dtype)
    if like.ndim == 3:
        return tokens
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:] if tokens.shape[1] > 1 else (1, 1))


def spatial_size(site: str, shape: tuple[int, ...], latent_size: tuple[int, int]) -> tuple[int, int]:
    """As [`token_grid`]; raises `ValueError` if there is none."""
    size, (height, width) = token_grid(site, shape, latent_size), latent_size
    if size is None:
        raise ValueError(
            f"Cannot lay {shape[1]} tokens out over a {height}x{width} latent; spatial masks need a grid."
        )
    return size


def is_text(site: str) -> bool:
    """Whether the tokens of a site are those of the text, as diffusers names what is done to it beside the image."""
    return site.endswith("_context")


def token_grid(site: str, shape: tuple[int, ...], latent_size: tuple[int, int]) -> tuple[int, int] | None:
    """Height and width of the token grid of an activation of `shape` at a site, which has the proportions of
    `latent_size`; `None` if tokens do not lie on one, as those of text do not."""
    if is_text(site):
        return None
    if len(shape) == 4:
        return shape[2], shape[3]
    (height, width), tokens = latent_size, shape[1]
    factor = math.sqrt(height * width / tokens)
    size = (round(height / factor), round(width / factor)) if factor else (0, 0)
    return size if size[0] * size[1] == tokens else None
