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
    """Records a denoiser's conditional calls at chosen timesteps (to the nearest integer) while a pipeline runs."""

    def __init__(self, timesteps: Sequence[int]):
        self.timesteps, self.recorded, self.tap = timesteps, {}, Tap(self)

    def begin(self, call: Call, arguments: Arguments) -> None:
        """The denoiser is called."""
        if call.rows_of("cond", call.rows) is not None and (timestep := round(call.timestep)) in self.timesteps:
            self.recorded[timestep] = call, self.tap.last.component, arguments.args, arguments.kwargs


def _with(
    block: Block,
    hidden_states: torch.Tensor,
    block_input: torch.Tensor,
    rows: slice,
    new: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """The hidden states of a block with the activation `new (rows, tokens, d)` on some rows of the batch."""
    edited, index = hidden_states.clone(), block.rows(hidden_states, rows)
    if activation == "update":
        new = new.to(block_input) + block.to_tokens(block_input[index])
    edited[index] = block.from_tokens(new, hidden_states[index])
    return edited


class _Replacing:
    """Replaces the activation of a site, on the conditional rows of a call, by `new (rows, tokens, d)`."""

    def __init__(self, call: Call, new: torch.Tensor, activation: str):
        self.call, self.new, self.activation, self.tap = call, new, activation, Tap(self)

    def begin(self, call: Call, arguments: Arguments) -> None:
        """The denoiser is called; its rows are those of `self.call`."""

    def site(
        self, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """The hidden states with the new activation."""
        rows = self.call.rows_of("cond", block.batch(hidden_states))
        return _with(block, hidden_states, block_input, rows, self.new, self.activation)


class Reconstructing:
    """
    While a pipeline runs inside the `with` block, the site's conditional activation at each anchor is replaced by its
    reconstruction from the activations up to that anchor.
    """

    def __init__(self, pipe: DiffusionPipeline, sae: SparseDictionary):
        self.sae, self.denoisers, self.tap, self.activations = sae, get_denoisers(pipe), Tap(self), {}

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
        """The hidden states with the reconstruction, at an anchor."""
        timestep, anchors = round(call.timestep), list(self.sae.config.anchors)
        rows, activation = call.rows_of("cond", block.batch(hidden_states)), self.sae.config.activation
        if rows is None or timestep not in anchors:
            return None
        anchor = anchors.index(timestep)
        # of several calls at one step the last counts
        self.activations = {g: tokens for g, tokens in self.activations.items() if g < anchor}
        tokens = block.activation(activation, block_input, hidden_states)[rows]
        self.activations[anchor] = tokens.to(self.sae.encoder.device, torch.float32)
        known = torch.stack(list(self.activations.values()), 2)
        new = self.sae.reconstruct(known.flatten(0, 1))[:, -1].unflatten(0, known.shape[:2])
        return _with(block, hidden_states, block_input, rows, new, activation)


@torch.no_grad()
def recovered(pipe: DiffusionPipeline, sae: SparseDictionary, prompts: Sequence[str], generators=None, **call) -> dict:
    """
    How much of the denoiser's prediction is recovered when a site's activation is replaced by its reconstruction.

    At each anchor of a plain generation the denoiser is called again on the same input, with the site's conditional
    rows replaced by the reconstruction from the anchors so far, rolled out (`online`) or predicted from the true
    activation before (`teacher_forced`). Replacing by the mean activation of these pictures is the baseline.

    Returns:
        `dict`: 1 minus the error of the prediction relative to the baseline's, per anchor and over all anchors (ratio
        of sums). 1 is a perfect recovery, 0 is as bad as the mean.
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
        call, component, args, kwargs = calls.recorded[timestep]
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
                prediction = denoiser(*args, **kwargs)[0].float()
            errors[name][g] += (prediction[rows] - truth[rows]).double().square().mean().item()
    result = {}
    for name in ("online", "teacher_forced"):
        result[f"recovered_{name}_per_anchor"] = [round(v, 4) for v in (1 - errors[name] / errors["mean"]).tolist()]
        result[f"recovered_{name}"] = round((1 - errors[name].sum() / errors["mean"].sum()).item(), 4)
    return result
