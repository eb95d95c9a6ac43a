"""sparsify, and SAeUron (2501.18052) and SAEmnesia (2509.21379): TopK of a token, or of all tokens."""

from __future__ import annotations

from .base import Description, Format, Settings, Tensors, signed


class Sparsify(Format):
    """cfg.json with sae.safetensors."""

    name, weights, config = "sparsify", "sae", "cfg.json"

    def describe(self, settings: Settings, tensors: Tensors) -> Description:
        settings.expect("activation", ["topk", "groupmax"], "only 'topk' and 'groupmax' are known")
        width, k = settings.count("d_in"), settings.count("k")
        count = settings.count("num_latents" if settings.get("num_latents") else "expansion_factor")
        count = count if settings.get("num_latents") else count * width
        converted = {
            "encoder": tensors("encoder.weight", count, width),
            "encoder_bias": tensors("encoder.bias", count),
            "decoder": tensors("W_dec", count, width),
            "decoder_bias": tensors("b_dec", width),
        }
        options = {"k": k, "sparsity": "batch_topk" if settings.get("batch_topk") is True else "topk"}
        if settings.get("activation") == "groupmax":
            options["sparsity"] = "groupmax"
        elif settings.get("sample_topk") is True and options["sparsity"] == "topk":
            options["sparsity"] = "sample_topk"
        if settings.get("input_unit_norm") is True:
            options["input_norm"] = "layer"
        if settings.get("transcode") is True:
            options |= {"activation": "input", "centred": False}
        if settings.get("skip_connection") is True:
            options["skip"], converted["skip_matrix"] = True, tensors("W_skip", width, width)
        return Description("SparseAutoencoder", options, signed(converted) if settings.get("signed") else converted)
