"""The clock: at which point of which generation a denoiser call is, and which rows of its batch are conditional."""

from __future__ import annotations

import sys

import torch
from diffusers import DiffusionPipeline


class TimeGrid:
    """
    Places any sampler's timesteps among a dictionary's anchors, on the log-SNR axis.

    Args:
        anchors (`list[int]`): training timesteps, descending.
        alphas_cumprod (`torch.Tensor`, *optional*): of the base model's training schedule; linear in time without it.
    """

    def __init__(self, anchors: list[int], alphas_cumprod: torch.Tensor | None):
        self._axis = None
        if alphas_cumprod is not None:
            alphas = alphas_cumprod.double().cpu().clamp(1e-9, 1 - 1e-9)
            self._axis = (alphas / (1 - alphas)).log().tolist()
        self._anchors = [self._position(t) for t in anchors]

    def _position(self, timestep: float) -> float:
        if self._axis is None:
            return -timestep
        timestep = min(max(timestep, 0.0), len(self._axis) - 1.0)
        low = int(timestep)
        high = min(low + 1, len(self._axis) - 1)
        return self._axis[low] + (timestep - low) * (self._axis[high] - self._axis[low])

    def coordinate(self, timestep: float) -> float:
        """Where `timestep` is in units of anchors: 0 at the first, G − 1 at the last, clamped to these."""
        position, anchors = self._position(timestep), self._anchors
        for g in range(len(anchors) - 1):
            if position < anchors[g + 1]:
                return g + max(0.0, (position - anchors[g]) / (anchors[g + 1] - anchors[g]))
        return len(anchors) - 1.0


class Clock:
    """
    Follows the calls of one denoiser: `timestep`, `generation` (a running number), and which rows are conditional.

    The pipeline that is calling is found on the call stack. It knows what the batch does not say: how many prompts and
    images there are, whether guidance is on at this very step, and, by a new `scheduler.timesteps`, that a generation
    begins. Without a pipeline the whole batch counts as conditional, and a new generation begins when time jumps back
    to the beginning. Another shape of the sample always begins one.
    """

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """Forget the running generation."""
        self.generation = 0
        self.timestep: float | None = None
        self.sample_shape: tuple[int, ...] = ()
        self.prompts: int | None = None
        self._guided = False
        self._first: float | None = None
        self._timesteps = None

    def tick(self, args: tuple, kwargs: dict) -> None:
        """Take note of a denoiser call by its arguments."""
        sample = args[0] if args else kwargs["sample"] if "sample" in kwargs else kwargs["hidden_states"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        timestep = float(timestep.flatten()[0]) if torch.is_tensor(timestep) else float(timestep)
        pipeline, call = running_pipeline()
        timesteps = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
        is_new = timesteps is not self._timesteps
        if pipeline is None:
            is_new = self.timestep is None or (timestep > self.timestep and timestep >= self._first)
        self._timesteps, self.timestep = timesteps, timestep
        guided = call.get("do_classifier_free_guidance", False)
        self._guided = bool(getattr(pipeline, "do_classifier_free_guidance", guided))
        self.prompts = call.get("batch_size")
        streams = 2 if self._guided else 1
        images = len(sample) // streams
        if isinstance(self.prompts, int):
            images = self.prompts * call.get("num_images_per_prompt", 1)
        if len(sample) != images * streams:
            raise ValueError(
                f"{type(pipeline).__name__} calls the denoiser with {len(sample)} rows for {images} images: "
                "this layout of guidance is not supported."
            )
        shape = (images, *sample.shape[1:])
        if is_new or shape != self.sample_shape:
            self.generation += 1
            self._first, self.sample_shape = timestep, shape

    def conditional_rows(self, batch_size: int) -> slice:
        """Rows of the text-conditional part of the batch, which comes last; all of it without guidance."""
        return slice(batch_size // 2 if self._guided else 0, batch_size)


def running_pipeline() -> tuple[DiffusionPipeline | None, dict]:
    """The innermost pipeline whose `__call__` is on the stack, and the local variables of that call."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and isinstance(frame.f_locals.get("self"), DiffusionPipeline):
            return frame.f_locals["self"], frame.f_locals
        frame = frame.f_back
    return None, {}
