"""DifFRACT (2606.15796): a ReLU autoencoder or transcoder of an MLP, modulated by the timestep."""

from __future__ import annotations

from .base import Description, Format, Settings, Tensors

FLUX_WIDTH = 3072


class DifFRACT(Format):
    """A bare state dict, whose name says the site."""

    name, weights = "DifFRACT", r"(sae|transcoder)_(img|txt)_\d{1,4}"

    def site(self, stem: str) -> str:
        _, stream, layer = stem.split("_")
        return f"transformer_blocks.{layer}.ff" + ("_context" if stream == "txt" else "")

    def describe(self, settings: Settings, tensors: Tensors) -> Description:
        (count, width), channels = tensors.size("encoder.weight"), tensors.size("time_mlp.0.weight")[0]
        converted = {
            "encoder": tensors("encoder.weight", count, width),
            "encoder_bias": tensors("encoder.bias", count),
            "decoder": tensors("decoder.weight", width, count).T,
            "decoder_bias": tensors("decoder.bias", width),
            "modulation.weight": tensors("mod_linear.weight", 2 * width, channels),
            "modulation.bias": tensors("mod_linear.bias", 2 * width),
        }
        for layer in (0, 2):
            converted[f"time_mlp.{layer}.weight"] = tensors(f"time_mlp.{layer}.weight", channels, channels)
            converted[f"time_mlp.{layer}.bias"] = tensors(f"time_mlp.{layer}.bias", channels)
        options = {
            "time_channels": channels,
            "time_scale": 0.001 if width == FLUX_WIDTH else 1.0,  # Flux is called with timesteps from 0 to 1
            "flip_sin_to_cos": False,
            "downscale_freq_shift": 1.0,
            "centred": False,
            "undone": False,
            "activation": "input" if tensors.path.stem.startswith("transcoder") else "output",
        }
        return Description("TIDE", options, converted)
