"""
Reading from the middle: what a trajectory would have been before its first step.

Image-to-image, inpainting and refiners begin in the middle of denoising, where the code of an RTSAE, which is that of
a whole trajectory, lacks its first anchors. The denoiser is asked then. The picture that is given, or else the
denoiser's own prediction at the first step, says of what picture and what noise the first latents are made; mixed for
an earlier anchor and shown to the denoiser they give the activations there. That is one call for each anchor that was
missed, and one for the prediction, once in a generation.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from ..denoiser import Arguments, Block, Call, Tap, token_grid, training_time
from .plan import SitePlan

if TYPE_CHECKING:
    from .controller import _Run

_NEAR = 0.1  # anchors; a first step this close to an anchor stands for it, as it does for the reader


def catch_up(run: _Run, call: Call, arguments: Arguments, tap: Tap) -> None:
    """
    Have the memories of a generation know the anchors before its first step.

    Args:
        run: what is remembered of the generation, with the plans that act.
        arguments (`Arguments`): of this call, the first one.
        tap (`Tap`): that tells of it.
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
            past.show(arguments, noisy)
            for plan, state, part, missed in late:
                if anchor in missed:
                    tokens, size = past.tokens(plan, call, part)
                    plan.recall(state, part.branch, tokens, anchor, size)
    except _Unknown as reason:
        warnings.warn(
            f"This generation begins at t = {call.timestep:.0f}, after the anchors {anchors} of its dictionary, and "
            f"what was there is not known as {reason}: latents are read as if the first step were the first anchor.",
            stacklevel=2,
        )


def _is_late(call: Call) -> bool:
    """Whether a call is after the beginning of its sampler's schedule; few steps from pure noise are not."""
    scheduler = getattr(call.pipeline, "scheduler", None)
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or not len(timesteps):
        return False
    return training_time(float(timesteps[0]), scheduler) - call.timestep > 1e-3


class _Unknown(Exception):
    """Why the past cannot be made up."""


def _missed(plan: SitePlan, grid, timestep: float) -> list[int]:
    """Anchors of a dictionary before a first step."""
    now = grid.coordinate(timestep)
    return [anchor for g, anchor in enumerate(plan.sae.config.anchors) if now - g > _NEAR]


