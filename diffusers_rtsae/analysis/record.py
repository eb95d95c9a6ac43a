"""Record the activations of a denoiser's and its text encoders' sites during a generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..denoiser import (
    Arguments,
    Block,
    Call,
    Tap,
    TimeGrid,
    get_denoisers,
    get_site,
    get_text_encoders,
    is_text,
    joined_sites,
    noise_schedule,
    split_site,
    token_grid,
)
from ..dictionary import Dictionary
from ..files import closest
from ..models import ACTIVATIONS, TokenGrid
from ..pipeline import get_dictionary, own_size
from ..steering import as_mask


class Recorder:
    """
    Records the activations of some sites while a pipeline runs inside the `with` block.

    Args:
        pipeline (`DiffusionPipeline`): its U-Net or transformer is read, and its text encoders where sites lie there.
        sites (`list[str]`): paths of the modules. One in a text encoder has a single step, before all others, and one
            row for each prompt; the windows of a long prompt follow one another.
        timesteps (`list[float]`, *optional*): steps of denoising to record, to the nearest integer; all by default.
        activation (`str`, defaults to `"output"`): record a site's `"output"`, its `"update"` (output − input) or its
            `"input"`.
        dtype (`torch.dtype`, defaults to `torch.float32`): of the recorded activations.
        streams (`tuple[str, ...]`, defaults to `("cond",)`): guidance branches to record, of `"cond"`, `"uncond"` and
            `"perturbed"`; their rows follow one another.
        device (`str`, *optional*, defaults to `"cpu"`): device of the recorded activations; `None` for the
            denoiser's.

    Raises:
        `ValueError`: the denoiser has no such site, or `activation` is none of the three.

    Example:
        ```py
        >>> with Recorder(pipe, ["up_blocks.1.attentions.1"]) as recorder:
        ...     pipe("a red star")
        >>> recorder.trajectories("up_blocks.1.attentions.1").shape  # (images, tokens, steps, d)
        ```
    """

    def __init__(
        self, pipeline, sites: list[str], timesteps: list[float] | None = None, activation: str = "output",
        dtype: torch.dtype = torch.float32, streams: tuple[str, ...] = ("cond",), device: str | None = "cpu",
    ):  # fmt: skip
        if activation not in ACTIVATIONS:
            raise ValueError(f"`activation` must be one of {list(ACTIVATIONS)}, got {activation!r}.")
        self.models = get_denoisers(pipeline) | get_text_encoders(pipeline)
        for part in (part for site in sites for part in joined_sites(site)):
            component = split_site(part)[0] or next(iter(self.models))
            if component not in self.models:
                raise ValueError(f"{type(pipeline).__name__} has no {component!r}; it has {list(self.models)}.")
            get_site(self.models[component], part)
        self.sites, self.steps, self.activation = list(sites), timesteps, activation
        self.dtype, self.streams, self.device = dtype, streams, device
        self.call: Call | None = None
        self._tap = Tap(self)
        self._kept: dict[str, list[tuple[float, dict[str, torch.Tensor]]]] = {}

    def __enter__(self) -> Recorder:
        parts = [part for site in self.sites for part in joined_sites(site)]
        self._kept = {part: [] for part in parts}
        self._grids: dict[str, TokenGrid | None] = {}
        self._tap.watch(self.models, parts)
        return self

    def __exit__(self, *error) -> None:
        self._tap.watch(self.models, None)

    def begin(self, call: Call, arguments: Arguments) -> None:
        """Called before the denoiser runs."""
        self.call = call

    def site(
        self, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> None:
        """Called after a site has run."""
        if not call.encoder and self.steps is not None and all(abs(call.timestep - t) > 0.5 for t in self.steps):
            return
        batch, steps = block.batch(hidden_states), self._kept[name]
        branches = {role: rows for role in self.streams if (rows := call.rows_of(role, batch)) is not None}
        if not branches:  # this call has only other guidance branches
            return
        tokens = block.activation(self.activation, block_input, hidden_states)
        self._grids[name] = token_grid(call, name, batch, block.space(hidden_states))
        if not steps or steps[-1][0] != call.timestep:
            steps.append((call.timestep, {}))
        for role, rows in branches.items():  # where a sampler calls twice at one timestep, the later call stays
            read = tokens[rows].detach().to(self.device, self.dtype, copy=True)
            is_next_window = call.encoder and call.view[1] > 0 and role in steps[-1][1]
            steps[-1][1][role] = torch.cat([steps[-1][1][role], read], 1) if is_next_window else read

    @property
    def timesteps(self) -> list[float]:
        """Of the recorded steps. A block cache may have skipped some of the generation's steps."""
        return next(([timestep for timestep, _ in steps] for steps in self._kept.values() if steps), [])

    def trajectories(self, site: str) -> torch.Tensor:
        """The activations of a site, `(branches * images, tokens, steps, d)`; raises `ValueError` if it ran at other
        steps than the others, or at some step without one of the guidance branches."""
        if len(parts := joined_sites(site)) > 1:
            return torch.cat([self.trajectories(part) for part in parts], -1)
        steps = self._kept.get(site)
        if not steps:
            raise ValueError(
                f"Nothing was recorded at {site!r}; recorded were {[s for s, h in self._kept.items() if h]}."
            )
        if [timestep for timestep, _ in steps] != self.timesteps:
            raise ValueError(f"{site!r} was run at other steps than {self.sites[0]!r}: record it alone.")
        for timestep, branches in steps:
            if set(self.streams) - branches.keys():
                raise ValueError(
                    f"Expected the guidance branches {sorted(self.streams)} at {timestep:g}, got {sorted(branches)}."
                )
        counts = sorted({branch.shape[1] for _, branches in steps for branch in branches.values()})
        if len(counts) > 1:
            raise ValueError(f"Expected one number of tokens at all steps and for all texts, {site!r} has {counts}.")
        return torch.stack([torch.cat([branches[role] for role in self.streams]) for _, branches in steps], dim=2)

    def size(self, site: str) -> tuple[int, int]:
        """Height and width of a site's token grid. Frames of a video lie below one another; text is one row."""
        site = joined_sites(site)[0]
        if not self._kept.get(site):
            raise ValueError(f"Nothing was recorded at {site!r}: run the pipeline inside the `with` block first.")
        if is_text(site):
            return 1, self._kept[site][0][1][self.streams[0]].shape[1]
        grid = self._grids[site]
        if grid is None:
            tokens, over = self._kept[site][0][1][self.streams[0]].shape[1], self.call.grid
            raise ValueError(f"Cannot lay {tokens} tokens of {site} out over a {over.height}x{over.width} latent.")
        return grid.frames * grid.height, grid.width


