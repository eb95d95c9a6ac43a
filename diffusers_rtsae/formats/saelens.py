"""Autoencoders that others published: a reader for each layout of files into the kinds there are, and a writer."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch

from .files import brief, line, open_tensors, read_json
from .layouts import Published
from .models import SparseAutoencoder, SparseDictionary
from .weights import filled, skeleton

ANCHORS = [961, 721, 481, 241, 1]  # timesteps that stand for all, where nothing says which it was trained at
UNKNOWN = torch.finfo(torch.float32).max  # of an activation that may be as large as it likes
_FLUX_WIDTH = 3072


class _Read(NamedTuple):
    """What a file says in our terms: the kind, its options, and its tensors."""

    kind: str
    options: dict
    tensors: dict[str, torch.Tensor]


def read(folder: Path, one: Published, site: str, dtype: torch.dtype | None) -> SparseDictionary:
    """
    Read an autoencoder; of safetensors, rows are read from disk when they are used.

    Raises:
        `OSError`: a file is damaged. `ValueError`: it says what no kind here can be.
    """
    weights = folder / one.weights
    config_path = folder / one.config if one.config else weights
    config = read_json(config_path) if one.config else {}
    tensors = _unpickled(weights) if one.is_pickled else _mapped(weights)
    for other in one.more:
        tensors |= {PurePosixPath(other).stem: value for value in _unpickled(folder / other).values()}
    found = _READERS[one.layout](_Config(config_path, config), _Tensors(weights, tensors))
    width, count = found.tensors["encoder"].shape[1], len(found.tensors["encoder"])
    options = {"k": count, "anchors": ANCHORS} | found.options
    content = {"_class_name": found.kind, "site": site, "in_channels": width, "num_latents": count} | options
    sae = skeleton(content, config_path, site)
    own = {
        "threshold": torch.zeros(count), "scale": torch.ones(len(options["anchors"])),
        "typical_activation": torch.ones(count), "max_activation": torch.full((count,), UNKNOWN),
        "mean_activation": torch.zeros(count), "density": torch.full((count,), min(1.0, options["k"] / count)),
    }  # fmt: skip
    own |= {name: tensor if name in sae.matrices else tensor.float() for name, tensor in found.tensors.items()}
    return filled(sae, own, weights, dtype)


def _mapped(path: Path) -> dict[str, torch.Tensor]:
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle that holds nothing else, or one of them."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        raise OSError(f"{path} is damaged, or holds more than tensors: {line(error)}") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    content = content if isinstance(content, dict) else {"": content}
    return {str(name): value for name, value in content.items() if torch.is_tensor(value)}


class _Config:
    """A foreign configuration, with what is taken from it checked."""

    def __init__(self, path: Path, content: dict):
        self.path, self.content = path, content

    def get(self, name: str, default=None):
        return self.content.get(name, default)

    def count(self, name: str) -> int:
        value = self.content.get(name)
        if type(value) is not int or not 0 < value < 2**31:
            raise ValueError(f"{self.path} must have {name!r} as a positive int, got {brief(value)}.")
        return value

    def part(self, name: str) -> _Config:
        value = self.content.get(name)
        return _Config(self.path, value if isinstance(value, dict) else {})

    def refuse(self, **values) -> None:
        """Raise `ValueError` unless each of these is what it must be, or left out."""
        for name, (known, why) in values.items():
            value = self.content.get(name)
            if value is not None and value not in list(known):
                raise ValueError(f"{self.path} says {name} = {brief(value)}, and {why}.")


class _Tensors:
    """Foreign tensors, each taken as what it must be."""

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor]):
        self.path, self.tensors = path, tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def size(self, name: str) -> tuple[int, int]:
        """Of a matrix."""
        return tuple(self(name, None, None).shape)

    def __call__(self, name: str, *shape: int | None) -> torch.Tensor:
        """A tensor of floats of this shape."""
        found = self.tensors.get(name)
        sizes = None if found is None else tuple(found.shape)
        fits = sizes is not None and len(sizes) == len(shape) and found.is_floating_point() and 0 not in sizes
        if not fits or any(size not in (None, own) for size, own in zip(shape, sizes, strict=True)):
            what = "nothing" if found is None else f"{str(found.dtype).removeprefix('torch.')} of shape {sizes}"
            wanted = tuple("any" if size is None else size for size in shape)
            raise ValueError(f"{self.path} must hold {name!r} as floats of shape {wanted}, found {what}.")
        halves = (torch.float16, torch.bfloat16, torch.float32)
        return found if found.dtype in halves else found.float()

    def threshold(self, name: str, count: int) -> torch.Tensor:
        """One for each latent, or one for all."""
        shape = () if name in self.tensors and self.tensors[name].ndim == 0 else (count,)
        return self(name, *shape).float().expand(count).clone()


def _sdlens(config: _Config, t: _Tensors) -> _Read:
    """SDLens, of sdxl-unbox (2410.22366): exact TopK of a block's update."""
    count, width, k = (config.count(name) for name in ("n_dirs_local", "d_model", "k"))
    tensors = {
        "encoder": t("encoder.weight", count, width),
        "encoder_bias": t("latent_bias", count),
        "decoder": t("decoder.weight", width, count).T,
        "decoder_bias": t("pre_bias", width),
    }
    if "mean" in t and "std" in t:  # where a latent is active: its 99th percentile, were it normal
        typical = t("mean", count).float() + 2.326 * t("std", count).float()
        tensors["typical_activation"] = torch.where(typical > 0, typical, 1.0)
    return _Read("SparseAutoencoder", {"k": k, "sparsity": "topk", "activation": "update"}, tensors)