class _Past:
    """Shows noisy latents to a denoiser, and keeps what sites do."""

    def __init__(self, call: Call, sites: list[str]):
        self.call, self.sites, self.seen, self.tap = call, list(dict.fromkeys(sites)), {}, Tap(self)

    def begin(self, call: Call, arguments: Arguments) -> None:
        """The denoiser is called."""

    def site(
        self, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> None:
        """A site was run."""
        self.seen[name] = block, block_input, hidden_states

    @torch.no_grad()
    def show(self, arguments: Arguments, call: tuple[tuple, dict] | None = None):
        """What the denoiser returns."""
        args, kwargs = (arguments.args, arguments.kwargs) if call is None else call
        with self.tap.watching({"": self.denoiser}, self.sites), self.tap.alone(self.call):
            return self.denoiser(*args, **kwargs)

    def tokens(self, plan: SitePlan, call: Call, part) -> tuple[torch.Tensor, object]:
        """The activation that a plan's dictionary is about, of a part, and its grid."""
        block, block_input, hidden_states = self.seen[plan.sae.config.site]
        batch = block.batch(hidden_states)
        index = block.rows(hidden_states, part.rows(batch))
        size = token_grid(call, plan.sae.config.site, batch, block.space(hidden_states))
        return block.activation(plan.sae.config.activation, block_input[index], hidden_states[index]), size


def _earlier(call: Call, arguments: Arguments, tap: Tap, anchors: list[int], past: _Past):
    """For each anchor, the arguments of a call there."""
    past.denoiser, sample, scheduler = tap.last.denoiser(), arguments.sample, getattr(call.pipeline, "scheduler", None)
    if past.denoiser is None:
        raise _Unknown("the denoiser is compiled as a whole")
    if getattr(past.denoiser, "is_cache_enabled", False):
        raise _Unknown("a block cache must not be shown other steps")
    if not torch.is_tensor(sample) or scheduler is None:
        raise _Unknown("its latents come as a list")
    told, clean = _told(arguments, call.timestep), given_picture(call, sample)
    keep, add = _shares(call, call.timestep)
    if clean is not None:
        channels = clean.shape[1]
        noise = (sample[:, :channels].float() - keep * clean) / max(add, 1e-4)
    else:
        prediction = past.show(arguments)
        prediction = prediction[0] if isinstance(prediction, tuple) else prediction.sample
        channels = min(sample.shape[1], prediction.shape[1])  # masks and pictures may be beside the latents
        if sample.ndim == 3 and sample.shape != prediction.shape or channels != sample.shape[1] and sample.ndim < 4:
            raise _Unknown("there are other tokens beside those that are denoised")
        noisy, prediction = sample[:, :channels].float(), prediction[:, :channels].float()
        clean, noise = _unmixed(noisy, prediction, call, scheduler)
    for anchor in anchors:
        keep, add = _shares(call, anchor)
        mixed = (keep * clean + add * noise).to(sample.dtype)
        args, kwargs = arguments.with_sample(torch.cat([mixed, sample[:, channels:]], 1))
        moved = Arguments(arguments.names, args, kwargs, arguments.channels)
        yield anchor, moved.with_timestep(told(anchor))


@torch.no_grad()
def given_picture(call: Call, sample: torch.Tensor) -> torch.Tensor | None:
    """
    The latents of the picture that a generation starts from, for each row of the sample; `None` if none is given, or
    what is given is not what the first latents were made of.
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
    keep, add = _shares(call, call.timestep)
    noise = (sample[:, : clean.shape[1]].float() - keep * clean) / max(add, 1e-4)
    return clean if 0.8 < float(noise.std()) < 1.25 else None  # noise has a spread of one


def _told(arguments: Arguments, timestep: float):
    """What the denoiser is told instead of a timestep, in the form it was told this one."""
    now = arguments.timestep
    if now is None:
        raise _Unknown("the denoiser is told no time")
    first = float(now.flatten()[0]) if torch.is_tensor(now) else float(now)
    if torch.is_tensor(now) and now.numel() > 1 and not bool((now == now.flatten()[0]).all()):
        raise _Unknown("its tokens have times of their own")
    for unit in (1.0, 1000.0):
        if abs(first * unit - timestep) < 1.0 / unit + 1e-3 * timestep:
            return lambda t: torch.full_like(now, t / unit) if torch.is_tensor(now) else type(now)(t / unit)
    raise _Unknown(f"the denoiser is told {first:.4g} for this time")


def _shares(call: Call, timestep: float) -> tuple[float, float]:
    """What of the picture and of the noise noisy latents are made of at a time."""
    if call.alphas_cumprod is None:
        return 1 - timestep / 1000, timestep / 1000
    index = min(round(timestep * len(call.alphas_cumprod) / 1000), len(call.alphas_cumprod) - 1)
    alpha = float(call.alphas_cumprod[index])
    return alpha**0.5, (1 - alpha) ** 0.5


def _unmixed(
    noisy: torch.Tensor, prediction: torch.Tensor, call: Call, scheduler
) -> tuple[torch.Tensor, torch.Tensor]:
    """The picture and the noise that a prediction sees in noisy latents."""
    keep, add = _shares(call, call.timestep)
    kind = scheduler.config.get("prediction_type", "epsilon")
    if call.alphas_cumprod is None:
        if not type(scheduler).__name__.startswith("FlowMatch") and kind != "flow_prediction":
            raise _Unknown(f"what {type(scheduler).__name__} predicts is not known")
        return noisy - add * prediction, noisy + keep * prediction
    if kind == "epsilon":
        return (noisy - add * prediction) / max(keep, 1e-4), prediction
    if kind == "v_prediction":
        return keep * noisy - add * prediction, add * noisy + keep * prediction
    if kind == "sample":
        return prediction, (noisy - keep * prediction) / max(add, 1e-4)
    raise _Unknown(f"a prediction of {kind!r} is not known")
