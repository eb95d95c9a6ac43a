"""SAELens from version 6 on, read and written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Description, Format, Settings, Tensors, gated, signed, unit_rows

if TYPE_CHECKING:
    import torch

    from ..models import SparseDictionary

_NORMS = {"none": None, "layer_norm": "layer", "constant_norm_rescale": "length"}
_NO_NORMS = {  # why other values of `normalize_activations` cannot be read
    "expected_average_only_in": "the factor that activations were multiplied by is in no file",
    "covariance_whitening": "the mean and the matrix that activations were whitened by are in no file",
}
_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_ARCHITECTURES = (
    "standard",
    "topk",
    "abstopk",
    "batchtopk",
    "matryoshka_batchtopk",
    "jumprelu",
    "gated",
    "matching_pursuit",
    "temporal",
    *_TRANSCODERS,
)


class SAELens(Format):
    """cfg.json with sae_weights.safetensors."""

    name, weights, config = "SAELens", "sae_weights", "cfg.json"

    def describe(self, settings: Settings, tensors: Tensors) -> Description:
        reason = "it is of a kind that is not known here"
        settings.expect("architecture", _ARCHITECTURES, reason)
        settings.expect("activation_fn", ["relu"], reason)
        settings.expect("activation_fn_str", ["relu"], reason)
        settings.expect("reshape_activations", ["none"], "tokens have no heads here")
        settings.expect("finetuning_scaling_factor", [False], reason)
        norm, name = str(settings.get("normalize_activations") or "none"), settings.get("architecture") or "standard"
        if name != "temporal" or norm != "constant_scalar_rescale":
            settings.expect("normalize_activations", _NORMS, _NO_NORMS.get(norm, "such a normalisation is not known"))
        options = {"centred": settings.get("apply_b_dec_to_input") is not False, "input_norm": _NORMS.get(norm)}
        if name == "matching_pursuit":
            return self._matching_pursuit(settings, tensors, options)
        if name == "temporal":
            return self._temporal(settings, tensors, options)
        width, count = settings.count("d_in"), settings.count("d_sae")
        encoder, decoder = tensors("W_enc", width, count).T, tensors("W_dec", count, width)
        if name == "gated":
            biases = (tensors(part, count) for part in ("b_gate", "b_mag", "r_mag"))
            return Description("SparseAutoencoder", options, gated(encoder, *biases, decoder, tensors("b_dec", width)))
        converted = {
            "encoder": encoder,
            "encoder_bias": tensors("b_enc", count),
            "decoder": decoder,
            "decoder_bias": tensors("b_dec", width),
        }
        if name in _TRANSCODERS:
            settings.expect("d_out", [width], f"a change is as wide here as what is read, {width}")
            options |= {"centred": False, "activation": "input", "undone": False}
            if "skip" in name:
                options["skip"], converted["skip_matrix"] = True, tensors("W_skip", width, width)
        if "jumprelu" in name or name in ("batchtopk", "matryoshka_batchtopk") and "threshold" in tensors:
            converted["threshold"] = tensors.threshold("threshold", count)
        if settings.get("rescale_acts_by_decoder_norm") is True:
            converted = unit_rows(converted)
        if "batchtopk" in name and "threshold" not in converted:  # of training; it is one of rescaled activations
            converted["threshold"] = tensors.threshold("topk_threshold", count)
        if name in ("topk", "abstopk"):
            options |= {"sparsity": "topk", "k": settings.count("k")}
        return Description("SparseAutoencoder", options, signed(converted) if name == "abstopk" else converted)

    def _matching_pursuit(self, settings: Settings, tensors: Tensors, options: dict) -> Description:
        """The rows of the decoder are those of the encoder, and the bias is added only if it was subtracted."""
        width, count = settings.count("d_in"), settings.count("d_sae")
        rows, bias = tensors("W_dec", count, width), tensors("b_dec", width)
        options |= {
            "k": settings.count("max_iterations") if settings.get("max_iterations") is not None else width,
            "residual_threshold": settings.get("residual_threshold", 0.01),
            "stop_on_duplicate": settings.get("stop_on_duplicate_support", True),
        }
        biases = {"encoder_bias": rows.new_zeros(count), "decoder_bias": bias if options["centred"] else 0 * bias}
        return Description("MatchingPursuitSAE", options, {"encoder": rows, "decoder": rows} | biases)

    def _temporal(self, settings: Settings, tensors: Tensors, options: dict) -> Description:
        """Factors are multiplied in: of the encoder's input, 1 / 4d, and that of `constant_scalar_rescale`."""
        width, count = settings.count("d_in"), settings.count("d_sae")
        layers, tied = settings.count("n_attn_layers"), settings.get("tied_weights", True) is True
        rescaled = settings.get("normalize_activations") == "constant_scalar_rescale"
        factor = settings.number("activation_normalization_factor") if rescaled else 1.0
        decoder, bias = tensors("W_dec", count, width).float(), tensors("b_dec", width).float() / factor
        encoder = decoder if tied else tensors("W_enc", width, count).T.float()
        converted = {
            "encoder": encoder * (factor / (4 * width)),
            "encoder_bias": decoder.new_zeros(count),
            "decoder": decoder / factor,
            "decoder_bias": 0 * bias if tied and not options["centred"] else bias,
        }
        keys = tensors.size("attn_layers.0.k_ctx.weight")[0]
        for layer in range(layers):
            parts = {"q_target": ("query", keys), "k_ctx": ("key", keys), "v_ctx": ("value", count)}
            for theirs, (ours, rows) in (parts | {"c_proj": ("out", count)}).items():
                name = f"attn_layers.{layer}.{theirs}"
                converted[f"attention.{layer}.{ours}.weight"] = tensors(f"{name}.weight", rows, count)
                converted[f"attention.{layer}.{ours}.bias"] = tensors(f"{name}.bias", rows)
        options |= {
            "heads": settings.count("n_heads"),
            "layers": layers,
            "key_channels": keys,
            "sparsity": "threshold",
        }
        if settings.get("sae_diff_type", "topk") == "topk" and settings.get("kval_topk") is not None:
            options |= {"sparsity": "topk", "k": settings.count("kval_topk")}
        return Description("TemporalSAE", options, converted)

    def export(self, sae: SparseDictionary, base_model: str | None) -> tuple[dict, dict[str, torch.Tensor]]:
        from ..models import SparseAutoencoder

        c = sae.config
        if type(sae) is not SparseAutoencoder:
            raise ValueError(f"SAELens has nothing like the {type(sae).__name__} of {c.site}.")
        is_transcoder, jumps = c.activation == "input", bool(sae.threshold.any())
        architecture = {"threshold": "jumprelu" if jumps else "standard", "topk": "topk"}.get(c.sparsity)
        if is_transcoder and architecture in ("jumprelu", "standard"):
            architecture = ("jumprelu_" if jumps else "") + ("skip_" if c.get("skip") else "") + "transcoder"
        is_undone = c.get("undone", True)
        if is_transcoder:
            fits = not c.centred and architecture != "topk" and not (c.input_norm and is_undone)
        else:
            fits = is_undone and not c.get("skip")
        if architecture is None or not fits:
            raise ValueError(f"SAELens has nothing like the settings of {c.site}: {c.sparsity}, {c.activation}.")
        names = {value: name for name, value in _NORMS.items()}
        config = {
            "architecture": architecture, "d_in": c.in_channels, "d_sae": c.num_latents, "dtype": "float32",
            "device": "cpu", "apply_b_dec_to_input": c.centred, "normalize_activations": names[c.input_norm],
            "reshape_activations": "none",
            "metadata": {"hook_name": c.site, "model_name": base_model, "sae_lens_version": "6.0.0"},  # of this layout
        }  # fmt: skip
        config |= {"k": c.k} if architecture == "topk" else {"d_out": c.in_channels} if is_transcoder else {}
        tensors = {"W_enc": sae.encoder.T, "b_enc": sae.encoder_bias, "W_dec": sae.decoder, "b_dec": sae.decoder_bias}
        tensors |= {"threshold": sae.threshold} if jumps and architecture != "topk" else {}
        tensors |= {"W_skip": sae.skip_matrix} if c.get("skip") else {}
        return config, {name: value.detach().cpu().float().contiguous() for name, value in tensors.items()}
