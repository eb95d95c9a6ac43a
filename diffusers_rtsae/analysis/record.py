"""Record what a denoiser's sites do during a generation."""

from __future__ import annotations

import torch

from ..pipeline import get_denoiser, get_dictionary
from ..steering import Clock, PrefixEncoder, TimeGrid, Trajectory, call_arguments, get_site
from ..steering.sites import read_output, spatial_size, to_tokens


class Recorder:
    """
    Keeps the conditional activations of some sites at some timesteps while a pipeline runs inside the `with` block.

    Args:
        pipeline (`DiffusionPipeline`): its U-Net or transformer is read.
        sites (`list[str]`): paths of the modules.
        timesteps (`list[float]`, *optional*): steps to keep, to the nearest integer; all by default.
        activation (`str`, defaults to `"output"`): keep a site's `"output"` or its `"update"` (output − input).
        dtype (`torch.dtype`, defaults to `torch.float32`): of what is kept, on the CPU.
        streams (`tuple[str, ...]`, defaults to `("cond",)`): parts of guidance to keep, one after the other.

    Example:
        ```py
        >>> with Recorder(pipe, ["up_blocks.1.attentions.1"]) as recorder:
        ...     pipe("a red star")
        >>> recorder.trajectories("up_blocks.1.attentions.1").shape  # (images, tokens, steps, d)
        ```
    """

    def __init__(
        self, pipeline, sites: list[str], timesteps: list[float] | None = None, activation: str = "output",
        dtype: torch.dtype = torch.float32, streams: tuple[str, ...] = ("cond",),
    ):  # fmt: skip
        if activation not in ("output", "update"):
            raise ValueError(f"`activation` must be 'output' or 'update', got {activation!r}.")
        self.denoiser = get_denoiser(pipeline)
        self.modules = {site: get_site(self.denoiser, site) for site in sites}
        self.wanted, self.activation, self.dtype, self.streams = timesteps, activation, dtype, streams
        self.clock = Clock()
        self._kept: dict[str, list[torch.Tensor]] = {}

    def __enter__(self) -> Recorder:
        self.timesteps: list[float] = []
        self._kept = {site: [] for site in self.modules}
        self._hooks = [self.denoiser.register_forward_pre_hook(self._tick, with_kwargs=True)]
        for site, module in self.modules.items():
            self._hooks.append(module.register_forward_hook(self._keep(site), with_kwargs=True))
        return self

    def __exit__(self, *error) -> None:
        for hook in self._hooks:
            hook.remove()

    def _tick(self, module, args: tuple, kwargs: dict) -> None:
        self.clock.tick(*call_arguments(args, kwargs))
        self._skip = self.wanted is not None and all(abs(self.clock.timestep - t) > 0.5 for t in self.wanted)
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
            rows = dict(self.clock.rows(len(hidden_states)))
            if not rows.keys() & set(self.streams):  # a call for another part of guidance alone
                return
            if missing := set(self.streams) - rows.keys():
                raise ValueError(f"This call of the denoiser has no {sorted(missing)}, it has {sorted(rows)}.")
            self._shape = hidden_states.shape
            if self._again:
                self._kept[site].pop()
            kept = [to_tokens(hidden_states[rows[stream]]).detach() for stream in self.streams]
            self._kept[site].append(torch.cat([part.to("cpu", self.dtype, copy=True) for part in kept]))

        return hook

    def trajectories(self, site: str) -> torch.Tensor:
        """Activations `(streams * images, tokens, steps, d)` of the generation inside the `with` block."""
        if not self._kept.get(site):
            raise ValueError(
                f"Nothing was recorded at {site!r}; recorded were {[s for s, h in self._kept.items() if h]}."
            )
        return torch.stack(self._kept[site], dim=2)

    def size(self) -> tuple[int, int]:
        """Height and width of the token grid of the last site."""
        return spatial_size(self._shape, self.clock.latent_size)


@torch.no_grad()
def trace_features(
    pipeline, prompt: str, features: list[str | int | tuple[str, int]], adapter_name: str | None = None, **call
):
    """
    Generate one picture and follow features of a loaded dictionary through denoising time and space.

    Args:
        pipeline (`DiffusionPipeline`): with a dictionary loaded.
        prompt (`str`): what to generate.
        features (`list`): labels, indices or `(site, index)`, all at one site. A label's trace sums its latents'
            activations there, each in units of its typical activation.
        call: passed to the pipeline.

    Returns:
        the picture (PIL), the timesteps, and the activations `(features, steps, height, width)`.
    """
    dictionary = get_dictionary(pipeline, adapter_name)
    entries = [entry for feature in features for entry in dictionary.features(feature)[0][:1]]
    sites = sorted({entry["site"] for entry in entries})
    if len(sites) != 1:
        raise ValueError(f"Expected features that live at one site, got {features} at {sites}.")
    site = sites[0]
    rtsae = dictionary.sites[site]
    with Recorder(pipeline, [site], activation=rtsae.config.activation) as recorder:
        image = pipeline(prompt, num_images_per_prompt=1, **call).images[0]
    trajectories = recorder.trajectories(site)[:1]
    rows = sorted({row for entry in entries for row in entry["latents"]})
    grid = TimeGrid(rtsae.config.anchors, getattr(pipeline.scheduler, "alphas_cumprod", None))
    encoder = PrefixEncoder(rtsae, rows, grid, trajectories.device)
    maps, state = [], Trajectory()
    for i, timestep in enumerate(recorder.timesteps):
        latents = encoder.observe(state, trajectories[:, :, i], timestep)[0] / rtsae.typical_activation[rows]
        state.continue_with(trajectories[:, :, i])
        maps.append(torch.stack([latents[:, [rows.index(r) for r in e["latents"]]].sum(-1) for e in entries]))
    activations = torch.stack(maps, dim=1)
    return image, recorder.timesteps, activations.unflatten(2, recorder.size())
