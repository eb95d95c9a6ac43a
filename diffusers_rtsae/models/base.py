"""What a dictionary of any kind is: latents of one site with their statistics, how they are read at a step of
denoising, and where they move the activation there."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

ACTIVATIONS = ("output", "update", "input")  # what is read at a site; what is changed is its output


class TokenGrid(NamedTuple):
    """
    How the tokens of a row lie, frame by frame and in each row by row.

    height, width (`int`): of a frame.
    frames (`int`): in a row.
    beside (`int`): rows of one image that are its frames, where a model lays them beside one another.
    """

    height: int
    width: int
    frames: int = 1
    beside: int = 1


class Step(NamedTuple):
    """
    Where in a generation an activation is from.

    timestep (`float`): in training units, from 1000 at pure noise to 0 at the image.
    coordinate (`float`): the same among the dictionary's anchors: 0 at the first, G − 1 at the last.
    size (`TokenGrid` or `tuple[int, int]`, *optional*): the token grid, if there is one.
    guidance (`float`, *optional*): scale of classifier-free guidance, if that is known.
    """

    timestep: float
    coordinate: float
    size: tuple[int, ...] | None = None
    guidance: float | None = None


def places(size: TokenGrid | tuple[int, int]) -> torch.Tensor:
    """Row and column of the tokens of a grid, from 0 to 1, `(tokens, 2)`; the same in each frame."""
    height, width, frames, _ = TokenGrid(*size)
    return torch.cartesian_prod(*((torch.arange(n) + 0.5) / n for n in (height, width))).repeat(frames, 1)


def interpolate(values: torch.Tensor, coordinate: float, dim: int = 0) -> torch.Tensor:
    """`values` along the anchors `dim`, linearly interpolated at `coordinate`."""
    low = min(int(coordinate), values.shape[dim] - 1)
    high = min(low + 1, values.shape[dim] - 1)
    return torch.lerp(values.select(dim, low), values.select(dim, high), coordinate - low)


class Memory:
    """What a reader remembers of one running generation. Most kinds need nothing."""

    is_waiting = False  # for what the network continues with

    def continue_with(self, tokens: torch.Tensor) -> None:
        """The network goes on with these tokens `(B, N, d)`, after any edit."""

    def copy(self) -> Memory:
        """The same at this moment, which goes on by itself."""
        return copy.copy(self)


class Reader(ABC):
    """
    Reads some latents of a dictionary at the steps of a running generation.

    Args:
        computes (`int`, *optional*): how many latents it must compute, if that is more than those it reads.
    """

    computes: int | None = None

    def prepare(self) -> None:  # noqa: B027 - most kinds need nothing
        """Have ready on the device what steps of a usual generation need, so that none of them waits for it."""

    def begin(self) -> Memory:
        """The memory of a new generation."""
        return Memory()

    @abstractmethod
    def read(self, memory: Memory, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        """Latents `(B, N, rows)`, non-negative, of tokens `(B, N, d)`; then tell `memory` what the network continues
        with."""


class Directions:
    """
    Where latents move the activation, per unit of their own.

    Args:
        paths (`torch.Tensor`): `(latents, G, d)` at the anchors, linear between them; `(latents, 1, d)` if it is the
            same at all steps.
    """

    def __init__(self, paths: torch.Tensor):
        self.paths = paths

    def to(self, device: torch.device) -> Directions:
        return Directions(self.paths.to(device, torch.float32))

    def at(self, step: Step) -> torch.Tensor:
        """`(latents, d)` at a step."""
        return interpolate(self.paths, step.coordinate, dim=1)


class FeatureTimes(NamedTuple):
    """
    length (`torch.Tensor`): of each feature at each anchor, relative to the activation's scale, `(features, G)`.
    peak (`torch.Tensor`): the anchor at which it is longest, `(features,)`, counted from 0.
    onset (`torch.Tensor`): the first anchor at which it has half of that length.
    lifetime (`torch.Tensor`): at how many anchors it has half of it or more.
    """

    length: torch.Tensor
    peak: torch.Tensor
    onset: torch.Tensor
    lifetime: torch.Tensor

    @classmethod
    def of(cls, length: torch.Tensor) -> FeatureTimes:
        """The times of trajectories of these lengths, `(features, G)`."""
        strong = length >= length.amax(1, keepdim=True) / 2
        return cls(length, length.argmax(1), strong.int().argmax(1), strong.sum(1))


class SparseDictionary(ModelMixin, ConfigMixin, ABC):
    """
    A sparse dictionary of the activation at one site of a denoiser. All that steers, finds, fits, records, reports or
    evaluates asks no more of a kind than what is here; a kind is a subclass that `KINDS` names.

    The configuration of every kind has `site` (path of the module in the denoiser), `in_channels` (d, its width),
    `anchors` (G training timesteps, descending, of the trajectories it was trained on), `num_latents` (m), `k` (active
    latents) and `activation` (what is read at the site: its `"output"`, its `"update"`, output − input, or, of kinds
    that may be transcoders, whose latents stand for the output all the same, its `"input"`).

    Statistics of the latents over the training data are buffers: `typical_activation` and `max_activation`, the 99th
    percentile and the largest where a latent is active, and `mean_activation` and `density`, mean and share of active
    over everything; `(m,)` each. Every kind has an `encoder` and a `decoder` with a row for each latent.
    """

    matrices = ("encoder", "decoder")  # stored in half precision; all else stays float32
    activations = ("output", "update")  # what of a site it can be of
    reads_past = False  # whether a code depends on the activations at earlier steps
    shares_picture = False  # whether the code of a token depends on the other tokens of its picture
    summary = ""  # what the model card says of the kind

    def __init__(self, anchors: list[int], num_latents: int, activation: str):
        super().__init__()
        if not anchors or list(anchors) != sorted(set(anchors), reverse=True):
            raise ValueError(f"`anchors` must be strictly descending timesteps, got {anchors}.")
        if activation not in self.activations:
            kind = type(self).__name__
            raise ValueError(f"`activation` of {kind} must be one of {list(self.activations)}, got {activation!r}.")
        self.register_buffer("typical_activation", torch.ones(num_latents))
        self.register_buffer("max_activation", torch.ones(num_latents))
        self.register_buffer("mean_activation", torch.zeros(num_latents))
        self.register_buffer("density", torch.zeros(num_latents))

    @property
    @abstractmethod
    def spread(self) -> torch.Tensor:
        """Root mean square of the activation around its mean, per channel, at each anchor: `(G,)`."""

    @abstractmethod
    def reader(self, latents: list[int], device: torch.device) -> Reader:
        """What reads these latents while denoising; of the dictionary's matrices it keeps what it needs on `device`.

        Raises:
            `ValueError`: what it needs holds NaN or inf.
        """

    @abstractmethod
    def directions(self, latents: list[int] | torch.Tensor, injection: str = "trajectory") -> Directions:
        """Where these latents move the activation at a step: to where it would be were they active all along
        (`"trajectory"`), or by this step's innovation alone (`"residual"`), where a kind tells the two apart."""

    def gain(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The factor for each of these tokens `(..., d)`, `(..., 1)`, that undoes the normalisation of the input: a
        latent moves a token by its direction times this; `None` where tokens are not rescaled."""
        return None

    @abstractmethod
    def encode(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Latents `(batch, m)` at the last of the first g ≤ G anchors, of activations `(batch, g, d)` at these."""

    @abstractmethod
    def reconstruct(self, hidden_states: torch.Tensor, teacher_forced: bool = False) -> torch.Tensor:
        """
        Activations `(batch, g, d)` at the first g ≤ G anchors from their codes.

        Args:
            teacher_forced (`bool`): where a kind predicts an anchor from the one before, start at the true one.
        """

    def codes(self, hidden_states: torch.Tensor) -> Iterator[torch.Tensor]:
        """The codes `(batch, m)` that trajectories `(batch, G, d)` come to: one for each step, or one in all."""
        return (self.encode(hidden_states[:, : g + 1]) for g in range(hidden_states.shape[1]))

    def feature_trajectories(self, latents: list[int] | torch.Tensor | None = None) -> torch.Tensor:
        """
        The path of each feature through activation space, per unit of its activation.

        Args:
            latents (`list[int]`, *optional*): which features; all by default.

        Returns:
            `torch.Tensor`: `(features, G, d)`. Means and biases are no part of a direction.
        """
        anchors, latents = self.config.anchors, range(self.config.num_latents) if latents is None else latents
        directions = self.directions(latents if torch.is_tensor(latents) else list(latents))
        return torch.stack([directions.at(Step(t, g)) for g, t in enumerate(anchors)], 1)

    def feature_times(self, latents: list[int] | torch.Tensor | None = None) -> FeatureTimes:
        """
        When features act, from the length of their trajectories (2605.27813, section 4).

        Args:
            latents (`list[int]`, *optional*): which features; all by default.
        """
        return FeatureTimes.of((self.feature_trajectories(latents) / self.spread[:, None]).norm(dim=2).detach())

    def encoder_rows(self, latents: list[int]) -> torch.Tensor:
        """The encoder's rows of some latents as float32; raises `ValueError` if one holds NaN or inf."""
        rows = self.encoder[latents].detach().float()
        finite = rows.flatten(1).isfinite().all(1).tolist()
        if not all(finite):
            bad = sorted({latent for latent, good in zip(latents, finite, strict=True) if not good})
            raise ValueError(f"The dictionary of {self.config.site} holds NaN or inf in rows {bad}.")
        return rows

    def check_trajectories(self, hidden_states: torch.Tensor) -> None:
        """Raise `ValueError` unless these are (the beginning of) trajectories of this site, `(batch, g, d)`."""
        channels, anchors, shape = self.config.in_channels, len(self.config.anchors), tuple(hidden_states.shape)
        if len(shape) < 2 or shape[-1] != channels or not 1 <= shape[-2] <= anchors:
            raise ValueError(
                f"Expected trajectories (batch, 1 to {anchors} anchors, {channels} channels), got shape {shape}."
            )
