"""
Generations that begin in the middle of denoising: the activations at the anchors before their first step.

An RTSAE reads whole trajectories, but image-to-image, inpainting and refiners skip the first anchors. The activations
there are computed by calling the denoiser. First the noisy latents of the first step are split into a picture and
noise: with the picture that the pipeline was given, or else with the denoiser's own prediction. Then picture and noise
are mixed for each missed anchor, and the denoiser is called with the mixture. This costs one call per missed anchor,
and one for the prediction, once in a generation.
"""

from __future__ import annotations

import warnings

import torch

from ..denoiser import Arguments, Block, Call, Tap, shares, token_grid, training_time, unmix
from .plan import SitePlan
from .run import Run

_NEAR = 0.1  # in units of anchors: a first step at most this far after an anchor stands for it, as in `PrefixReader`


def catch_up(run: Run, call: Call, arguments: Arguments, tap: Tap) -> None:
    """
    Fill the memories of a generation with the activations at the anchors before its first step, if it needs them.

    Args:
        run: what the controller remembers of the generation, with the plans that act.
        call (`Call`): the present call, which is the first one of the generation.
        arguments (`Arguments`): the arguments of this call.
        tap (`Tap`): the controller's tap on the denoiser.
    """
    late = []
    for plans in run.plans.values() if call.caller is not None else ():
        for key, plan in plans:
            for part in call.parts if plan.sae.reads_past else ():
                state = run.state(key, plan, part, call)
                if part.branch in state.memories or part.role not in ("cond", "uncond") or not plan.reads(part.role):
                    continue
                if missed := _missed(plan, state.grid or plan.grid, part.timestep):
                    late.append((plan, state, part, missed))
    if not late or not _is_late(call):
        return
    anchors = sorted({anchor for *_, missed in late for anchor in missed}, reverse=True)
    past = _Past(call, [plan.sae.config.site for plan, *_ in late])
    try:
        for anchor, noisy in _earlier(call, arguments, tap, anchors, past):
            past.run(arguments, noisy)
            for plan, state, part, missed in late:
                if anchor in missed:
                    tokens, size = past.tokens(plan, call, part)
                    plan.recall(state, part.branch, tokens, anchor, size)
    except _Unknown as reason:
        warnings.warn(
            f"This generation begins at t = {call.timestep:.0f}, after the anchors {anchors} of its dictionary, and "
            f"the activations there cannot be computed, as {reason}: latents are read as if the first step were the "
            "first anchor.",
            stacklevel=2,
        )


def _is_late(call: Call) -> bool:
    """Whether a call is later than its sampler's first timestep; with few steps, that too may be after an anchor."""
    scheduler = getattr(call.pipeline, "scheduler", None)
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or not len(timesteps):
        return False
    return training_time(float(timesteps[0]), scheduler) - call.timestep > 1e-3


class _Unknown(Exception):
    """Why the activations before the first step cannot be computed."""


def _missed(plan: SitePlan, grid, timestep: float) -> list[int]:
    """The anchors of a dictionary that are before a first step."""
    now = grid.coordinate(timestep)
    return [anchor for g, anchor in enumerate(plan.sae.config.anchors) if now - g > _NEAR]


