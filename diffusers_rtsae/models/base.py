"""
The base class of every kind of dictionary, and what it exchanges with those that use it.

A dictionary belongs to one site, a module of the denoiser that is named by its path; other libraries call it a hook
point, hook name or layer. The dictionary says how the activations of its latents are read at a step of denoising, in
which direction each latent moves the site's activation there, and how strong each latent was on the training data.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

ACTIVATIONS = ("output", "update", "input")  # what can be read at a site; an edit always changes its output


class TokenGrid(NamedTuple):
    """
    The grid of the tokens in one row of a batch: frame after frame, each frame line by line.

    height, width (`int`): size of a frame, in tokens.
    frames (`int`): number of frames in a batch row.
    rows_per_video (`int`): number of batch rows of a video; more than 1 where its frames are separate rows.
    """

    height: int
    width: int
    frames: int = 1
    rows_per_video: int = 1


class Step(NamedTuple):
    """
    The step of denoising that an activation belongs to.

    timestep (`float`): in training units, from 1000 at pure noise to 0 at the image.
    coordinate (`float`): the timestep's position among the dictionary's anchors: 0 at the first, G − 1 at the last.
    size (`TokenGrid` or `tuple[int, int]`, *optional*): the token grid, if there is one.
    guidance (`float`, *optional*): scale of classifier-free guidance, if it is known.
    """

    timestep: float
    coordinate: float
    size: tuple[int, ...] | None = None
    guidance: float | None = None


def places(size: TokenGrid | tuple[int, int]) -> torch.Tensor:
    """Row and column of each token of a grid, from 0 to 1: `(tokens, 2)`. They repeat in every frame."""
    height, width, frames, _ = TokenGrid(*size)
    return torch.cartesian_prod(*((torch.arange(n) + 0.5) / n for n in (height, width))).repeat(frames, 1)


def interpolate(values: torch.Tensor, coordinate: float, dim: int = 0) -> torch.Tensor:
    """`values` interpolated linearly at `coordinate`; dimension `dim` holds one value per anchor."""
    low = min(int(coordinate), values.shape[dim] - 1)
    high = min(low + 1, values.shape[dim] - 1)
    return torch.lerp(values.select(dim, low), values.select(dim, high), coordinate - low)


class Memory:
    """What a reader remembers of one running generation. Most kinds remember nothing."""

    is_waiting = False  # whether `continue_with` must be called before the next step is read

    def continue_with(self, tokens: torch.Tensor) -> None:
        """Record the activation `(B, N, d)` that the network continues with, after any edit."""

    def copy(self) -> Memory:
        """An independent copy of the memory in its present state."""
        return copy.copy(self)


class Reader(ABC):
    """
    Computes the activations of some latents of a dictionary, step by step, while a generation runs.

    Args:
        computes (`int`, *optional*): number of latents it has to compute, if that is more than it was asked to read.
    """

    computes: int | None = None

    def prepare(self, coordinates: Sequence[float]) -> None:  # noqa: B027 - most kinds need nothing
        """Move to the device what steps at these coordinates need, see [`Step`], so that none waits for a transfer."""

    def begin(self) -> Memory:
        """The memory of a new generation."""
        return Memory()

    @abstractmethod
    def read(self, memory: Memory, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        """Activations of the latents `(B, N, rows)`, non-negative, on tokens `(B, N, d)`. If `memory.is_waiting` is
        set afterwards, call `memory.continue_with` before the next step."""


class Directions:
    """
    The directions in which latents move a site's activation, per unit of latent activation.

    Args:
        paths (`torch.Tensor`): one direction per latent and anchor, `(latents, G, d)`, interpolated linearly between
            the anchors; or one for all steps, `(latents, 1, d)`.
    """

    def __init__(self, paths: torch.Tensor):
        self.paths = paths

    def to(self, device: torch.device) -> Directions:
        return Directions(self.paths.to(device, torch.float32))

    def at(self, step: Step) -> torch.Tensor:
        """The directions at a step, `(latents, d)`."""
        return interpolate(self.paths, step.coordinate, dim=1)


class FeatureTimes(NamedTuple):
    """
    When features act, measured by the length of their directions.

    length (`torch.Tensor`): length of each feature's direction at each anchor, relative to the spread of the
        activation, `(features, G)`.
    peak (`torch.Tensor`): index of the anchor at which the direction is longest, `(features,)`.
    onset (`torch.Tensor`): index of the first anchor at which it has at least half of that length, `(features,)`.
    lifetime (`torch.Tensor`): number of anchors at which it has at least half of that length, `(features,)`.
    """

    length: torch.Tensor
    peak: torch.Tensor
    onset: torch.Tensor
    lifetime: torch.Tensor

    @classmethod
    def of(cls, length: torch.Tensor) -> FeatureTimes:
        """The times of features whose directions have these lengths, `(features, G)`."""
        strong = length >= length.amax(1, keepdim=True) / 2
        return cls(length, length.argmax(1), strong.int().argmax(1), strong.sum(1))


def is_of_steps(anchors: Sequence[int]) -> bool:
    """Whether these anchors are the steps 0, 1, … of another process than denoising; timesteps descend."""
    return len(anchors) > 1 and list(anchors) == list(range(len(anchors)))


class SparseDictionary(ModelMixin, ConfigMixin, ABC):
    """
    A sparse dictionary of the activation at one site of a denoiser.

    Each kind of dictionary is a subclass that `KINDS` names. Steering, finding, fitting, recording, reporting and
    evaluating use a kind through the members of this class alone.

    The configuration of every kind has `site` (path of the module in the denoiser), `in_channels` (d, the width of the
    site), `anchors` (the G training timesteps of the trajectories it was trained on, descending), `num_latents` (m),
    `k` (number of active latents) and `activation`, which is what is read at the site: its `"output"`, its `"update"`
    (output − input) or, for a transcoder, its `"input"`. The latents of a transcoder stand for the output, too.

    A dictionary may also be of another process than denoising, such as a recurrent network's states over the words of
    a text. Then `site` is a name of the states, and `anchors` are the steps 0, 1, …, G − 1, ascending. It encodes and
    decodes as any other; no pipeline loads it.

    Four buffers `(m,)` hold statistics of the latents on the training data: `typical_activation` and `max_activation`
    are the 99th percentile and the maximum over the tokens on which the latent is active; `mean_activation` and
    `density` are the mean over all tokens and the share of them on which it is active. Every kind has an `encoder` and
    a `decoder` with one row per latent.
    """

    matrices = ("encoder", "decoder")  # stored in half precision; all other tensors stay float32
    activations = ("output", "update")  # the values of `activation` that the kind supports
    reads_past = False  # whether a code depends on the activations at earlier steps
    knows_time = False  # whether a code depends on the time of denoising
    shares_picture = False  # whether the code of a token depends on the other tokens of its picture
    summary = ""  # the description of the kind in the model card

    def __init__(self, anchors: list[int], num_latents: int, activation: str):
        super().__init__()
        is_descending = anchors and list(anchors) == sorted(set(anchors), reverse=True)
        if not is_descending and not is_of_steps(anchors):
            raise ValueError(
                "`anchors` must be strictly descending timesteps, or the steps 0, 1, 2, … of another process than "
                f"denoising, got {anchors}."
            )
        if activation not in self.activations:
            kind = type(self).__name__
            raise ValueError(f"`activation` of {kind} must be one of {list(self.activations)}, got {activation!r}.")
        self.register_buffer("typical_activation", torch.ones(num_latents))
        self.register_buffer("max_activation", torch.ones(num_latents))
        self.register_buffer("mean_activation", torch.zeros(num_latents))
        self.register_buffer("density", torch.zeros(num_latents))

    @property
    def duration(self) -> int:
        """The length of the process, in the unit of `anchors`: 1000 for denoising, G for G steps of another one."""
        return len(self.config.anchors) if is_of_steps(self.config.anchors) else 1000

    @property
    @abstractmethod
    def spread(self) -> torch.Tensor:
        """Spread of the activation at each anchor, `(G,)`: its root mean square around the mean, per channel."""

    @abstractmethod
    def reader(self, latents: list[int], device: torch.device) -> Reader:
        """
        A reader of these latents for use while denoising. It keeps the rows that it needs on `device`.

        Raises:
            `ValueError`: a row that it needs holds NaN or inf.
        """

    @abstractmethod
    def directions(self, latents: list[int] | torch.Tensor, injection: str = "trajectory") -> Directions:
        """
        The directions in which these latents move the activation.

        Args:
            latents (`list[int]` or `torch.Tensor`): indices of the latents.
            injection (`str`): `"trajectory"`, the whole change that the activation would have at a step if the latent
                had been active from the first anchor on; or `"residual"`, the part of it that this step adds. Kinds
                that encode single steps make no difference between the two.
        """

    def gain(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """For kinds that normalise each token before encoding it: the factor `(..., 1)` that undoes the normalisation
        of these tokens `(..., d)`, by which the directions are multiplied. `None` for all other kinds."""
        return None

    @abstractmethod
    def encode(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Latents `(batch, m)` at the last of the first g ≤ G anchors, from the activations `(batch, g, d)` there."""

    @abstractmethod
    def reconstruct(self, hidden_states: torch.Tensor, teacher_forced: bool = False) -> torch.Tensor:
        """
        Reconstruct the activations `(batch, g, d)` at the first g ≤ G anchors from their codes.

        Args:
            teacher_forced (`bool`): for kinds that predict each anchor from the one before, predict from the true
                activation there instead of from its reconstruction.
        """

    def codes(self, hidden_states: torch.Tensor) -> Iterator[torch.Tensor]:
        """The codes `(batch, m)` of trajectories `(batch, G, d)`: one per step, or a single one for the trajectory."""
        return (self.encode(hidden_states[:, : g + 1]) for g in range(hidden_states.shape[1]))

    def feature_trajectories(self, latents: list[int] | torch.Tensor | None = None) -> torch.Tensor:
        """
        The path of each feature through activation space, per unit of its activation.

        Args:
            latents (`list[int]`, *optional*): which features; all by default.

        Returns:
            `torch.Tensor`: directions without means and biases, `(features, G, d)`.
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
        """The encoder rows of these latents in float32; raises `ValueError` if one of them holds NaN or inf."""
        rows = self.encoder[latents].detach().float()
        finite = rows.flatten(1).isfinite().all(1).tolist()
        if not all(finite):
            bad = sorted({latent for latent, good in zip(latents, finite, strict=True) if not good})
            raise ValueError(f"The dictionary of {self.config.site} holds NaN or inf in rows {bad}.")
        return rows

    def check_trajectories(self, hidden_states: torch.Tensor) -> None:
        """Raise `ValueError` unless the shape is `(batch, g, d)`, with the width d of the site and 1 ≤ g ≤ G."""
        channels, anchors, shape = self.config.in_channels, len(self.config.anchors), tuple(hidden_states.shape)
        if len(shape) < 2 or shape[-1] != channels or not 1 <= shape[-2] <= anchors:
            raise ValueError(
                f"Expected trajectories (batch, 1 to {anchors} anchors, {channels} channels), got shape {shape}."
            )