@dataclass
class Recording:
    """
    Generated pictures, with the activations that a dictionary reads.

    Args:
        images (`list`): the pictures.
        prompts (`list[str]`): one for each picture.
        timesteps (`list[float]`): the sampler's, in order.
        trajectories (`dict[str, torch.Tensor]`): activations of each site, `(images, tokens, steps, d)`.
        sizes (`dict[str, tuple[int, int]]`): height and width of each site's token grid.
        dictionary (`Dictionary`): reads the activations.
        alphas_cumprod (`torch.Tensor`, *optional*): the model's noise schedule.
        guidance (`float`, *optional*): the guidance scale, if it is known.
    """

    images: list
    prompts: list[str]
    timesteps: list[float]
    trajectories: dict[str, torch.Tensor]
    sizes: dict[str, tuple[int, int]]
    dictionary: Dictionary
    alphas_cumprod: torch.Tensor | None
    guidance: float | None = None

    @torch.no_grad()
    def latents(self, site: str, rows: Sequence[int] | None = None) -> Iterator[torch.Tensor]:
        """
        The latents of a site, one step after the other, each `(images, tokens, rows)`, in units of their typical
        activation.

        Args:
            rows (`Sequence[int]`, *optional*): indices of the latents; all by default.
        """
        sae, trajectories = self.dictionary.sites[site], self.trajectories[site]
        rows = list(range(sae.config.num_latents)) if rows is None else list(rows)
        grid, reader = TimeGrid(sae.config.anchors, self.alphas_cumprod), sae.reader(rows, trajectories.device)
        memory, typical = reader.begin(), sae.typical_activation[rows].to(trajectories.device)
        for i, timestep in enumerate(self.timesteps):
            latents = reader.read(memory, trajectories[:, :, i], grid.step(timestep, self.sizes[site], self.guidance))
            memory.continue_with(trajectories[:, :, i])
            yield latents / typical

    def maps(self, features: Sequence[str | int | tuple[str, int]]) -> torch.Tensor:
        """
        Maps of where and when features are active, `(images, features, steps, height, width)`.

        Args:
            features (`Sequence`): labels, indices or `(site, index)`, all at one site. The map of a label is the sum
                of its latents' activations, each in units of its typical activation.
        """
        entries = [entry for feature in features for entry in self.dictionary.seen(feature)[:1]]
        sites = sorted({entry["site"] for entry in entries})
        if len(sites) != 1:
            raise ValueError(f"Expected features of one site, got {list(features)} at {sites}.")
        rows = sorted({row for entry in entries for row in entry["latents"]})
        columns = [[rows.index(row) for row in entry["latents"]] for entry in entries]
        steps = [torch.stack([z[..., c].sum(-1) for c in columns], 1).cpu() for z in self.latents(sites[0], rows)]
        return torch.stack(steps, 2).unflatten(3, self.sizes[sites[0]])

    def presence(self, site: str, mask=None) -> torch.Tensor:
        """
        How present each latent is in each picture at each step, `(images, steps, num_latents)`: its mean activation
        over the tokens, in units of its typical activation.

        Args:
            mask (*optional*): image, array or tensor `(height, width)`, or one for each picture; the mean is taken
                inside it.
        """
        weight = torch.ones(len(self.images), self.trajectories[site].shape[1])
        if mask is not None:
            small = torch.nn.functional.adaptive_avg_pool2d(as_mask(mask)[:, None], self.sizes[site])
            weight = small.flatten(1).expand(len(self.images), -1)
            if not weight.sum(1).all():
                raise ValueError("Expected a mask that covers at least one token, got an empty one.")
        weight = weight / weight.sum(1, keepdim=True)
        count, parts = self.dictionary.sites[site].config.num_latents, []
        for start in range(0, count, 4096):  # in parts, to bound the memory
            rows = range(start, min(start + 4096, count))
            parts.append(torch.stack([torch.einsum("bnr,bn->br", z, weight) for z in self.latents(site, rows)], 1))
        return torch.cat(parts, 2)


