"""SDLens, of sdxl-unbox (2410.22366): exact TopK of a block's update."""

from __future__ import annotations

from .base import Description, Format, Settings, Tensors


class SDLens(Format):
    """config.json with state_dict, and where they lie beside it mean.pt and std.pt of each latent."""

    name, weights, config, more = "SDLens", "state_dict", "config.json", ("mean.pt", "std.pt")

    def is_of(self, site: str | None) -> bool:
        return site is None or not site.startswith("text_encoder")

    def describe(self, settings: Settings, tensors: Tensors) -> Description:
        count, width, k = (settings.count(name) for name in ("n_dirs_local", "d_model", "k"))
        converted = {
            "encoder": tensors("encoder.weight", count, width),
            "encoder_bias": tensors("latent_bias", count),
            "decoder": tensors("decoder.weight", width, count).T,
            "decoder_bias": tensors("pre_bias", width),
        }
        if "mean" in tensors and "std" in tensors:  # where a latent is active: its 99th percentile, were it normal
            typical = tensors("mean", count).float() + 2.326 * tensors("std", count).float()
            converted["typical_activation"] = typical.where(typical > 0, 1.0)
        return Description("SparseAutoencoder", {"k": k, "sparsity": "topk", "activation": "update"}, converted)
