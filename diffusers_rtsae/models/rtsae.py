"""The residualized temporal sparse autoencoder (rtSAE, 2605.27813)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from .base import Directions, Memory, Reader, SparseDictionary, Step, interpolate
from .dynamics import LinearDynamics
from .sparsity import batch_topk, jump_relu


class RTSAEOutput(NamedTuple):
    """
    latents (`torch.Tensor`): sparse codes `(batch, num_latents)`.
    residuals (`torch.Tensor`): normalised residuals of the input, `(batch, G, d)`.
    reconstruction (`torch.Tensor`): reconstruction of these residuals, `(batch, G, d)`.
    """

    latents: torch.Tensor
    residuals: torch.Tensor
    reconstruction: torch.Tensor


class RTSAE(SparseDictionary):
    r"""
    A sparse dictionary of denoising trajectories at one site of a denoiser.

    The input is a token's activation at G anchor timesteps. A linear predictor explains the activation at each anchor
    from the one before. The autoencoder explains the G residuals of these predictions with one sparse code per
    trajectory. While denoising only the residuals up to the present step are known, so codes are also defined for the
    beginning of a trajectory, a prefix.

    Args:
        site (`str`): path of the module in the denoiser whose activation this is, e.g. `"up_blocks.1.attentions.1"`.
        in_channels (`int`): d, the width of the site.
        anchors (`list[int]`): G training timesteps, descending.
        num_latents (`int`): m, the size of the dictionary.
        k (`int`): latents active per trajectory while training, on average.
        activation (`str`, defaults to `"output"`): what is read at the site, its `"output"` or its `"update"`
            (output − input).

    Example:
        ```py
        >>> rtsae = RTSAE.from_pretrained("examples/shapes-rtsae", subfolder="up_blocks.1.attentions.1")
        >>> latents = rtsae.encode(trajectories)  # (tokens, G, d) -> (tokens, m)
        >>> directions = rtsae.feature_trajectories([3, 14])  # (2, G, d), activation space
        ```
    """

    matrices = ("encoder", "decoder", "dynamics.transition")
    reads_past = True
    knows_time = True
    summary = (
        "A residualized temporal sparse autoencoder ([arXiv 2605.27813](https://arxiv.org/abs/2605.27813)). A linear "
        "predictor says what a block's activation at one denoising step would be after the one before; the "
        "autoencoder explains what that missed with few features, each with a path through denoising time. `k` "
        "latents are active for a token's whole trajectory on average while training."
    )

    @register_to_config
    def __init__(
        self, site: str, in_channels: int, anchors: list[int], num_latents: int, k: int, activation: str = "output"
    ):
        super().__init__(anchors, num_latents, activation)
        shape = (num_latents, len(anchors), in_channels)
        self.dynamics = LinearDynamics(len(anchors), in_channels)
        decoder = F.normalize(torch.randn(num_latents, len(anchors) * in_channels), dim=1).view(shape)
        self.encoder = nn.Parameter(decoder.clone())
        self.encoder_bias = nn.Parameter(torch.zeros(num_latents))
        self.decoder = nn.Parameter(decoder)
        self.decoder_bias = nn.Parameter(torch.zeros(len(anchors), in_channels))
        self.register_buffer("threshold", torch.zeros(len(anchors)))  # for prefixes that end at each anchor

    @property
    def spread(self) -> torch.Tensor:
        return self.dynamics.scale

    def reader(self, latents: list[int], device: torch.device) -> PrefixReader:
        return PrefixReader(self, latents, device)

    def directions(self, latents: list[int] | torch.Tensor, injection: str = "trajectory") -> Directions:
        paths = self.feature_trajectories if injection == "trajectory" else self.residual_directions
        return Directions(paths(latents).detach())

    def pre_activations(self, residuals: torch.Tensor) -> torch.Tensor:
        """Pre-activations `(batch, m)` from the normalised residuals `(batch, g, d)` at the first g ≤ G anchors."""
        g = residuals.shape[-2]
        centred = (residuals - self.decoder_bias[:g]).flatten(-2)
        return F.linear(centred, self.encoder[:, :g].flatten(1).float(), self.encoder_bias)

    def encode(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Sparse codes of trajectories or of prefixes of them.

        Args:
            hidden_states (`torch.Tensor`): activations `(batch, g, d)` at the first g ≤ G anchors.

        Returns:
            `torch.Tensor`: latents `(batch, m)`, non-negative.
        """
        self.check_trajectories(hidden_states)
        pre_activations = self.pre_activations(self.dynamics.residuals(hidden_states.float()))
        return jump_relu(pre_activations, self.threshold[hidden_states.shape[-2] - 1])

    def codes(self, hidden_states: torch.Tensor) -> Iterator[torch.Tensor]:
        return iter([self.encode(hidden_states)])

    def decode_residuals(self, latents: torch.Tensor) -> torch.Tensor:
        """Reconstruct normalised residuals `(batch, G, d)` from latents `(batch, m)`."""
        return (latents @ self.decoder.flatten(1).float()).unflatten(-1, self.decoder_bias.shape) + self.decoder_bias

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Reconstruct activations `(batch, G, d)` from latents `(batch, m)`; each anchor is predicted from the
        reconstruction of the one before."""
        return self.dynamics.rollout(self.decode_residuals(latents))

    def reconstruct(self, hidden_states: torch.Tensor, teacher_forced: bool = False) -> torch.Tensor:
        residuals = self.decode_residuals(self.encode(hidden_states))
        if teacher_forced:
            return self.dynamics.teacher_forced(residuals[..., : hidden_states.shape[-2], :], hidden_states)
        return self.dynamics.rollout(residuals)[..., : hidden_states.shape[-2], :]

    def forward(
        self, hidden_states: torch.Tensor, train_k: int | None = None, prefix: int | None = None
    ) -> RTSAEOutput:
        """
        Args:
            hidden_states (`torch.Tensor`): whole trajectories `(batch, G, d)`.
            train_k (`int`, *optional*): use BatchTopK with this k instead of the learned threshold.
            prefix (`int`, *optional*): encode the first `prefix` anchors only.
        """
        residuals = self.dynamics.residuals(hidden_states)
        known = residuals[..., :prefix, :]
        pre_activations = self.pre_activations(known)
        if train_k is not None:
            latents = batch_topk(pre_activations, train_k)
        else:
            latents = jump_relu(pre_activations, self.threshold[known.shape[-2] - 1])
        return RTSAEOutput(latents, residuals, self.decode_residuals(latents))

    def feature_trajectories(self, latents: list[int] | torch.Tensor | None = None) -> torch.Tensor:
        """
        The path of each feature through activation space, per unit of its activation (2605.27813, section 3.3).

        Args:
            latents (`list[int]`, *optional*): which features; all by default.

        Returns:
            `torch.Tensor`: directions without means and biases, `(features, G, d)`.
        """
        decoder = self.decoder if latents is None else self.decoder[latents]
        return self.dynamics.rollout(decoder.float(), bias=False)

    def residual_directions(self, latents: list[int] | torch.Tensor | None = None) -> torch.Tensor:
        """What each anchor alone adds to a feature's direction in activation space, `(features, G, d)`: the residuals,
        before the linear predictor carries them on."""
        decoder = self.decoder if latents is None else self.decoder[latents]
        return decoder.float() * (self.dynamics.residual_scale * self.dynamics.scale)[:, None]


def _passes(past: float | None, pending: float, now: float) -> bool:
    """Whether the pending step stands for the anchor that follows the past one, when time moves on to `now`: no later
    step is closer to it. All are coordinates."""
    following = 0 if past is None else int(past + _REACHED) + 1
    return pending >= following - _REACHED and abs(pending - following) <= abs(now - following)


_REACHED = 0.1  # in units of anchors: a step at most this far before an anchor may be used for it


@dataclass
class Trajectory(Memory):
    """What a [`PrefixReader`] remembers of one running generation. It keeps the activations at the anchors passed so
    far, so that a reader of other latents can continue from there."""

    reader: PrefixReader | None = None  # the reader of the latents in `committed` and `pending`
    committed: torch.Tensor | None = None  # pre-activations from the anchors passed so far
    past: tuple[float, torch.Tensor] | None = None  # coordinate and activation of the last anchor passed
    pending: tuple[float, float, torch.Tensor] | None = None  # the present step: timestep, coordinate, pre-activations
    continued: torch.Tensor | None = None  # the activation that the network continued with, after any edit
    anchors: list[tuple[float, torch.Tensor]] = field(default_factory=list)  # `past` for all anchors passed
    is_waiting: bool = False

    def continue_with(self, tokens: torch.Tensor) -> None:
        self.continued = tokens.detach().clone()  # later layers may write into the activation
        self.is_waiting = False

    def copy(self) -> Trajectory:
        return replace(self, anchors=[*self.anchors])


class PrefixReader(Reader):
    """
    Reads latents of an RTSAE from the steps of a generation so far.

    The pre-activation of a latent is the sum of the contributions of the anchors passed so far and of the change
    since the last of them. The linear predictor is folded into the encoder rows, so a step costs O(tokens · d · rows);
    the d × d predictor is not applied to the tokens. A second call at the same timestep replaces the first. Where
    steps skip anchors, the predictors of the skipped intervals are multiplied. Predictions start from the activation
    that the network continued with, after any edit.

    Args:
        rtsae (`RTSAE`): the dictionary; only these rows of its matrices are read.
        rows (`list[int]`): indices of the latents to read.
        device (`torch.device`): device of the activations.
    """

    def __init__(self, rtsae: RTSAE, rows: list[int], device: torch.device):
        self.rtsae, self.rows, self.device = rtsae, list(rows), device
        self.encoder = rtsae.encoder_rows(rows)  # on the dictionary's device: only its products are moved
        self.mean, self.scale = rtsae.dynamics.mean.float().to(device), rtsae.dynamics.scale.float().to(device)
        self.offset = (self.encoder * rtsae.decoder_bias.detach()).sum(-1).to(device)  # (rows, G)
        self.bias = rtsae.encoder_bias[rows].detach().float().to(device)
        self.threshold = rtsae.threshold.tolist()
        self._products: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}

    def prepare(self, coordinates: Sequence[float]) -> None:
        past = pending = None  # coordinates, as `read` goes on with them
        for coordinate in coordinates:
            if pending is not None and not (past is None and coordinate == 0):
                past = pending if _passes(past, pending, coordinate) else past
            if past is None or past + _REACHED < len(self.threshold) - 1:
                self._fold(past, coordinate)
            pending = coordinate

    def _product(self, block: int, intervals: tuple[int, ...]) -> torch.Tensor:
        """Encoder rows of an anchor times the predictors of these intervals. The results are cached."""
        if (block, intervals) not in self._products:
            product = self.encoder[:, block] / self.rtsae.dynamics.residual_scale[block]
            for interval in intervals:
                product = product @ self.rtsae.dynamics.transition[interval].float()
            self._products[block, intervals] = product.to(self.device)
        return self._products[block, intervals]

    def _carry(self, block: int, start: float, end: float) -> torch.Tensor:
        """`rows @ Φ(start → end)`, with Φ the linear dynamics between two coordinates. For a part of the interval
        between two anchors, Φ is interpolated linearly."""
        terms: dict[tuple[int, ...], float] = {(): 1.0}
        for g in range(len(self.threshold) - 2, -1, -1):
            part = min(end, g + 1) - max(start, g)
            if part > 0:
                stayed = {intervals: c * (1 - part) for intervals, c in terms.items() if part < 1}
                terms = stayed | {(*intervals, g): c * part for intervals, c in terms.items()}
        return sum(c * self._product(block, intervals) for intervals, c in terms.items())

    @torch.inference_mode(False)  # cached products may be used with autograd later
    @torch.no_grad()
    def _fold(self, then: float | None, coordinate: float) -> tuple:
        """
        What is needed to read a step at `coordinate`, when the last anchor was passed at coordinate `then`.

        Returns:
            the rows to multiply the present activation with, those for the past one (`None` if there is none), the
            constant to add, and the threshold.
        """
        last = len(self.threshold) - 1
        mean, scale = interpolate(self.mean, coordinate), interpolate(self.scale, coordinate)
        if then is None:  # nothing predicts the first activation, so it is its own residual
            now = self._product(0, ()) / scale
            return now, None, -(now @ mean) - self.offset[:, 0], self.threshold[0]
        passed = int(then + _REACHED)
        block = min(max(passed + 1, -int(-(coordinate - _REACHED) // 1)), last)
        progress = min(max((coordinate - then) / (block - then), 0.0), 1.0)
        now = self._product(block, ()) / scale
        carried = self._carry(block, then, coordinate) / interpolate(self.scale, then)
        constant = carried @ interpolate(self.mean, then) - now @ mean - progress * self.offset[:, block]
        threshold = self.threshold[passed] + progress * (self.threshold[block] - self.threshold[passed])
        return now, carried, constant, threshold

    def _commit(self, memory: Trajectory, now: float) -> None:
        """When time moves on to coordinate `now`: if no later step is closer to the next anchor than the pending one,
        that step stands for the anchor, and later steps are predicted from it."""
        _, coordinate, pre_activations = memory.pending
        if _passes(memory.past and memory.past[0], coordinate, now):
            memory.past, memory.committed = (coordinate, memory.continued), pre_activations
            memory.anchors.append(memory.past)

    def begin(self) -> Trajectory:
        return Trajectory(self)

    def _take_over(self, memory: Trajectory) -> None:
        """Continue with the memory of another reader: compute the pre-activations of this reader's latents from the
        activations kept there."""
        previous, memory.reader = memory.reader.rows, self
        if previous == self.rows:
            return
        memory.past = memory.committed = None
        for coordinate, tokens in memory.anchors:
            memory.committed = self._pre_activations(memory, tokens, coordinate)[0].detach()
            memory.past = (coordinate, tokens)
        if memory.pending is not None:
            timestep, coordinate, _ = memory.pending
            pre_activations, _ = self._pre_activations(memory, memory.continued, coordinate)
            memory.pending = timestep, coordinate, pre_activations.detach()

    def _pre_activations(self, memory: Trajectory, tokens: torch.Tensor, coordinate: float) -> tuple:
        """The pre-activations at this step `(B, N, rows)`, and the threshold above which latents are active."""
        last = len(self.threshold) - 1
        committed = self.bias if memory.committed is None else memory.committed
        if memory.past is not None and memory.past[0] + _REACHED >= last:
            return committed, self.threshold[last]
        now, carried, constant, threshold = self._fold(memory.past and memory.past[0], coordinate)
        pre_activations = committed + constant + tokens.float() @ now.T
        if carried is not None:
            pre_activations = pre_activations - memory.past[1].float() @ carried.T
        return pre_activations, threshold

    def read(self, memory: Trajectory, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        timestep, coordinate = step[:2]
        if memory.reader is not self:
            self._take_over(memory)
        still_first = (
            memory.past is None and coordinate == 0
        )  # each step before the first anchor replaces the one before
        if memory.pending is not None and memory.pending[0] != timestep and not still_first:
            self._commit(memory, coordinate)
        pre_activations, threshold = self._pre_activations(memory, tokens, coordinate)
        memory.pending, memory.is_waiting = (timestep, coordinate, pre_activations.detach()), True
        return jump_relu(pre_activations, threshold)
