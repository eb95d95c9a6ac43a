"""Edits of one site folded to tensors: a lazy encoder for the latents that must be read, and what to add to the
activation."""

from __future__ import annotations

import torch

from ..models import RTSAE, jump_relu
from .clock import TimeGrid
from .edits import Edit

_REACHED = 0.1  # a step this close before an anchor, in units of anchors, stands for it


def _at(values: torch.Tensor, coordinate: float, dim: int = 0) -> torch.Tensor:
    """`values` along the anchors `dim`, linearly interpolated at `coordinate`."""
    low = min(int(coordinate), values.shape[dim] - 1)
    high = min(low + 1, values.shape[dim] - 1)
    return torch.lerp(values.select(dim, low), values.select(dim, high), coordinate - low)


class PrefixEncoder:
    """
    Encodes chosen latents while denoising, from what is known so far.

    The linear predictor is folded into the encoder rows, so a step costs O(tokens · d · rows) and no full-width
    product.
    The code of a step is the sum over the anchors passed so far, plus the innovation since the last of them; a
    repeated
    call at one timestep overwrites, and skipped anchors compose. The past is the activation the network continued
    with.

    Args:
        rtsae (`RTSAE`): the dictionary.
        rows (`list[int]`): the latents to encode.
        grid (`TimeGrid`): where timesteps lie among the anchors.
    """

    def __init__(self, rtsae: RTSAE, rows: list[int], grid: TimeGrid, device: torch.device):
        def load(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().to(device, torch.float32)

        self.grid, dynamics = grid, rtsae.dynamics
        self.encoder, self.bias = load(rtsae.encoder[rows]), load(rtsae.encoder_bias[rows])
        self.offset = (self.encoder * load(rtsae.decoder_bias)).sum(-1)  # (rows, G)
        self.mean, self.scale, self.transition = load(dynamics.mean), load(dynamics.scale), load(dynamics.transition)
        self.residual_scale, self.threshold = load(dynamics.residual_scale), load(rtsae.threshold)
        self.restart()

    def restart(self) -> None:
        """Forget the trajectory."""
        self._committed: torch.Tensor = self.bias  # pre-activations from the anchors passed so far
        self._past: tuple[float, torch.Tensor] | None = None  # coordinate and activation of the last anchor passed
        self._pending: tuple[float, float, torch.Tensor] | None = None  # timestep, coordinate, pre-activations
        self._continued: torch.Tensor | None = None

    def _carry(self, rows: torch.Tensor, start: float, end: float) -> torch.Tensor:
        """`rows @ Φ(start → end)`: the linear dynamics between two coordinates, part of an interval to first order."""
        for g in range(len(self.scale) - 2, -1, -1):
            length = min(end, g + 1) - max(start, g)
            if length > 0:
                rows = rows + length * (rows @ self.transition[g] - rows)
        return rows

    def _commit(self) -> None:
        """Once time moves on, a step that reached the next anchor becomes the past that later steps are predicted
        from."""
        if self._pending is None:
            return
        _, coordinate, pre_activations = self._pending
        following = 0 if self._past is None else int(self._past[0] + _REACHED) + 1
        if coordinate >= following - _REACHED:
            self._past, self._committed = (coordinate, self._continued), pre_activations

    def observe(self, tokens: torch.Tensor, timestep: float) -> torch.Tensor:
        """Latents `(B, N, rows)` of tokens `(B, N, d)` at this step."""
        coordinate, last = self.grid.coordinate(timestep), len(self.scale) - 1
        still_first = self._past is None and coordinate == 0  # steps before the first anchor stand for it in turn
        if self._pending is not None and self._pending[0] != timestep and not still_first:
            self._commit()
        if self._past is not None and self._past[0] + _REACHED >= last:
            pre_activations, threshold = self._committed, self.threshold[last]
        else:
            pre_activations, threshold = self._encode(tokens.float(), coordinate, last)
        self._pending = (timestep, coordinate, pre_activations)
        return jump_relu(pre_activations, threshold)

    def _encode(self, tokens: torch.Tensor, coordinate: float, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        mean, scale = _at(self.mean, coordinate), _at(self.scale, coordinate)
        if self._past is None:  # the first activation is its own innovation
            now = self.encoder[:, 0] / (self.residual_scale[0] * scale)
            return self._committed + (tokens - mean) @ now.T - self.offset[:, 0], self.threshold[0]
        then, past = self._past
        passed = int(then + _REACHED)
        block = min(max(passed + 1, -int(-(coordinate - _REACHED) // 1)), last)
        progress = min(max((coordinate - then) / (block - then), 0.0), 1.0)
        rows = self.encoder[:, block] / self.residual_scale[block]
        innovation = (tokens - mean) @ (rows / scale).T
        carried = self._carry(rows, then, coordinate) / _at(self.scale, then)
        predicted = (past.float() - _at(self.mean, then)) @ carried.T
        threshold = torch.lerp(self.threshold[passed], self.threshold[block], progress)
        return self._committed + innovation - predicted - progress * self.offset[:, block], threshold

    def continue_with(self, tokens: torch.Tensor) -> None:
        """Tell the activation the network really continued with, after any edit."""
        self._continued = tokens.clone()  # later layers may write into the activation


class SitePlan:
    """
    All edits of one dictionary at one site, ready to be applied.

    Args:
        rtsae (`RTSAE`): the dictionary.
        edits (`list[Edit]`): what to change; idle edits are left out.
        alphas_cumprod (`torch.Tensor`, *optional*): of the base model's schedule.
    """

    def __init__(self, rtsae: RTSAE, edits: list[Edit], alphas_cumprod: torch.Tensor | None):
        self.rtsae, self.edits = rtsae, [edit for edit in edits if not edit.is_idle]
        self.grid = TimeGrid(rtsae.config.anchors, alphas_cumprod)
        read = {row for edit in self.edits for row in edit.where or ()}
        read |= {row for edit in self.edits if edit.operation != "add" for row in edit.latents}
        self.rows = sorted(read)
        self.device: torch.device | None = None

    def _load(self, device: torch.device) -> None:
        self.device = device
        self.encoder = PrefixEncoder(self.rtsae, self.rows, self.grid, device) if self.rows else None
        self.directions, self.units = [], []
        for edit in self.edits:
            latents = list(edit.latents)
            injected = (
                self.rtsae.feature_trajectories if edit.injection == "trajectory" else self.rtsae.residual_directions
            )
            self.directions.append(injected(latents).detach().to(device, torch.float32))
            typical = self.rtsae.typical_activation[latents].float().cpu()
            self.units.append((typical * torch.tensor(edit.weights)).to(device))

    def restart(self) -> None:
        """A new generation begins."""
        if self.device is not None and self.encoder is not None:
            self.encoder.restart()

    def delta(
        self, tokens: torch.Tensor, timestep: float, size: tuple[int, int] | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        What to add at this step.

        Args:
            tokens (`torch.Tensor`): conditional activations `(B, N, d)`.
            timestep (`float`): in training units.
            size (`tuple[int, int]`, *optional*): token grid, needed for masks.

        Returns:
            the change of the conditional and of the unconditional rows, each `(B, N or 1, d)` float32 or `None`.
        """
        if self.device != tokens.device:
            self._load(tokens.device)
        latents = self.encoder.observe(tokens, timestep) if self.encoder is not None else None
        column = {row: i for i, row in enumerate(self.rows)}
        on_cond = on_uncond = None
        for edit, directions, units in zip(self.edits, self.directions, self.units, strict=True):
            if not edit.acts_at(timestep):
                continue
            strength = torch.tensor(edit.strength, device=tokens.device, dtype=torch.float32).reshape(-1, 1, 1)
            strength = strength.repeat_interleave(len(tokens) // len(strength), 0)
            if edit.operation == "add":
                change = strength * units
            else:
                present = latents[..., [column[row] for row in edit.latents]]
                change = strength * units - present if edit.operation == "set" else (strength - 1) * present
            if edit.where is not None:
                change = change * (latents[..., [column[row] for row in edit.where]] > 0).any(-1, keepdim=True)
            if edit.mask is not None:
                mask = torch.nn.functional.adaptive_avg_pool2d(edit.mask.to(tokens.device)[:, None], size)
                mask = mask.flatten(1)[..., None]
                change = change * mask.repeat_interleave(len(tokens) // len(mask), 0)
            step = change @ _at(directions, self.grid.coordinate(timestep), dim=1)
            on_cond = step if on_cond is None else on_cond + step
            if edit.apply_to != "cond":
                step = step if edit.apply_to == "all" else -step
                on_uncond = step if on_uncond is None else on_uncond + step
        return on_cond, on_uncond

    def continue_with(self, tokens: torch.Tensor) -> None:
        if self.encoder is not None:
            self.encoder.continue_with(tokens)
