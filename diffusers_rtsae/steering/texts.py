"""What is particular about sites in text encoders: which dictionaries and edits they take, the codes of a whole
prompt, and sites of several text encoders side by side."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch

from ..denoiser import get_site, get_text_encoders, joined_sites, split_site
from ..models import SparseAutoencoder, SparseDictionary
from .edits import Edit
from .run import check_channels


@dataclass(frozen=True, eq=False)
class PromptCodes:
    """
    The codes of a whole prompt at a site of a text encoder, which can be steered by like a feature; made by
    [`analysis.prompts.read_prompt`].

    Args:
        site (`str`): of the dictionary.
        prompt (`str`): what was read.
        tokens (`list[str]`): the tokens that the text encoder was given, with those that mark start and end, and those
            that fill up.
        codes (`torch.Tensor`): activations of all latents on each token, `(tokens, m)`.
        vectors (`torch.Tensor`): what they decode to, without biases: what is added to each token at strength 1,
            `(tokens, d)`.
    """

    site: str
    prompt: str
    tokens: list[str] = field(repr=False)
    codes: torch.Tensor = field(repr=False)
    vectors: torch.Tensor = field(repr=False)

    def top(self, count: int = 10) -> list[tuple[int, float, str]]:
        """The latents that are most active, each with its highest activation and the token where it has it."""
        highest, where = self.codes.max(0)
        order = highest.argsort(descending=True)[:count].tolist()
        return [(index, highest[index].item(), self.tokens[where[index]]) for index in order]


def is_in_text(site: str) -> bool:
    """Whether a site lies in a text encoder."""
    return bool(split_site(site)[0])


def check_text_site(pipeline, site: str, sae: SparseDictionary) -> list[int]:
    """
    The widths of what a site in the text encoders of a pipeline joins, one or several.

    Raises:
        `ValueError`: the pipeline has no such module, or the dictionary cannot be of it.
    """
    encoders, widths = get_text_encoders(pipeline), []
    if sae.knows_time:
        raise ValueError(
            f"{type(sae).__name__} depends on the time of denoising, and {site} runs once, before it: expected a kind "
            "without time, such as SparseAutoencoder."
        )
    for part in joined_sites(site):
        component = split_site(part)[0]
        if component not in encoders:
            raise ValueError(
                f"{type(pipeline).__name__} has no {component or 'text encoder'!r} that {part} could lie in; its text "
                f"encoders are {list(encoders)}."
            )
        get_site(encoders[component], part)
        config = encoders[component].config
        config = getattr(config, "text_config", None) or config
        widths.append(getattr(config, "hidden_size", None))
    if all(isinstance(width, int) for width in widths):
        check_channels(site, sae.config.in_channels, sum(widths))
    if len(widths) > 1 and (type(sae) is not SparseAutoencoder or sae.config.input_norm or None in widths):
        raise ValueError(
            f"{site} joins {len(widths)} text encoders: expected a SparseAutoencoder that does not normalise tokens, "
            "and text encoders that say their width."
        )
    return widths


def check_text_edit(site: str, edit: Edit) -> None:
    """Raise `ValueError` if an edit asks for what a site in a text encoder does not have."""
    if edit.start > 0 or edit.end < 1 or callable(edit.strength) or torch.is_tensor(edit.strength):
        raise ValueError(f"{site} runs once, before denoising: `start`, `end` and schedules have no meaning there.")
    if edit.mask is not None or edit.exchanges:
        raise ValueError(f"The tokens of {site} are those of a text: a `mask`, and 'erase', are for pictures.")
    if len(joined_sites(site)) > 1 and edit.read:
        raise ValueError(
            f"{site} joins text encoders that run one after the other, so that no latent can be read when the first "
            "one is edited: expected operation='add' with clip=False and without `where`."
        )


def halves(sae: SparseAutoencoder, edits: list[Edit], widths: list[int]) -> list[tuple[SparseAutoencoder, list[Edit]]]:
    """
    The dictionaries and edits of each site that a joined one is made of. What they add together is what the whole
    adds; none of them can read latents.

    Args:
        sae (`SparseAutoencoder`): of the joined site.
        edits (`list[Edit]`): that read no latents.
        widths (`list[int]`): of the sites, whose sum is that of `sae`.
    """
    parts, ends = [], [*accumulate(widths)]
    for site, width, stop in zip(joined_sites(sae.config.site), widths, ends, strict=True):
        columns = slice(stop - width, stop)
        options = {name: value for name, value in sae.config.items() if not name.startswith("_")}
        part = SparseAutoencoder(**options | {"site": site, "in_channels": width, "num_latents": 1, "k": 1})
        part.register_to_config(num_latents=sae.config.num_latents)
        part.decoder.data = sae.decoder.detach()[:, columns]
        for name in ("typical_activation", "mean_activation", "max_activation"):
            setattr(part, name, getattr(sae, name))
        own = [e if e.vectors is None else replace(e, vectors=e.vectors[:, columns]) for e in edits]
        parts.append((part, own))
    return parts
