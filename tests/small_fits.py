"""Fits with less of everything, for tests."""

from diffusers_rtsae.analysis import fit, pursuit


def fit_less(
    patch, pictures: int = 2, steps: int = 3, last: int = 4, choice: int = 2, ridges: tuple[float, ...] = fit._RIDGES
) -> None:
    """Let `fit_feature` draw fewer pictures, choose latents by fewer gradients, and make fewer steps; `patch` is
    pytest's `monkeypatch`."""
    for module, values in (
        (fit, {"_PICTURES": pictures, "_RIDGES": ridges}),
        (pursuit, {"_STEPS": steps, "_LAST": last, "_CHOICE": choice}),
    ):
        for name, value in values.items():
            patch.setattr(module, name, value)
