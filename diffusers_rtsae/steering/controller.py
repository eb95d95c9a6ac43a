"""The controller: the processor around a denoiser's blocks. It owns the hooks and nothing of the model."""

from __future__ import annotations

import torch
from torch import nn

from .clock import Clock
from .plan import SitePlan
from .sites import from_tokens, get_site, read_output, replace_output, spatial_size, to_tokens


class Controller:
    """
    Applies site plans while a denoiser runs. Lives in the denoiser's `__dict__`, so that it follows the denoiser
    through offloading, copying and pipeline conversion without entering its `state_dict`. No plan, no hook.

    Args:
        denoiser (`nn.Module`): the U-Net or transformer.
    """

    def __init__(self, denoiser: nn.Module):
        self.denoiser = denoiser
        self.clock = Clock()
        self.adapters: dict = {}
        self.enabled = True
        self._plans: dict[str, list[SitePlan]] = {}
        self._generation = 0
        self._hooks: list = []

    def install(self, plans: list[SitePlan]) -> None:
        """Replace what is applied; plans of one site all see the same, unedited activation."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._plans = [], {}
        for plan in plans:
            if plan.edits:
                self._plans.setdefault(plan.rtsae.config.site, []).append(plan)
        if self._plans:
            self._hooks.append(self.denoiser.register_forward_pre_hook(self._tick, with_kwargs=True))
        for site in self._plans:
            hook = _SiteHook(self, site)
            self._hooks.append(get_site(self.denoiser, site).register_forward_hook(hook, with_kwargs=True))
        self.restart()

    def restart(self) -> None:
        """Forget the running generation."""
        self.clock.restart()
        self._generation = 0

    def _tick(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.clock.tick(args, kwargs)
        if self.clock.generation != self._generation:
            for plan in (plan for plans in self._plans.values() for plan in plans):
                self._check_batch(plan)
                plan.restart()
            self._generation = self.clock.generation

    def _check_batch(self, plan: SitePlan) -> None:
        images = self.clock.sample_shape[0]
        prompts = self.clock.prompts or images
        for edit in plan.edits:
            strengths = len(edit.strength) if isinstance(edit.strength, tuple) else images
            masks = images if edit.mask is None or len(edit.mask) == 1 else len(edit.mask)
            for what, given in {"strengths": strengths, "masks": masks}.items():
                if given not in (prompts, images):
                    raise ValueError(f"{given} {what} were given for {prompts} prompts.")

    def apply(self, site: str, args: tuple, output):
        """Edit what the block at `site` returned; the very same object if there is nothing to change."""
        hidden_states = read_output(output)
        rows = self.clock.conditional_rows(len(hidden_states))
        edited = hidden_states
        with torch.autocast(hidden_states.device.type, enabled=False):  # float32 inside, whatever runs around
            deltas = [self._delta(plan, site, args, hidden_states, rows) for plan in self._plans[site]]
            for part, changes in ((rows, [d[0] for d in deltas]), (slice(0, rows.start), [d[1] for d in deltas])):
                changes = [change for change in changes if change is not None]
                if changes and part.stop > part.start:
                    edited = hidden_states.clone() if edited is hidden_states else edited
                    edited[part] += from_tokens(torch.stack(torch.broadcast_tensors(*changes)).sum(0), hidden_states)
            for plan in self._plans[site]:
                plan.continue_with(_activation(plan, args, edited, rows))
        return output if edited is hidden_states else replace_output(output, edited)

    def _delta(self, plan: SitePlan, site: str, args: tuple, hidden_states: torch.Tensor, rows: slice):
        tokens = _activation(plan, args, hidden_states, rows)
        if tokens.shape[-1] != plan.rtsae.config.in_channels:
            raise ValueError(_width_error(site, plan.rtsae.config.in_channels, tokens.shape[-1]))
        masked = any(edit.mask is not None for edit in plan.edits)
        size = spatial_size(hidden_states.shape, self.clock.sample_shape) if masked else None
        return plan.delta(tokens, self.clock.timestep, size)


def _activation(plan: SitePlan, args: tuple, hidden_states: torch.Tensor, rows: slice) -> torch.Tensor:
    """The conditional activation the plan's dictionary is about, `(B, N, d)`: a block's output, or its update."""
    if plan.rtsae.config.activation == "update":
        return to_tokens(hidden_states[rows]) - to_tokens(args[0][rows])
    return to_tokens(hidden_states[rows])


def check_width(denoiser: nn.Module, site: str, channels: int) -> None:
    """Raise `ValueError` if the module at `site` is known to have another width than `channels`."""
    module = get_site(denoiser, site)
    width = getattr(module, "out_channels", None) or getattr(module, "in_channels", None) or channels
    if width != channels:
        raise ValueError(_width_error(site, channels, width))


def _width_error(site: str, expected: int, found: int) -> str:
    return f"The dictionary of {site} is for {expected} channels, the model has {found} there."


class _SiteHook:
    """A forward hook that can be copied and pickled with its module."""

    def __init__(self, controller: Controller, site: str):
        self.controller, self.site = controller, site

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output):
        args = args or (kwargs["hidden_states"],)
        return self.controller.apply(self.site, args, output)
