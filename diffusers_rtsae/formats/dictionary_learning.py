"""dictionary_learning, by the class that its configuration names. Latents are in the units that they have in the
package once it has loaded a file: of an `AutoEncoder`, it makes the decoder's rows as long as 1."""

from __future__ import annotations

from ..files import brief
from .base import Description, Format, Settings, Tensors, gated, unit_rows


class DictionaryLearning(Format):
    """config.json with ae.pt."""

    name, weights, config = "dictionary_learning", "ae", "config.json"

    def describe(self, settings: Settings, tensors: Tensors) -> Description:
        trainer, options = settings.section("trainer"), {}
        name = trainer.get("dict_class")
        if name == "GatedAutoEncoder":
            count, width = tensors.size("encoder.weight")
            converted = gated(
                tensors("encoder.weight", count, width),
                *(tensors(part, count) for part in ("gate_bias", "mag_bias", "r_mag")),
                tensors("decoder.weight", width, count).T,
                tensors("decoder_bias", width),
            )
        elif name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
            width, count = tensors.size("W_enc")
            converted = {
                "encoder": tensors("W_enc", width, count).T,
                "encoder_bias": tensors("b_enc", count),
                "decoder": tensors("W_dec", count, width),
                "decoder_bias": tensors("b_dec", width),
                "threshold": tensors.threshold("threshold", count),
            }
            if name == "JumpReluAutoEncoder":
                options["centred"] = False
        elif name in ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE"):
            count, width = tensors.size("encoder.weight")
            bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(name, "b_dec")
            converted = {
                "encoder": tensors("encoder.weight", count, width),
                "encoder_bias": tensors("encoder.bias", count),
                "decoder": tensors("decoder.weight", width, count).T,
                "decoder_bias": tensors(bias, width),
            }
            if name == "BatchTopKSAE":
                converted["threshold"] = tensors.threshold("threshold", count)
            if name == "AutoEncoder":
                converted = unit_rows(converted)
            if name == "AutoEncoderTopK":
                options = {"sparsity": "topk", "k": trainer.count("k")}
            if name == "AutoEncoderNew":
                options["centred"] = False
        else:
            raise ValueError(f"{settings.path} must name a `dict_class` that is known here, got {brief(name)}.")
        return Description("SparseAutoencoder", options, converted)
