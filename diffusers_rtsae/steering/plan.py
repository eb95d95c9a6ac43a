"""Edits of one site folded to tensors: a lazy encoder for the latents that must be read, and what to add to the
activation."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..models import RTSAE, jump_relu
from .clock import TimeGrid
from .edits import Edit

_loading = threading.Lock()
_REACHED = 0.1  # a step this close before an anchor, in units of anchors, stands for it if none is closer


def _at(values: torch.Tensor, coordinate: float, dim: int = 0) -> torch.Tensor:
    """`values` along the anchors `dim`, linearly interpolated at `coordinate`."""
    low = min(int(coordinate), values.shape[dim] - 1)
    high = min(low + 1, values.shape[dim] - 1)
    return torch.lerp(values.select(dim, low), values.select(dim, high), coordinate - low)


@dataclass
class Trajectory:
    """What an encoder remembers of one running generation."""

    committed: torch.Tensor | None = None  # pre-activations from the anchors passed so far
    past: tuple[float, torch.Tensor] | None = None  # coordinate and activation of the last anchor passed
    pending: tuple[float, float, torch.Tensor] | None = None  # timestep, coordinate, pre-activations
    continued: torch.Tensor | None = None  # the activation the network really continued with, after any edit
    grid: TimeGrid | None = None  # of this generation's noise schedule, if that is not the encoder's

    def continue_with(self, tokens: torch.Tensor) -> None:
        self.continued = tokens.detach().clone()  # later layers may write into the activation


class PrefixEncoder:
    """
    Encodes chosen latents while denoising, from what is known so far.

    The linear predictor is folded into the encoder rows, so a step costs O(tokens · d · rows) and no full-width
    product. The code of a step is the sum over the anchors passed so far, plus the innovation since the last of them;
    a repeated call at one timestep overwrites, and skipped anchors compose. The past is the activation the network
    continued with.

    Args:
        rtsae (`RTSAE`): the dictionary; only the named rows of its matrices are read.
        rows (`list[int]`): the latents to encode.
        grid (`TimeGrid`): where timesteps lie among the anchors.
        device (`torch.device`): where activations are.
    """

    def __init__(self, rtsae: RTSAE, rows: list[int], grid: TimeGrid, device: torch.device):
        self.rtsae, self.grid, self.device = rtsae, grid, device
        self.encoder = rtsae.encoder[rows].detach().float()
        self.offset = (self.encoder * rtsae.decoder_bias.detach()).sum(-1)  # (rows, G)
        self.bias = rtsae.encoder_bias[rows].detach().float().to(device)
        self.threshold = rtsae.threshold.tolist()
        self._products: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}

    def _product(self, block: int, intervals: tuple[int, ...]) -> torch.Tensor:
        """Encoder rows of an anchor, carried back over whole intervals between anchors; kept, as they are few."""
        if (block, intervals) not in self._products:
            if intervals:
                transition = self.rtsae.dynamics.transition[intervals[-1]].to(self.encoder)
                product = self._product(block, intervals[:-1]) @ transition
            else:
                product = self.encoder[:, block] / self.rtsae.dynamics.residual_scale[block]
            self._products[block, intervals] = product
        return self._products[block, intervals]

    def _carry(self, block: int, start: float, end: float) -> torch.Tensor:
        """`rows @ Φ(start → end)`: the linear dynamics between two coordinates, part of an interval to first order."""
        terms: dict[tuple[int, ...], float] = {(): 1.0}
        for g in range(len(self.threshold) - 2, -1, -1):
            part = min(end, g + 1) - max(start, g)
            if part > 0:
                stayed = {intervals: c * (1 - part) for intervals, c in terms.items() if part < 1}
                terms = stayed | {(*intervals, g): c * part for intervals, c in terms.items()}
        return sum(c * self._product(block, intervals) for intervals, c in terms.items())

    @torch.inference_mode(False)  # products are kept and may meet autograd later
    @torch.no_grad()
    def _fold(self, then: float | None, coordinate: float) -> tuple:
        """
        What a step at `coordinate` needs if the last anchor was passed at `then`: rows for the present activation,
        rows for the past one (`None` if there is none), a constant, and the threshold.
        """
        dynamics, last = self.rtsae.dynamics, len(self.threshold) - 1
        mean, scale = _at(dynamics.mean, coordinate), _at(dynamics.scale, coordinate)
        if then is None:  # the first activation is its own innovation
            now = self._product(0, ()) / scale
            return now.to(self.device), None, (-(now @ mean) - self.offset[:, 0]).to(self.device), self.threshold[0]
        passed = int(then + _REACHED)
        block = min(max(passed + 1, -int(-(coordinate - _REACHED) // 1)), last)
        progress = min(max((coordinate - then) / (block - then), 0.0), 1.0)
        now, carried = (
            self._product(block, ()) / scale,
            self._carry(block, then, coordinate) / _at(dynamics.scale, then),
        )
        constant = carried @ _at(dynamics.mean, then) - now @ mean - progress * self.offset[:, block]
        threshold = self.threshold[passed] + progress * (self.threshold[block] - self.threshold[passed])
        return now.to(self.device), carried.to(self.device), constant.to(self.device), threshold

    def _commit(self, state: Trajectory, now: float) -> None:
        """Once time moves on to `now`, the step closest to the next anchor becomes the past that later steps are
        predicted from."""
        _, coordinate, pre_activations = state.pending
        following = 0 if state.past is None else int(state.past[0] + _REACHED) + 1
        if coordinate >= following - _REACHED and abs(coordinate - following) <= abs(now - following):
            state.past, state.committed = (coordinate, state.continued), pre_activations

    def observe(self, state: Trajectory, tokens: torch.Tensor, timestep: float) -> torch.Tensor:
        """Latents `(B, N, rows)` of tokens `(B, N, d)` at this step; tell `state` what the network continues with."""
        coordinate, last = (state.grid or self.grid).coordinate(timestep), len(self.threshold) - 1
        still_first = state.past is None and coordinate == 0  # steps before the first anchor stand for it in turn
        if state.pending is not None and state.pending[0] != timestep and not still_first:
            self._commit(state, coordinate)
        committed = self.bias if state.committed is None else state.committed
        if state.past is not None and state.past[0] + _REACHED >= last:
            pre_activations, threshold = committed, self.threshold[last]
        else:
            now, carried, constant, threshold = self._fold(state.past and state.past[0], coordinate)
            pre_activations = committed + constant + tokens.float() @ now.T
            if carried is not None:
                pre_activations = pre_activations - state.past[1].float() @ carried.T
        state.pending = (timestep, coordinate, pre_activations.detach())
        return jump_relu(pre_activations, threshold)


@dataclass
class PlanState:
    """What a plan remembers of one running generation."""

    conditional: Trajectory = field(default_factory=Trajectory)
    others: dict[int, Trajectory] = field(default_factory=dict)  # of unconditional streams, if an edit reads them
    timestep: float | None = None  # of the conditional call whose change is kept for calls that follow it
    on_conditional: torch.Tensor | None = None
    contrast: torch.Tensor | None = None
    report: list[dict] = field(default_factory=list)


class SitePlan:
    """
    All edits of one dictionary at one site, ready to be applied. What belongs to a run is in a [`PlanState`].

    Args:
        rtsae (`RTSAE`): the dictionary; only rows that are edited or read are taken from it.
        edits (`list[Edit]`): what to change; idle edits are left out.
        alphas_cumprod (`torch.Tensor`, *optional*): of the noise schedule, where no pipeline says it; see `begin`.
    """

    def __init__(self, rtsae: RTSAE, edits: list[Edit], alphas_cumprod: torch.Tensor | None):
        self.rtsae, self.edits = rtsae, [edit for edit in edits if not edit.is_idle]
        self.grid = TimeGrid(rtsae.config.anchors, alphas_cumprod)
        self.rows = sorted({row for edit in self.edits for row in edit.read})
        self.column = {row: i for i, row in enumerate(self.rows)}
        self.device: torch.device | None = None

    @torch.inference_mode(False)  # what is kept may meet autograd later
    @torch.no_grad()
    def _load(self, device: torch.device) -> None:
        self.encoder = PrefixEncoder(self.rtsae, self.rows, self.grid, device) if self.rows else None
        self.directions, self.statistics = [], []
        for edit in self.edits:
            trajectory = edit.injection == "trajectory"
            injected = self.rtsae.feature_trajectories if trajectory else self.rtsae.residual_directions
            directions = injected(edit.moved).detach()
            if not directions.isfinite().all():
                raise ValueError(f"The dictionary of {self.rtsae.config.site} holds NaN or inf in rows {edit.moved}.")
            self.directions.append(directions.to(device, torch.float32))
            statistics = ("typical_activation", "mean_activation", "max_activation")
            self.statistics.append([getattr(self.rtsae, name)[edit.moved].float().to(device) for name in statistics])
        if self.encoder is not None and not self.encoder.encoder.isfinite().all():
            raise ValueError(f"The dictionary of {self.rtsae.config.site} holds NaN or inf in rows {self.rows}.")
        self.device = device

    def begin(self, alphas_cumprod: torch.Tensor | None) -> PlanState:
        """A new generation on another noise schedule."""
        return PlanState(Trajectory(grid=TimeGrid(self.rtsae.config.anchors, alphas_cumprod)))

    def conditional(
        self, state: PlanState, tokens: torch.Tensor, timestep: float, size: tuple[int, int] | None
    ) -> torch.Tensor | None:
        """
        What to add to the conditional rows at this step.

        Args:
            state (`PlanState`): of this generation.
            tokens (`torch.Tensor`): their activations `(B, N, d)`.
            timestep (`float`): in training units.
            size (`tuple[int, int]`, *optional*): token grid, needed for masks.

        Returns:
            the change `(B, N or 1, d)` float32, or `None`.
        """
        steps = self._steps(state.conditional, tokens, timestep, size, self.edits, state.report)
        state.timestep = timestep
        state.on_conditional = _total([step for _, step in steps])
        contrast = [step for edit, step in steps if edit.apply_to == "contrast"]
        state.contrast = state.on_conditional if len(contrast) == len(steps) else _total(contrast)
        return state.on_conditional

    def unconditional(
        self, state: PlanState, stream: int, tokens: torch.Tensor, timestep: float, size: tuple[int, int] | None
    ) -> torch.Tensor | None:
        """What to add to the rows of an unconditional stream, after `conditional` of the same step."""
        if any(edit.apply_to == "contrast" for edit in self.edits):
            self._follows(state, timestep)
        everywhere = [edit for edit in self.edits if edit.apply_to == "all"]
        run = state.others.setdefault(stream, Trajectory(grid=state.conditional.grid))
        steps = [step for _, step in self._steps(run, tokens, timestep, size, everywhere)]
        return _total(steps + ([] if state.contrast is None else [-state.contrast]))

    def perturbed(self, state: PlanState, timestep: float) -> torch.Tensor | None:
        """What to add to rows that guidance made worse on purpose: what the conditional rows got."""
        self._follows(state, timestep)
        return state.on_conditional

    def _follows(self, state: PlanState, timestep: float) -> None:
        if state.timestep != timestep:
            raise ValueError(
                "This pipeline calls the denoiser for another part of guidance before the conditional one, which "
                "apply_to='contrast' follows. Use apply_to='cond'."
            )

    def _steps(
        self,
        run: Trajectory,
        tokens: torch.Tensor,
        timestep: float,
        size,
        edits: list[Edit],
        report: list | None = None,
    ) -> list[tuple[Edit, torch.Tensor]]:
        """The change `(B, N or 1, d)` each of `edits` asks for."""
        with _loading:  # one thread loads what all of them use
            if self.device != tokens.device:
                self._load(tokens.device)
        reads = any(edit.read for edit in edits)
        latents = self.encoder.observe(run, tokens, timestep) if reads else None
        coordinate, steps = (run.grid or self.grid).coordinate(timestep), []
        for edit, directions, (typical, mean, highest) in zip(
            self.edits, self.directions, self.statistics, strict=True
        ):
            if edit not in edits or not edit.acts_at(timestep):
                continue
            strength = torch.tensor(edit.strength_at(timestep), device=tokens.device, dtype=torch.float32)
            strength = strength.reshape(-1, 1, 1).repeat_interleave(len(tokens) // len(strength), 0)
            present = None
            if edit.operation != "add" or edit.clip:
                present = latents[..., [self.column[row] for row in edit.moved]]
            change = edit.change(strength, typical, mean, present)
            asked, out_of_range = change, None
            if edit.clip:
                wanted = present + change
                # an activation that is outside by itself is no reason to move it
                allowed = wanted.clamp(min=torch.zeros_like(highest)).minimum(torch.maximum(present, highest))
                out_of_range, change = (wanted - allowed).abs() > 1e-6 * highest, allowed - present
            if edit.where is not None:
                here = (latents[..., [self.column[row] for row in edit.where]] > 0).any(-1, keepdim=True)
                change, asked = change * here, asked * here
            if edit.mask is not None:
                mask = F.adaptive_avg_pool2d(edit.mask.to(tokens.device)[:, None], size).flatten(1)[..., None]
                mask = mask.repeat_interleave(len(tokens) // len(mask), 0)
                change, asked = change * mask, asked * mask
            if report is not None:
                report.append({"timestep": timestep, "latents": edit.latents, **_counts(asked, out_of_range)})
            steps.append((edit, change @ _at(directions, coordinate, dim=1)))
        return steps


def _total(changes: list[torch.Tensor]) -> torch.Tensor | None:
    if len(changes) < 2:
        return changes[0] if changes else None
    return torch.stack(torch.broadcast_tensors(*changes)).sum(0)


def _counts(asked: torch.Tensor, out_of_range: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    """The share of tokens that an edit is to change, and of these the share that had to be kept in range."""
    edited = (asked != 0).any(-1)
    if out_of_range is None:
        return {"edited": edited.float().mean(), "out_of_range": None}
    outside = (out_of_range.any(-1) & edited).float().mean()
    return {"edited": edited.float().mean(), "out_of_range": outside / edited.float().mean().clamp(min=1e-9)}
