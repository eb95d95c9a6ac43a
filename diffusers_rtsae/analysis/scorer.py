"""`FactorScorer`: a small image classifier that reads named factors from pictures, to measure steering."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn


class _Attention(nn.Module):
    """A transformer of four layers over cells of 8x8 pixels and one extra token for each factor. It returns the
    factors' tokens, `(batch, factors, channels)`."""

    def __init__(self, factors: int, sample_size: int, channels: int):
        super().__init__()
        widths = [3, channels // 4, channels // 2, channels]
        stem = [nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairwise(widths)]
        self.cells = nn.Sequential(stem[0], nn.GELU(), stem[1], nn.GELU(), stem[2])
        self.positions = nn.Parameter(0.02 * torch.randn((sample_size // 8) ** 2, channels))
        self.factors = nn.Parameter(0.02 * torch.randn(factors, channels))
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layer = partial(nn.TransformerEncoderLayer, channels, channels // 32, 2 * channels, **options)
        self.layers = nn.Sequential(*[layer() for _ in range(4)])
        self.norm = nn.LayerNorm(channels)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        cells = self.cells(images).flatten(2).transpose(1, 2) + self.positions
        tokens = torch.cat([self.factors.expand(len(images), -1, -1), cells], 1)
        return self.norm(self.layers(tokens)[:, : len(self.factors)])


class _Heads(nn.Module):
    """Logits of each factor, computed from the factor's token."""

    def __init__(self, sizes: list[int], channels: int):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(channels, size) for size in sizes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([head(token) for head, token in zip(self.heads, tokens.unbind(1), strict=True)], 1)


class FactorScorer(ModelMixin, ConfigMixin):
    """
    A small network with one softmax per factor.

    A factor may belong to a slot of the picture; its name is then `slot.factor`. If any factor of a slot reads `none`,
    the slot is empty, and all its factors are returned as `None`. The factor `valid` (values `no`, `yes`) says whether
    the picture is a scene of the kind that the scorer was trained on.

    Args:
        factors (`dict[str, list[str]]`): the values of each factor.
        sample_size (`int`, defaults to 64): height and width of the images; a multiple of 16.
        channels (`int`, defaults to 32): width of the first convolution, or of the transformer, where it must be a
            multiple of 32.
        architecture (`str`, defaults to `"convolution"`): or `"attention"`, a transformer; a second scorer that makes
            other mistakes.

    Raises:
        `ValueError`: `architecture` is neither.
    """

    @register_to_config
    def __init__(
        self,
        factors: dict[str, list[str]],
        sample_size: int = 64,
        channels: int = 32,
        architecture: Literal["convolution", "attention"] = "convolution",
    ):
        super().__init__()
        # sorted by name, as saved configs are, so that the order of the logits does not change on loading
        self.factors = {name: list(factors[name]) for name in sorted(factors)}
        if architecture == "attention":
            self.features = _Attention(len(factors), sample_size, channels)
            self.head = _Heads([len(values) for values in self.factors.values()], channels)
            return
        if architecture != "convolution":
            raise ValueError(f"`architecture` must be 'convolution' or 'attention', got {architecture!r}.")
        widths = [channels, channels * 2, channels * 4, channels * 4]
        layers: list[nn.Module] = []
        previous = 3
        for width in widths:
            layers += [nn.Conv2d(previous, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            previous = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(widths[-1] * (sample_size // 16) ** 2, 256),
            nn.SiLU(),
            nn.Linear(256, sum(map(len, factors.values()))),
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits `(batch, values)` of each factor for `images` `(batch, 3, height, width)` in [0, 1]."""
        logits = self.head(self.features(images.to(self.dtype) * 2 - 1))
        sizes = [len(values) for values in self.factors.values()]
        return dict(zip(self.factors, logits.split(sizes, dim=1), strict=True))

    @torch.no_grad()
    def read(self, images: torch.Tensor, batch_size: int = 256) -> list[dict[str, str | None]]:
        """For each image the most likely value of each factor; `None` for factors of empty slots."""
        readings = []
        for batch in images.split(batch_size):
            logits = self(batch.to(self.device))
            codes = torch.stack([factor.argmax(1) for factor in logits.values()], 1).tolist()
            for row in codes:
                pairs = zip(self.factors.items(), row, strict=True)
                reading: dict[str, str | None] = {name: values[code] for (name, values), code in pairs}
                empty = {name.rpartition(".")[0] for name, value in reading.items() if value == "none"}
                readings.append({n: None if n.rpartition(".")[0] in empty else v for n, v in reading.items()})
        return readings


def shows(reading: dict[str, str | None], factor: str, value: str) -> bool:
    """Whether the picture is valid and `factor` has this value in every filled slot, or in the whole picture."""
    values = [v for name, v in reading.items() if name.rpartition(".")[2] == factor and v is not None]
    return reading.get("valid", "yes") == "yes" and bool(values) and all(v == value for v in values)