def _sparsify(config: _Config, t: _Tensors) -> _Read:
    """sparsify, and SAeUron (2501.18052): TopK of a token, or of all tokens."""
    config.refuse(
        skip_connection=((False,), "the linear path around a transcoder has no place here"),
        activation=(("topk",), "only 'topk' is known"),
        signed=((False,), "latents are not negative here"),
    )
    width, k = config.count("d_in"), config.count("k")
    count = config.count("num_latents" if config.get("num_latents") else "expansion_factor")
    count = count if config.get("num_latents") else count * width
    tensors = {
        "encoder": t("encoder.weight", count, width),
        "encoder_bias": t("encoder.bias", count),
        "decoder": t("W_dec", count, width),
        "decoder_bias": t("b_dec", width),
    }
    options = {"k": k, "sparsity": "batch_topk" if config.get("batch_topk") is True else "topk"}
    if config.get("sample_topk") is True and options["sparsity"] == "topk":
        options["sparsity"] = "sample_topk"
    if config.get("input_unit_norm") is True:
        options["input_norm"] = "layer"
    if config.get("transcode") is True:
        options |= {"activation": "input", "centred": False}
    return _Read("SparseAutoencoder", options, tensors)


_LENS_NORMS = {"none": None, "layer_norm": "layer", "constant_norm_rescale": "length"}
_LENS = (
    "standard",
    "topk",
    "batchtopk",
    "matryoshka_batchtopk",
    "jumprelu",
    "gated",
    "transcoder",
    "jumprelu_transcoder",
)


def _saelens(config: _Config, t: _Tensors) -> _Read:
    """SAELens from version 6 on."""
    reads = "it is of a kind that is not known here"
    config.refuse(
        architecture=(_LENS, reads),
        activation_fn=(("relu",), reads),
        activation_fn_str=(("relu",), reads),
        normalize_activations=(_LENS_NORMS, "the factor that it was trained with is in no file"),
        reshape_activations=(("none",), "tokens have no heads here"),
        finetuning_scaling_factor=((False,), reads),
    )
    width, count, name = config.count("d_in"), config.count("d_sae"), config.get("architecture") or "standard"
    is_transcoder = name.endswith("transcoder")
    if is_transcoder:
        config.refuse(d_out=((width,), f"a change is as wide here as what is read, {width}"))
    encoder, decoder = t("W_enc", width, count).T, t("W_dec", count, width)
    options = {"centred": not is_transcoder and config.get("apply_b_dec_to_input") is not False}
    options["input_norm"] = _LENS_NORMS[config.get("normalize_activations") or "none"]
    if is_transcoder:
        options["activation"] = "input"
    if name == "gated":
        return _Read("SparseAutoencoder", options, _gated(
            encoder, t("b_gate", count), t("b_mag", count), t("r_mag", count), decoder, t("b_dec", width)
        ))  # fmt: skip
    tensors = {
        "encoder": encoder,
        "encoder_bias": t("b_enc", count),
        "decoder": decoder,
        "decoder_bias": t("b_dec", width),
    }
    if name == "topk":
        options |= {"sparsity": "topk", "k": config.count("k")}
    elif name not in ("standard", "transcoder"):
        tensors["threshold"] = t.threshold("topk_threshold" if "topk_threshold" in t else "threshold", count)
    if config.get("rescale_acts_by_decoder_norm") is True:
        tensors = _unit_rows(tensors)
    return _Read("SparseAutoencoder", options, tensors)


def _dictionary_learning(config: _Config, t: _Tensors) -> _Read:
    """dictionary_learning, by the class that its configuration names. Newer versions count activations of gated and
    JumpReLU ones in lengths of decoder rows; what these stand for is the same."""
    trainer, options = config.part("trainer"), {}
    name = trainer.get("dict_class")
    if name == "GatedAutoEncoder":
        count, width = t.size("encoder.weight")
        tensors = _gated(
            t("encoder.weight", count, width), t("gate_bias", count), t("mag_bias", count), t("r_mag", count),
            t("decoder.weight", width, count).T, t("decoder_bias", width),
        )  # fmt: skip
    elif name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        width, count = t.size("W_enc")
        tensors = {
            "encoder": t("W_enc", width, count).T,
            "encoder_bias": t("b_enc", count),
            "decoder": t("W_dec", count, width),
            "decoder_bias": t("b_dec", width),
            "threshold": t.threshold("threshold", count),
        }
        if name == "JumpReluAutoEncoder":
            options["centred"] = False
    elif name in ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE"):
        count, width = t.size("encoder.weight")
        bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(name, "b_dec")
        tensors = {
            "encoder": t("encoder.weight", count, width),
            "encoder_bias": t("encoder.bias", count),
            "decoder": t("decoder.weight", width, count).T,
            "decoder_bias": t(bias, width),
        }
        if name == "BatchTopKSAE":
            tensors["threshold"] = t.threshold("threshold", count)
        if name == "AutoEncoderTopK":
            options = {"sparsity": "topk", "k": trainer.count("k")}
        if name == "AutoEncoderNew":
            options["centred"] = False
    else:
        raise ValueError(f"{config.path} must name a `dict_class` that is known here, got {brief(name)}.")
    return _Read("SparseAutoencoder", options, tensors)