def activation_of(dictionary: Dictionary, sites: Sequence[str]) -> str:
    """The activation that all `sites` read: `"output"`, `"update"` or `"input"`."""
    activations = {dictionary.sites[site].config.activation for site in sites}
    if len(activations) != 1:
        raise ValueError(f"Expected sites that all read the same activation, got {sorted(activations)} at {sites}.")
    return activations.pop()


@torch.no_grad()
def record(
    pipeline, prompt: str | Sequence[str], adapter_name: str | None = None, sites: Sequence[str] | None = None, **call
) -> Recording:
    """
    Generate pictures and record the activations that a loaded dictionary reads.

    Args:
        pipeline (`DiffusionPipeline`): with a dictionary loaded.
        prompt (`str` or `Sequence[str]`): one picture is generated for each.
        adapter_name (`str`, *optional*): of the dictionary.
        sites (`Sequence[str]`, *optional*): of the dictionary; all by default.
        call: passed to the pipeline.

    Example:
        ```py
        >>> recording = record(pipe, "a red star", num_inference_steps=25)
        >>> recording.maps(["red", 1234]).shape  # (images, features, steps, height, width)
        ```
    """
    dictionary = get_dictionary(pipeline, adapter_name)
    sites = list(dictionary.sites if sites is None else sites)
    for site in sites:
        if site not in dictionary.sites:
            raise ValueError(f"The dictionary has no site {site!r}. {closest(site, dictionary.sites)}")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    with Recorder(pipeline, sites, activation=activation_of(dictionary, sites)) as recorder:
        images = pipeline(prompts, num_images_per_prompt=1, **own_size(pipeline) | call).images
    return Recording(
        list(images), prompts, recorder.timesteps, {site: recorder.trajectories(site) for site in sites},
        {site: recorder.size(site) for site in sites}, dictionary,
        noise_schedule(pipeline.scheduler), recorder.call.guidance,
    )  # fmt: skip
