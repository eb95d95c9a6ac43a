"""SAELens from version 6 on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Description, Format, Settings, Tensors, gated

if TYPE_CHECKING:
    import torch

    from ..models import SparseDictionary

_NORMS = {"none": None, "layer_norm": "layer", "constant_norm_rescale": "length"}
_ARCHITECTURES = (
    "standard",
    "topk",
    "batchtopk",
    "matryoshka_batchtopk",
    "jumprelu",
    "gated",
    "transcoder",
    "jumprelu_transcoder",
)


class SAELens(Format):
    """cfg.json with sae_weights.safetensors."""

    name, weights, config = "SAELens", "sae_weights", "cfg.json"

    def describe(self, settings: Settings, tensors: Tensors) -> Description:
        kind = "it is of a kind that is not known here"
        settings.expect("architecture", _ARCHITECTURES, kind)
        settings.expect("activation_fn", ["relu"], kind)
        settings.expect("activation_fn_str", ["relu"], kind)
        settings.expect("normalize_activations", _NORMS, "the factor that it was trained with is in no file")
        settings.expect("reshape_activations", ["none"], "tokens have no heads here")
        settings.expect("finetuning_scaling_factor", [False], kind)
        width, count, name = (
            settings.count("d_in"),
            settings.count("d_sae"),
            settings.get("architecture") or "standard",
        )
        is_transcoder = name.endswith("transcoder")
        if is_transcoder:
            settings.expect("d_out", [width], f"a change is as wide here as what is read, {width}")
        encoder, decoder = tensors("W_enc", width, count).T, tensors("W_dec", count, width)
        options = {"centred": not is_transcoder and settings.get("apply_b_dec_to_input") is not False}
        options["input_norm"] = _NORMS[settings.get("normalize_activations") or "none"]
        if is_transcoder:
            options["activation"] = "input"
        if name == "gated":
            biases = (tensors(part, count) for part in ("b_gate", "b_mag", "r_mag"))
            return Description("SparseAutoencoder", options, gated(encoder, *biases, decoder, tensors("b_dec", width)))
        converted = {
            "encoder": encoder,
            "encoder_bias": tensors("b_enc", count),
            "decoder": decoder,
            "decoder_bias": tensors("b_dec", width),
        }
        if name == "topk":
            options |= {"sparsity": "topk", "k": settings.count("k")}
        elif name not in ("standard", "transcoder"):
            converted["threshold"] = tensors.threshold(
                "topk_threshold" if "topk_threshold" in tensors else "threshold", count
            )
        if settings.get("rescale_acts_by_decoder_norm") is True:
            converted = unit_rows(converted)
        return Description("SparseAutoencoder", options, converted)

    def export(self, sae: SparseDictionary, base_model: str | None) -> tuple[dict, dict[str, torch.Tensor]]:
        from ..models import SparseAutoencoder

        c, names = sae.config, {value: name for name, value in _NORMS.items()}
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
        return config, {name: value.detach().cpu().float().contiguous() for name, value in tensors.items()}


def unit_rows(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same autoencoder with decoder rows of length 1, and activations as large as what they add."""
    length = tensors["decoder"].float().norm(dim=1).clamp(min=1e-20)
    scaled = {"encoder": tensors["encoder"].float() * length[:, None], "decoder": tensors["decoder"] / length[:, None]}
    for name in ("encoder_bias", "threshold"):
        if name in tensors:
            scaled[name] = tensors[name].float() * length
    return tensors | scaled
