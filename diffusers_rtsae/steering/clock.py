"""The clock: at which point of which generation a denoiser call is, and which rows of its batch are conditional."""

from __future__ import annotations

import weakref

import torch


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
    Follows the calls of one denoiser.

    A new generation begins when a watched pipeline's scheduler has a new `timesteps` object, when the shape of the
    sample changes, or when time jumps back to the beginning; `generation` counts them.
    """

    def __init__(self):
        self._pipelines: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self.restart()

    def restart(self) -> None:
        """Forget the running generation."""
        self.generation = 0
        self.timestep: float | None = None
        self._first: float | None = None
        self.sample: torch.Tensor | None = None
        self.text: torch.Tensor | None = None
        self._current = None
        self._shape = None

    def watch(self, pipeline) -> None:
        """Read schedule and guidance from this pipeline."""
        self._pipelines.setdefault(pipeline, None)

    def tick_call(self, args: tuple, kwargs: dict) -> None:
        """Take note of a denoiser call by its arguments."""
        sample = args[0] if args else kwargs["sample"] if "sample" in kwargs else kwargs["hidden_states"]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        self.tick(sample, timestep, args[2] if len(args) > 2 else kwargs.get("encoder_hidden_states"))

    def tick(self, sample: torch.Tensor, timestep, text: torch.Tensor | None) -> None:
        """Take note of a denoiser call."""
        timestep = float(timestep.flatten()[0]) if torch.is_tensor(timestep) else float(timestep)
        is_new = self.timestep is None or (timestep > self.timestep and timestep >= self._first)
        for pipeline, seen in list(self._pipelines.items()):
            timesteps = getattr(pipeline.scheduler, "timesteps", None)
            if timesteps is not seen:
                self._pipelines[pipeline] = timesteps
                self._current = weakref.ref(pipeline)
                is_new = True
        self.sample, self.text, self.timestep = sample, text, timestep
        shape = (self.conditional_rows(len(sample)).stop - self.conditional_rows(len(sample)).start, *sample.shape[1:])
        if is_new or shape != self._shape:
            self.generation += 1
            self._first, self._shape = timestep, shape

    def conditional_rows(self, batch_size: int) -> slice:
        """Rows of the text-conditional part of the batch; all of it without classifier-free guidance."""
        pipeline = self._current() if self._current is not None else None
        if pipeline is not None and getattr(pipeline, "do_classifier_free_guidance", False) and batch_size % 2 == 0:
            return slice(batch_size // 2, batch_size)
        return slice(0, batch_size)

    def __getstate__(self):
        return {}  # pipelines and activations do not travel with a copied denoiser

    def __setstate__(self, state):
        self.__init__()
