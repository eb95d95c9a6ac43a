"""Finding and fitting with less of everything, for tests; `patch` is pytest's `monkeypatch`."""

from diffusers_rtsae.analysis import find, fit, pursuit


def find_less(patch, passes: int = 2, states: int = 2) -> None:
    """Let `find_features` rank latents by fewer gradients, and measure them on fewer states."""
    patch.setattr(find, "_PASSES", passes)
    patch.setattr(find, "_STATES", states)


def fit_less(
    patch, pictures: int = 2, steps: int = 3, last: int = 4, choice: int = 2, ridges: tuple[float, ...] = (0.02,)
) -> None:
    """Let `fit_feature` draw fewer pictures, choose latents by fewer gradients, and make fewer steps."""
    for module, values in (
        (fit, {"_PICTURES": pictures, "_RIDGES": ridges}),
        (pursuit, {"_STEPS": steps, "_LAST": last, "_CHOICE": choice}),
    ):
        for name, value in values.items():
            patch.setattr(module, name, value)