def _diffract(config: _Config, t: _Tensors) -> _Read:
    """DifFRACT (2606.15796): a ReLU autoencoder or transcoder of an MLP, modulated by the timestep."""
    (count, width), channels = t.size("encoder.weight"), t.size("time_mlp.0.weight")[0]
    tensors = {
        "encoder": t("encoder.weight", count, width),
        "encoder_bias": t("encoder.bias", count),
        "decoder": t("decoder.weight", width, count).T,
        "decoder_bias": t("decoder.bias", width),
        "modulation.weight": t("mod_linear.weight", 2 * width, channels),
        "modulation.bias": t("mod_linear.bias", 2 * width),
    }
    for layer in (0, 2):
        tensors[f"time_mlp.{layer}.weight"] = t(f"time_mlp.{layer}.weight", channels, channels)
        tensors[f"time_mlp.{layer}.bias"] = t(f"time_mlp.{layer}.bias", channels)
    options = {
        "time_channels": channels, "centred": False, "undone": False, "flip_sin_to_cos": False,
        "downscale_freq_shift": 1.0, "time_scale": 0.001 if width == _FLUX_WIDTH else 1.0,  # as Flux is called: 0 to 1
        "activation": "input" if t.path.stem.startswith("transcoder") else "output",
    }  # fmt: skip
    return _Read("TIDE", options, tensors)


def _gated(
    encoder: torch.Tensor, gate: torch.Tensor, magnitude: torch.Tensor, scale: torch.Tensor, decoder: torch.Tensor,
    bias: torch.Tensor,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """A gated autoencoder (2404.16014) as one above a threshold: w x + b_gate > 0 where eʳ w x + b_mag > b_mag − eʳ
    b_gate."""
    scale = scale.float().exp()
    return {
        "encoder": encoder.float() * scale[:, None],
        "encoder_bias": magnitude,
        "threshold": magnitude.float() - scale * gate.float(),
        "decoder": decoder,
        "decoder_bias": bias,
    }


def _unit_rows(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same autoencoder with decoder rows of length 1, and activations as large as what they add."""
    length = tensors["decoder"].float().norm(dim=1).clamp(min=1e-20)
    scaled = {"encoder": tensors["encoder"].float() * length[:, None], "decoder": tensors["decoder"] / length[:, None]}
    for name in ("encoder_bias", "threshold"):
        if name in tensors:
            scaled[name] = tensors[name].float() * length
    return tensors | scaled


def saelens(sae: SparseDictionary, base_model: str | None) -> tuple[dict, dict[str, torch.Tensor]]:
    """
    A static autoencoder as SAELens has it: its configuration and its tensors.

    Raises:
        `ValueError`: SAELens has nothing like it.
    """
    c, names = sae.config, {value: name for name, value in _LENS_NORMS.items()}
    jumps, transcodes = type(sae) is SparseAutoencoder and bool(sae.threshold.any()), c.activation == "input"
    architecture = {"threshold": "jumprelu" if jumps else "standard", "topk": "topk"}.get(c.get("sparsity"))
    if transcodes:
        architecture = {"jumprelu": "jumprelu_transcoder", "standard": "transcoder"}.get(architecture)
    if type(sae) is not SparseAutoencoder or architecture is None or transcodes and (c.centred or c.input_norm):
        raise ValueError(f"SAELens has nothing like the {type(sae).__name__} of {c.site}.")
    config = {
        "architecture": architecture, "d_in": c.in_channels, "d_sae": c.num_latents, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": c.centred, "normalize_activations": names[c.input_norm],
        "reshape_activations": "none",
        "metadata": {"hook_name": c.site, "model_name": base_model, "sae_lens_version": "6.0.0"},  # of this layout
    }  # fmt: skip
    config |= {"k": c.k} if architecture == "topk" else {"d_out": c.in_channels} if transcodes else {}
    tensors = {"W_enc": sae.encoder.T, "b_enc": sae.encoder_bias, "W_dec": sae.decoder, "b_dec": sae.decoder_bias}
    tensors |= {"threshold": sae.threshold} if jumps and architecture != "topk" else {}
    return config, {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in tensors.items()}


_READERS = {
    "sparsify": _sparsify,
    "SAELens": _saelens,
    "SDLens": _sdlens,
    "dictionary_learning": _dictionary_learning,
    "DifFRACT": _diffract,
}