class _Past:
    """Calls a denoiser with other noisy latents, and keeps the activations of some sites."""

    def __init__(self, call: Call, sites: list[str]):
        self.call, self.sites, self.activations, self.tap = call, list(dict.fromkeys(sites)), {}, Tap(self)

    def begin(self, call: Call, arguments: Arguments) -> None:
        """The denoiser is called."""

    def site(
        self, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> None:
        """A site was run."""
        self.activations[name] = block, block_input, hidden_states

    @torch.no_grad()
    def run(self, arguments: Arguments, call: tuple[tuple, dict] | None = None):
        """Call the denoiser, with these arguments or with `call` instead of them, and return its output."""
        args, kwargs = (arguments.args, arguments.kwargs) if call is None else call
        with self.tap.watching({"": self.denoiser}, self.sites), self.tap.alone(self.call):
            return self.denoiser(*args, **kwargs)

    def tokens(self, plan: SitePlan, call: Call, part) -> tuple[torch.Tensor, object]:
        """The activation of a part that a plan's dictionary reads, `(B, N, d)`, and its token grid."""
        block, block_input, hidden_states = self.activations[plan.sae.config.site]
        batch = block.batch(hidden_states)
        index = block.rows(hidden_states, part.rows(batch))
        size = token_grid(call, plan.sae.config.site, batch, block.space(hidden_states))
        return block.activation(plan.sae.config.activation, block_input[index], hidden_states[index]), size


def _earlier(call: Call, arguments: Arguments, tap: Tap, anchors: list[int], past: _Past):
    """Yield each anchor with the arguments for a call of the denoiser at it."""
    past.denoiser, sample, scheduler = tap.last.denoiser(), arguments.sample, getattr(call.pipeline, "scheduler", None)
    if past.denoiser is None:
        raise _Unknown("the denoiser is compiled as a whole")
    if getattr(past.denoiser, "is_cache_enabled", False):
        raise _Unknown("a block cache would keep what belongs to other steps")
    if not torch.is_tensor(sample) or scheduler is None:
        raise _Unknown("its latents come as a list")
    time_at, clean = _time_converter(arguments, call.timestep), given_picture(call, sample)
    keep, add = shares(call.alphas_cumprod, call.timestep)
    if clean is not None:
        channels = clean.shape[1]
        noise = (sample[:, :channels].float() - keep * clean) / max(add, 1e-4)
    else:
        prediction = past.run(arguments)
        prediction = prediction[0] if isinstance(prediction, tuple) else prediction.sample
        channels = min(
            sample.shape[1], prediction.shape[1]
        )  # the sample may have more channels, of masks and pictures
        if sample.ndim == 3 and sample.shape != prediction.shape or channels != sample.shape[1] and sample.ndim < 4:
            raise _Unknown("there are other tokens beside those that are denoised")
        noisy, prediction = sample[:, :channels].float(), prediction[:, :channels].float()
        unmixed = unmix(noisy, prediction, call.alphas_cumprod, call.timestep, scheduler)
        if unmixed is None:
            raise _Unknown(f"what is predicted with {type(scheduler).__name__} is not known")
        clean, noise = unmixed
    for anchor in anchors:
        keep, add = shares(call.alphas_cumprod, anchor)
        mixed = (keep * clean + add * noise).to(sample.dtype)
        args, kwargs = arguments.with_sample(torch.cat([mixed, sample[:, channels:]], 1))
        moved = Arguments(arguments.names, args, kwargs, arguments.channels)
        yield anchor, moved.with_timestep(time_at(anchor))


@torch.no_grad()
def given_picture(call: Call, sample: torch.Tensor) -> torch.Tensor | None:
    """
    The latents of the picture that a generation starts from, for each row of the sample. `None` if no picture is
    given, or the first latents were not made of it.
    """
    latents, vae = call.given_latents, getattr(call.pipeline, "vae", None)
    if latents is None:
        return None
    if latents.ndim == sample.ndim == 4 and latents.shape[-2:] != sample.shape[-2:] and vae is not None:  # pixels
        encoded = vae.encode(latents.to(vae.device, vae.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        latents = (latents - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor
    if latents.shape[2:] != sample.shape[2:] or latents.shape[1] > sample.shape[1] or len(sample) % len(latents):
        return None
    clean = latents.to(sample.device, torch.float32)
    clean = clean.repeat_interleave(max(call.images // len(clean), 1), 0)
    clean = clean.repeat(len(sample) // len(clean), *(1 for _ in clean.shape[1:]))
    keep, add = shares(call.alphas_cumprod, call.timestep)
    noise = (sample[:, : clean.shape[1]].float() - keep * clean) / max(add, 1e-4)
    return (
        clean if 0.8 < float(noise.std()) < 1.25 else None
    )  # if it was made of this picture, the rest is noise of unit variance


def _time_converter(arguments: Arguments, timestep: float):
    """A function from a timestep in training units to the value that the denoiser takes for it, found from the value
    that it was called with at `timestep`."""
    now = arguments.timestep
    if now is None:
        raise _Unknown("the denoiser takes no timestep")
    first = float(now.flatten()[0]) if torch.is_tensor(now) else float(now)
    if torch.is_tensor(now) and now.numel() > 1 and not bool((now == now.flatten()[0]).all()):
        raise _Unknown("its tokens have different timesteps")
    for unit in (1.0, 1000.0):
        if abs(first * unit - timestep) < 1.0 / unit + 1e-3 * timestep:
            return lambda t: torch.full_like(now, t / unit) if torch.is_tensor(now) else type(now)(t / unit)
    raise _Unknown(f"the denoiser is called with {first:.4g} for this timestep")
