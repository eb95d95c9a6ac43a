"""What the denoiser predicts when a site's activation is replaced by its reconstruction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline

from diffusers_rtsae import SparseDictionary
from diffusers_rtsae.analysis.record import Recorder
from diffusers_rtsae.denoiser import Arguments, Block, Call, Tap, get_denoisers
from diffusers_rtsae.pipeline import own_size


class _Calls:
    """Keeps a denoiser's conditional calls at chosen timesteps (to the nearest integer) while a pipeline runs."""

    def __init__(self, timesteps: Sequence[int]):
        self.timesteps, self.kept, self.tap = timesteps, {}, Tap(self)

    def begin(self, call: Call, arguments: Arguments) -> None:
        """The denoiser is called."""
        if call.rows_of("cond", call.rows) is not None and (timestep := round(call.timestep)) in self.timesteps:
            self.kept[timestep] = call, self.tap.last.component, arguments.args, arguments.kwargs


def _with(
    block: Block,
    hidden_states: torch.Tensor,
    block_input: torch.Tensor,
    rows: slice,
    new: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """What a block goes on with, with another activation `(rows, tokens, d)` on some rows of the batch."""
    edited, index = hidden_states.clone(), block.rows(hidden_states, rows)
    if activation == "update":
        new = new.to(block_input) + block.to_tokens(block_input[index])
    edited[index] = block.from_tokens(new, hidden_states[index])
    return edited


class _Replacing:
    """A site whose activation, on the conditional rows of a call, is `new (rows, tokens, d)`."""

    def __init__(self, call: Call, new: torch.Tensor, activation: str):
        self.call, self.new, self.activation, self.tap = call, new, activation, Tap(self)

    def begin(self, call: Call, arguments: Arguments) -> None:
        """The denoiser is called again, by nobody who says what its rows are."""

    def site(
        self, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """The activation with the new one in it."""
        rows = self.call.rows_of("cond", block.batch(hidden_states))
        return _with(block, hidden_states, block_input, rows, self.new, self.activation)


class Reconstructing:
    """At a dictionary's anchors a site's conditional activation is its reconstruction from what it was until then,
    while a pipeline runs inside the `with` block."""

    def __init__(self, pipe: DiffusionPipeline, sae: SparseDictionary):
        self.sae, self.denoisers, self.tap, self.seen = sae, get_denoisers(pipe), Tap(self), {}

    def __enter__(self):
        self.tap.watch(self.denoisers, [self.sae.config.site])
        return self

    def __exit__(self, *error):
        self.tap.watch(self.denoisers, None)

    def begin(self, call: Call, arguments: Arguments) -> None:
        """The denoiser is called."""

    def site(
        self, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor | None:
        """The activation with its reconstruction in it."""
        timestep, anchors = round(call.timestep), list(self.sae.config.anchors)
        rows, activation = call.rows_of("cond", block.batch(hidden_states)), self.sae.config.activation
        if rows is None or timestep not in anchors:
            return None
        anchor = anchors.index(timestep)
        # a sampler may call twice at one step: the later call stands
        self.seen = {g: own for g, own in self.seen.items() if g < anchor}
        tokens = block.activation(activation, block_input, hidden_states)[rows]
        self.seen[anchor] = tokens.to(self.sae.encoder.device, torch.float32)
        known = torch.stack(list(self.seen.values()), 2)
        new = self.sae.reconstruct(known.flatten(0, 1))[:, -1].unflatten(0, known.shape[:2])
        return _with(block, hidden_states, block_input, rows, new, activation)


@torch.no_grad()
def recovered(pipe: DiffusionPipeline, sae: SparseDictionary, prompts: Sequence[str], generators=None, **call) -> dict:
    """
    What the denoiser predicts when a site's activation is replaced by its reconstruction.

    At each anchor of a plain generation the denoiser is called again on the same input, with the conditional rows of
    the site replaced: by the reconstruction from what is known by then, rolled out (`online`) or from the true
    activation before (`teacher_forced`); and by the mean activation of these pictures, which is what 0 stands for.

    Returns:
        `dict`: the share of the mean replacement's error in the noise prediction that the reconstruction recovers, 1
        is all: per anchor, and over all (ratio of sums).
    """
    denoisers, anchors = get_denoisers(pipe), list(sae.config.anchors)
    calls = _Calls(anchors)
    with (
        calls.tap.watching(denoisers, []),
        Recorder(pipe, [sae.config.site], anchors, sae.config.activation) as recorder,
    ):
        pipe(list(prompts), generator=generators, output_type="latent", **own_size(pipe) | call)
    whole = recorder.trajectories(sae.config.site)
    if whole.shape[2] != len(anchors):
        raise ValueError(f"The sampler visited {recorder.timesteps}, not all anchors {anchors}: give its step count.")
    images, tokens = whole.shape[:2]
    h = whole.flatten(0, 1).to(sae.encoder.device)
    errors = {name: torch.zeros(len(anchors), dtype=torch.float64) for name in ("online", "teacher_forced", "mean")}
    for g, timestep in enumerate(anchors):
        call, component, args, kwargs = calls.kept[timestep]
        denoiser = denoisers[component]
        known = h[:, : g + 1]
        replacements = {
            "online": sae.reconstruct(known)[:, g],
            "teacher_forced": sae.reconstruct(known, teacher_forced=True)[:, g],
            "mean": h[:, g].mean(0).expand(len(h), -1),
        }
        truth = denoiser(*args, **kwargs)[0].float()
        rows = call.rows_of("cond", len(truth))
        for name, replacement in replacements.items():
            new = replacement.unflatten(0, (images, tokens)).to(truth.device)
            replacing = _Replacing(call, new, sae.config.activation)
            with replacing.tap.watching({component: denoiser}, [sae.config.site]):
                found = denoiser(*args, **kwargs)[0].float()
            errors[name][g] += (found[rows] - truth[rows]).double().square().mean().item()
    result = {}
    for name in ("online", "teacher_forced"):
        result[f"recovered_{name}_per_anchor"] = [round(v, 4) for v in (1 - errors[name] / errors["mean"]).tolist()]
        result[f"recovered_{name}"] = round((1 - errors[name].sum() / errors["mean"].sum()).item(), 4)
    return result
