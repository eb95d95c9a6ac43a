"""overcomplete: a pickled model, or its state dict with a few words about it."""

from __future__ import annotations

from .base import Description, Format, Settings, Tensors

_CLASSES = ("SAE", "TopKSAE", "BatchTopKSAE", "JumpSAE", "QSAE", "RATopKSAE", "RAJumpSAE")
_REASONS = {
    "MpSAE": "its latents may be negative",
    "OMPSAE": "all its latents change whenever one more is chosen",
}


class Overcomplete(Format):
    """overcomplete.pt or .pth with the model itself (`torch.save(sae, …)`); or that or overcomplete.safetensors with
    the state dict of a model that was in evaluation mode, and overcomplete.json beside it: `{"class": "TopKSAE",
    "top_k": 32}`, with `running_threshold` for a BatchTopKSAE and `hard` for a QSAE."""

    name, weights, config, needs_config = "overcomplete", "overcomplete", "overcomplete.json", False
    pickled_classes = ("overcomplete.", "torch.nn.modules.")

    def describe(self, settings: Settings, tensors: Tensors) -> Description:
        name = settings.get("class")
        reason = _REASONS.get(name, f"`class` must be one of {list(_CLASSES)}") if isinstance(name, str) else None
        settings.require(
            "class", _CLASSES, reason or "a state dict does not say it: name the `class` of the model there"
        )
        settings.expect("encoder.final_activation", ["ReLU"], "latents are rectified here")
        rows = _rows(settings, tensors)
        count, width = rows.shape
        encoder, bias = _encoder(settings, tensors, rows)
        converted = {
            "encoder": encoder, "encoder_bias": bias, "decoder": rows, "decoder_bias": rows.new_zeros(width)
        }  # fmt: skip
        if name == "QSAE":
            levels = tensors("Q", None)
            options = {"centred": False, "num_levels": len(levels), "hard": settings.flag("hard")}
            return Description("QuantizedSAE", options, converted | {"levels": levels})
        options = {"centred": False}
        if name in ("TopKSAE", "RATopKSAE"):
            options |= {"sparsity": "topk", "k": settings.count("top_k")}
        if name == "BatchTopKSAE":
            converted["threshold"] = _from(rows.new_full((count,), settings.number("running_threshold")))
        if name in ("JumpSAE", "RAJumpSAE"):
            converted["threshold"] = _from(tensors("thresholds", count).float().exp())
        return Description("SparseAutoencoder", options, converted)


def _from(threshold):
    """The largest number below: a latent that equals its threshold is active there, and is not here."""
    return threshold.nextafter(threshold.new_tensor(float("-inf")))


def _rows(settings: Settings, tensors: Tensors):
    """The dictionary `(m, d)` that a model in evaluation mode multiplies by."""
    scale = tensors("dictionary.multiplier").exp() if "dictionary.multiplier" in tensors else 1.0
    if "dictionary.C" in tensors:  # archetypal: convex combinations of points, and a part that is kept short
        points = tensors("dictionary.C", None, None)
        weights = tensors("dictionary.W", None, len(points)).relu()
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-8)
        relaxed = tensors("dictionary.Relax", len(weights), points.shape[1])
        delta = settings.number("dictionary.delta")
        relaxed = relaxed * (delta / relaxed.norm(dim=-1, keepdim=True)).clamp(max=1)
        return (weights @ points + relaxed) * scale
    rows = tensors("dictionary._weights", None, None)
    norm = settings.get("dictionary.normalization")
    lengths = {p: rows.norm(p=p, dim=1, keepdim=True) for p in (1, 2)}
    normalized = {
        "normalize_l2": lambda: rows / (lengths[2] + 1e-8),
        "normalize_l1": lambda: rows / (lengths[1] + 1e-8),
        "normalize_max_l2": lambda: rows / lengths[2].amax(),
        "normalize_max_l1": lambda: rows / lengths[1].amax(),
        "normalize_identity": lambda: rows,
    }
    settings.expect("dictionary.normalization", normalized, "such a normalisation of the dictionary is not known")
    if norm is None:  # a state dict; of a model in evaluation mode, which has normalised its rows already
        found = [*lengths.values(), *(length.amax() for length in lengths.values())]
        if not any((length - 1).abs().amax() < 1e-3 for length in found):
            raise ValueError(
                f"{tensors.path} has a dictionary that is not normalised: call eval() before its state dict is saved, "
                "or convert the pickled model."
            )
        return rows * scale
    return normalized[norm]() * scale


def _encoder(settings: Settings, tensors: Tensors, rows):
    """The encoder's rows `(m, d)` and bias `(m,)`, with a batch norm after it multiplied in."""
    count, width = rows.shape
    known = ("encoder.weight", "encoder.bias", "encoder.tied_to.", "encoder.final_block.")
    if any(name.startswith("encoder.") and not name.startswith(known) for name in tensors.names):
        raise ValueError(f"{tensors.path} has an encoder of many layers; only a linear one is one row a latent.")
    if "encoder.final_block.0.weight" not in tensors:  # made by tied() or untied()
        weight = tensors("encoder.weight", count, width) if "encoder.weight" in tensors else rows
        return weight, tensors("encoder.bias", count) if "encoder.bias" in tensors else rows.new_zeros(count)
    weight = tensors("encoder.final_block.0.weight", count, width).float()
    bias = tensors("encoder.final_block.0.bias", count).float()
    if "encoder.final_block.1.weight" not in tensors:
        return weight, bias
    if "encoder.final_block.1.running_var" not in tensors:
        raise ValueError(f"{tensors.path} normalises all latents of a token together, so that none is one row.")
    mean, variance, gain, shift = (
        tensors(f"encoder.final_block.1.{part}", count).float()
        for part in ("running_mean", "running_var", "weight", "bias")
    )
    eps = "encoder.final_block.1.eps"
    gain = gain / (variance + (1e-5 if settings.get(eps) is None else settings.number(eps))).sqrt()
    return weight * gain[:, None], (bias - mean) * gain + shift
