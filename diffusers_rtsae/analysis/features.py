"""`FeatureTable`, the latents that stand for a concept, and how they are ranked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ..dictionary import Dictionary
from .effect import FirstOrder

_DUPLICATE = 0.9  # least cosine of two trajectories that count as one feature


@dataclass
class Feature:
    """
    A row of a [`FeatureTable`]: one latent.

    Args:
        site (`str`), index (`int`): its site and index; `pipe.set_rtsae_features({(site, index): 1.0})` steers it.
        score (`float`): the table is sorted by it. By effect: the effect of strength 1 on the prediction (1: what
            changing the prompt does). By presence: `present * specific`.
        present (`float`): how much more present the latent is with the concept than without, at the step where the
            difference is largest, in units of its typical activation.
        specific (`float`): 1 if the latent is present only with the concept, 0 if it is as present without, or
            everywhere in the training data.
        timestep (`float`): of the step where the difference is largest.
        labels (`list[str]`): labels of the dictionary that contain it.
        duplicates (`list[int]`): latents with almost the same trajectory, which are left out of the table.
        verified (`dict`): the measurements of [`find_features`] with `verify`.
        slope (`float`, *optional*): the derivative of the effect at strength 0; `None` if ranked by presence.
        pictures (`list`): the negative prompts steered by it, if it was verified.
        makes (`str`, *optional*): the word it makes by its name in the dictionary, see [`analysis.names`].
    """

    site: str
    index: int
    score: float
    present: float
    specific: float
    timestep: float
    labels: list[str] = field(default_factory=list)
    duplicates: list[int] = field(default_factory=list)
    verified: dict[str, float] = field(default_factory=dict)
    slope: float | None = None
    pictures: list = field(default_factory=list, repr=False)
    makes: str | None = None

    def told(self) -> dict:
        """All fields but the pictures, as a dictionary that JSON can hold."""
        return {name: value for name, value in vars(self).items() if name != "pictures"}


class FeatureTable(list):
    """A list of [`Feature`] that prints as a table. If features were verified, `plain` holds the unsteered pictures;
    [`plots.plot_strip`] shows both."""

    plain: list = []

    def to_pandas(self):
        """A `pandas.DataFrame` with one row per feature; needs pandas."""
        import pandas

        return pandas.DataFrame([(row := f.told()) | row.pop("verified") for f in self])

    def __repr__(self) -> str:
        if not self:
            return "no features"
        measured = list(dict.fromkeys(key for f in self for key in f.verified))
        by_effect = [] if self[0].slope is None else ["slope"]
        makes = ["makes"] if any(f.makes for f in self) else []
        head = ["site", "index", "score", *by_effect, "present", "specific", "timestep", *measured, *makes, "labels"]
        rows = [
            [
                f.site, str(f.index), f"{f.score:.3f}", *(f"{f.slope:.3f}" for _ in by_effect),
                f"{f.present:.3f}", f"{f.specific:.2f}", f"{f.timestep:g}",
                *(f"{f.verified[key]:.3f}" if key in f.verified else "" for key in measured),
                *(f.makes or "" for _ in makes), ", ".join(f.labels),
            ]
            for f in self
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
        )


def labels_of(dictionary: Dictionary, site: str, index: int) -> list[str]:
    """The labels whose activation is read from this latent."""
    return [
        name
        for name, label in dictionary.labels.items()
        if any(e["site"] == site and index in e["latents"] for e in label.get("seen") or label["features"])
    ]


def rank(
    dictionary: Dictionary,
    site: str,
    timesteps: Sequence[float],
    present: torch.Tensor,
    absent: torch.Tensor,
    count: int,
    order: FirstOrder | None = None,
) -> FeatureTable:
    """
    Rank the latents of a site by how much more present they are with a concept than without, or by their effect.

    Args:
        timesteps (`Sequence[float]`): of the steps of `present` and `absent`.
        present, absent (`torch.Tensor`): mean presence at each step with and without the concept,
            `(steps, num_latents)`.
        count (`int`): the most latents to return.
        order (`FirstOrder`, *optional*): first-order effects; without it latents are ranked by presence.
    """
    sae = dictionary.sites[site]
    difference, when = (present - absent).max(0)
    steps = when[None]
    with_it, without = present.gather(0, steps)[0], absent.gather(0, steps)[0]
    usual = (sae.mean_activation / sae.typical_activation).cpu()  # a latent that is often active says little
    scale = sae.spread[:, None]
    specific = (with_it - torch.maximum(without, usual)) / (with_it + torch.maximum(without, usual)).clamp(min=1e-9)
    score = difference.clamp(min=0) * specific.clamp(min=0)
    table = FeatureTable()
    score = score if order is None else torch.where(sae.density.cpu() > 0, order.added / order.added_length, 0.0)
    for index in score.nan_to_num().argsort(descending=True).tolist():
        if len(table) == count or score[index] <= 0:
            break
        path = (sae.feature_trajectories([index]).detach() / scale).flatten()
        earlier = (sae.feature_trajectories([f.index for f in table]).detach() / scale).flatten(1)
        same = torch.cosine_similarity(earlier, path[None]) > _DUPLICATE
        if same.any():
            table[int(same.int().argmax())].duplicates.append(index)
            continue
        table.append(
            Feature(
                site, index, round(score[index].item(), 4), round(difference[index].item(), 4),
                round(specific[index].item(), 4), timesteps[when[index]], labels_of(dictionary, site, index),
                slope=None if order is None else round(order.added[index].item(), 4),
                makes=dictionary.name_of(site, index),
            )
        )  # fmt: skip
    return table
