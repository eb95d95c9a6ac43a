"""Record what a denoiser's sites do during a generation."""

from __future__ import annotations

import torch

from ..pipeline import get_denoiser
from ..steering import Clock, get_site
from ..steering.sites import read_output, to_tokens


class Recorder:
    """
    Keeps the conditional activations of some sites at some timesteps while a pipeline runs inside the `with` block.

    Args:
        pipeline (`DiffusionPipeline`): its U-Net or transformer is read.
        sites (`list[str]`): paths of the modules.
        timesteps (`list[float]`, *optional*): steps to keep; all by default.
        activation (`str`, defaults to `"output"`): keep a site's `"output"` or its `"update"` (output − input).
        dtype (`torch.dtype`, defaults to `torch.float32`): of what is kept, on the CPU.

    Example:
        ```py
        >>> with Recorder(pipe, ["up_blocks.0.attentions.1"]) as recorder:
        ...     pipe("a red star")
        >>> recorder.trajectories("up_blocks.0.attentions.1").shape  # (images, tokens, steps, d)
        ```
    """

    def __init__(
        self, pipeline, sites: list[str], timesteps: list[float] | None = None, activation: str = "output",
        dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        self.denoiser = get_denoiser(pipeline)
        self.modules = {site: get_site(self.denoiser, site) for site in sites}
        self.wanted, self.activation, self.dtype = timesteps, activation, dtype
        self.clock = Clock()
        self.clock.watch(pipeline)

    def __enter__(self) -> Recorder:
        self.timesteps: list[float] = []
        self._kept: dict[str, list[torch.Tensor]] = {site: [] for site in self.modules}
        self._hooks = [self.denoiser.register_forward_pre_hook(self._tick, with_kwargs=True)]
        for site, module in self.modules.items():
            self._hooks.append(module.register_forward_hook(self._keep(site), with_kwargs=True))
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def _tick(self, module, args: tuple, kwargs: dict) -> None:
        self.clock.tick_call(args, kwargs)
        self._skip = self.wanted is not None and self.clock.timestep not in self.wanted
        # a sampler that calls twice at one timestep: the later call stands
        self._again = bool(self.timesteps) and self.timesteps[-1] == self.clock.timestep
        if not self._skip and not self._again:
            self.timesteps.append(self.clock.timestep)

    def _keep(self, site: str):
        def hook(module, args, kwargs, output):
            if self._skip:
                return
            hidden_states = read_output(output)
            if self.activation == "update":
                hidden_states = hidden_states - (args[0] if args else kwargs["hidden_states"])
            rows = self.clock.conditional_rows(len(hidden_states))
            if self._again:
                self._kept[site].pop()
            self._kept[site].append(to_tokens(hidden_states[rows]).detach().to("cpu", self.dtype, copy=True))

        return hook

    def trajectories(self, site: str) -> torch.Tensor:
        """Activations `(images, tokens, steps, d)` of the generation inside the `with` block."""
        return torch.stack(self._kept[site], dim=2)
