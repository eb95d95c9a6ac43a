"""
Sites: the modules of a denoiser or a text encoder that can be read and edited, what they take and return, and in which
layout.

Blocks that return several tensors differ in which one holds the hidden states of the image. For many blocks diffusers'
`TransformerBlockRegistry` has this. `BLOCKS` has it for the others, with whatever else is unusual about them.
"""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass, replace

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import nn

DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer", "decoder", "prior")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # are never called themselves
_SITES = ("Transformer2DModel", "ResnetBlock2D")  # class names of sites, beside those with one of these endings:
_SITE_ENDINGS = (
    "TransformerBlock", "TransformerDecoderBlock", "DiffuserBlock", "DiTBlock", "AdaLNBlock", "DecoderLayer",
)  # fmt: skip
_BLOCK_LISTS = ("blocks", "layers")  # endings of the names of lists in a denoiser whose elements are sites


@dataclass(frozen=True)
class Block:
    """
    What a site takes and returns.

    Args:
        argument (`str`): the parameter of its `forward` for the hidden states.
        index (`int`, *optional*): position of the hidden states in the tuple that it returns. Without it the site must
            return a tensor, a 1-tuple, or a tensor and skip connections.
        layout (`str`): layout of the hidden states. `"tokens"`: `(rows, tokens, channels)`, or with 4 or 5 dimensions
            `(rows, channels, ..., height, width)`; `"channels"`: `(rows, channels, tokens)`; `"tokens first"`:
            `(tokens, rows, channels)`.
        place (`int`): position of `argument` among the parameters of its `forward`.
    """

    argument: str
    index: int | None = None
    layout: str = "tokens"
    place: int = 0

    def input(self, args: tuple, kwargs: dict) -> torch.Tensor:
        """The hidden states that the site was called with."""
        return kwargs[self.argument] if self.argument in kwargs else args[self.place]

    def output(self, returned) -> torch.Tensor:
        """
        The hidden states in what the site returned.

        Raises:
            `ValueError`: it returned several tensors, and it is not known which one holds the hidden states.
        """
        if torch.is_tensor(returned):
            return returned
        if hasattr(returned, "sample"):
            return returned.sample
        return returned[self._index(returned)]

    def returning(self, returned, hidden_states: torch.Tensor):
        """What the site returned, with other hidden states in it. If the old ones are among the skip connections as
        well, they are replaced there, too."""
        if torch.is_tensor(returned):
            return hidden_states
        if hasattr(returned, "sample"):
            return replace(returned, sample=hidden_states)
        index = self._index(returned)
        old = returned[index]

        def renewed(element, i: int):
            if i == index:
                return hidden_states
            if isinstance(element, tuple | list):
                return type(element)(hidden_states if one is old else one for one in element)
            return element

        return tuple(renewed(element, i) for i, element in enumerate(returned))

    def _index(self, returned: tuple) -> int:
        if self.index is not None:
            return self.index
        tensors = [i for i, element in enumerate(returned) if torch.is_tensor(element)]
        if tensors == [0]:  # hidden states and skip connections, or nothing else
            return 0
        raise ValueError(
            f"This block returns {len(returned)} things, and which of them are the image's hidden states is not "
            "known: expected a tensor, a tensor with skip connections, or a class that `denoiser/blocks.py` or "
            "diffusers' `TransformerBlockRegistry` lists."
        )

    def to_tokens(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """View hidden states as tokens `(rows, tokens, channels)`."""
        if self.layout == "tokens first":
            return hidden_states.transpose(0, 1)
        return hidden_states.flatten(2).transpose(1, 2) if self._has_channels_second(hidden_states) else hidden_states

    def from_tokens(self, tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_tokens`: tokens `(rows, tokens, channels)`, or `(rows, 1, channels)` to be broadcast, in
        the layout and dtype of the hidden states `like`."""
        tokens, single = tokens.to(like.dtype), tokens.shape[1] == 1
        if self.layout == "tokens first":
            return tokens.transpose(0, 1)
        if not self._has_channels_second(like):
            return tokens
        return tokens.transpose(1, 2).unflatten(2, (1,) * (like.ndim - 2) if single else like.shape[2:])

    def _has_channels_second(self, hidden_states: torch.Tensor) -> bool:
        return self.layout == "channels" or hidden_states.ndim > 3

    def rows(self, hidden_states: torch.Tensor, part: slice) -> tuple:
        """The index of a slice of the rows of hidden states."""
        return (slice(None), part) if self.layout == "tokens first" else (part,)

    def batch(self, hidden_states: torch.Tensor) -> int:
        """Number of rows of hidden states."""
        return hidden_states.shape[1 if self.layout == "tokens first" else 0]

    def space(self, hidden_states: torch.Tensor) -> tuple[int, ...]:
        """The dimensions of hidden states other than rows and channels."""
        shape = tuple(hidden_states.shape)
        if self.layout == "tokens first":
            return shape[:1]
        return shape[2:] if self._has_channels_second(hidden_states) else shape[1:-1]

    def activation(self, kind: str, block_input: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """The activation of a site as tokens, of this kind: its `"output"`, its `"update"` (output − input), or its
        `"input"`."""
        if kind == "input":
            return self.to_tokens(block_input)
        tokens = self.to_tokens(hidden_states)
        return tokens - self.to_tokens(block_input) if kind == "update" else tokens


_TEXT_FIRST, _TEXT_SECOND = {"index": 1}, {"index": 0}

#: Fields of [`Block`] that differ from the defaults, by the class name of the block.
BLOCKS: dict[str, dict] = {
    **dict.fromkeys(
        (
            "AuraFlowJointTransformerBlock", "BriaFiboTransformerBlock", "BriaTransformerBlock",
            "BriaSingleTransformerBlock", "ChromaTransformerBlock", "Flux3SingleTransformerBlock",
            "LongCatImageTransformerBlock", "LongCatImageSingleTransformerBlock", "OvisImageTransformerBlock",
            "OvisImageSingleTransformerBlock",
        ),
        _TEXT_FIRST,
    ),
    **dict.fromkeys(
        (
            "CogView3PlusTransformerBlock", "ConsisIDBlock", "EasyAnimateTransformerBlock",
            "GlmImageTransformerBlock", "HiDreamBlock", "HunyuanVideo15TransformerBlock",
            "JoyImageTransformerBlock", "JoyImageEditPlusTransformerBlock",
        ),
        _TEXT_SECOND,
    ),
    "LTX2VideoTransformerBlock": {"index": 0},  # the other is the sound
    "Kandinsky6FusedTransformerDecoderBlock": {"index": 0},
    "CosmosTransformerBlock": {"index": 0},  # the other is added to the block that this one controls
    "WanVACETransformerBlock": {"index": 1, "argument": "control_hidden_states"},
    "AttnSkipDownBlock2D": {"index": 0},
    "SkipDownBlock2D": {"index": 0},
    "AttnSkipUpBlock2D": {"index": 0},
    "SkipUpBlock2D": {"index": 0},
    "ControlNetXSCrossAttnDownBlock2D": {"index": 0},
    "ControlNetXSCrossAttnMidBlock2D": {"index": 0},
    "ErnieImageSharedAdaLNBlock": {"layout": "tokens first"},
    "GLMBlock": {"index": 0, "layout": "tokens first"},  # of the text encoder of Kolors
    **dict.fromkeys(
        (
            "AttnDownBlock1D", "DownBlock1D", "DownBlock1DNoSkip", "DownResnetBlock1D", "AttnUpBlock1D", "UpBlock1D",
            "UpBlock1DNoSkip", "UpResnetBlock1D", "UNetMidBlock1D", "MidResTemporalBlock1D",
        ),
        {"layout": "channels"},
    ),
}  # fmt: skip


def describe(module: nn.Module) -> Block:
    """The [`Block`] of a module, from its signature, diffusers' registry and `BLOCKS`."""
    kind = type(unwrapped(module))
    names = [*inspect.signature(kind.forward).parameters][1:]
    known: dict = {"argument": names[0]}
    if kind.__module__.startswith("transformers."):
        known["index"] = 0  # its layers return hidden states first, and then biases or weights of attention
    try:
        metadata = TransformerBlockRegistry.get(kind)
        known |= {"index": metadata.return_hidden_states_index, "argument": metadata.hidden_states_argument_name}
    except ValueError:  # not registered
        pass
    known |= next((BLOCKS[base.__name__] for base in kind.__mro__ if base.__name__ in BLOCKS), {})
    return Block(**known, place=names.index(known["argument"]) if known["argument"] in names else 0)


def unwrapped(module):
    """The module that `torch.compile` wrapped, or the module itself if it is not wrapped."""
    return getattr(module, "_orig_mod", module)


def get_denoisers(pipeline) -> dict[str, nn.Module]:
    """
    The denoisers of a pipeline by the name of their component: its U-Net or transformer, and further ones of the same
    class that are called alternately with it.

    Raises:
        `ValueError`: it has none.
    """
    components = {name: unwrapped(getattr(pipeline, name, None)) for name in DENOISERS}
    denoisers = {name: module for name, module in components.items() if isinstance(module, nn.Module)}
    if not denoisers:
        raise ValueError(f"{type(pipeline).__name__} has no denoiser: expected a component of {list(DENOISERS)}.")
    first = type(next(iter(denoisers.values())))
    return {name: module for name, module in denoisers.items() if type(module) is first}


def get_denoiser(pipeline) -> nn.Module:
    """The U-Net or transformer of a pipeline; the first one if it has several."""
    return next(iter(get_denoisers(pipeline).values()))


def get_text_encoders(pipeline) -> dict[str, nn.Module]:
    """The text encoders of a pipeline by the name of their component; none if it is called with embeddings alone."""
    components = {name: unwrapped(getattr(pipeline, name, None)) for name in TEXT_ENCODERS}
    return {name: module for name, module in components.items() if isinstance(module, nn.Module)}


def split_site(site: str) -> tuple[str, str]:
    """The text encoder that a site lies in, and the path of its module there: a site in a text encoder begins with the
    name of that component. The first is empty for a site of a denoiser."""
    component, _, path = site.partition(".")
    return (component, path) if component in TEXT_ENCODERS else ("", site)


def joined_sites(site: str) -> list[str]:
    """The sites that `a+b` joins, of which a dictionary reads the activations side by side, token by token; of any
    other site, itself."""
    return site.split("+")


def list_sites(model) -> list[str]:
    """
    Paths of the modules that a dictionary can be attached to, in the order of their definition.

    Args:
        model (`DiffusionPipeline` or `nn.Module`): a pipeline or its denoiser; or one of its text encoders. Put the
            name of the component before a path in a text encoder: `text_encoder.encoder.layers.9`.

    Raises:
        `ValueError`: `model` is neither.
    """
    denoiser = unwrapped(model) if isinstance(model, nn.Module) else get_denoiser(model)
    if _is_of_transformers(denoiser):
        return _list_layers(denoiser)
    sites = []
    for name, module in denoiser.named_modules():
        name = name.replace("._orig_mod", "")
        kinds, depth = [kind.__name__ for kind in type(unwrapped(module)).__mro__], name.count(".")
        above = denoiser.get_submodule(name.rpartition(".")[0]) if depth == 2 else None
        in_list = depth == 1 or isinstance(above, _CONTAINERS)  # or in a list of lists
        is_block = in_list and name.split(".")[0].endswith(_BLOCK_LISTS) or name == "mid_block"
        is_site = any(kind in _SITES or kind.endswith(_SITE_ENDINGS) for kind in kinds)
        if name and name not in sites and (is_block or is_site) and not isinstance(module, _CONTAINERS):
            sites.append(name)
    return sites


def _is_of_transformers(model: nn.Module) -> bool:
    return any(base.__module__.startswith("transformers.") for base in type(model).__mro__)


def _list_layers(text_encoder: nn.Module) -> list[str]:
    """The layers of a text encoder: what lies in a list, but in no list inside of another."""
    lists = [name for name, module in text_encoder.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return [f"{name}.{i}" for name in outer for i in range(len(text_encoder.get_submodule(name)))]


def get_site(model: nn.Module, name: str) -> nn.Module:
    """The module at the path `name` of a denoiser, or of the text encoder that `name` begins with; raises
    `ValueError` with the closest sites if there is none."""
    component, path = split_site(name)
    for spelling in _spellings(path) if component else [path]:
        module = _follow(model, spelling)
        if module is not None:
            return module
    near = difflib.get_close_matches(path, list_sites(model), n=3, cutoff=0)
    near = [f"{component}.{one}" if component else one for one in near]
    raise ValueError(
        f"{type(model).__name__} has no site {name!r}. The closest are {near}; `list_sites` of it has all."
    )


def _follow(module: nn.Module | None, path: str) -> nn.Module | None:
    for part in path.split("."):
        module = getattr(unwrapped(module), "_modules", {}).get(part)
    return module


def _spellings(path: str) -> list[str]:
    """How releases of transformers spell a path in a CLIP text encoder: with and without `text_model`."""
    inner = path.removeprefix("text_model.")
    return [path, inner, f"text_model.{inner}"]


def is_text(site: str) -> bool:
    """Whether the tokens of a site are text tokens, by the names that diffusers gives to the text stream."""
    return site.endswith("_context") or site.split(".")[0] in (*_TEXT_BLOCKS, *TEXT_ENCODERS)


_TEXT_BLOCKS = ("context_refiner", "text_transformer_blocks", "txt_mode_blocks", "token_refiner", "context_embedder")
