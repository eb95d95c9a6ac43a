"""The clock: at which point of which generation a denoiser call is, and which rows of its batch are what."""

from __future__ import annotations

import sys

import torch

from ..models import Step

PIPELINES: list[type] = []  # the classes whose calls are looked for


def noise_schedule(scheduler) -> torch.Tensor | None:
    """`alphas_cumprod` of the schedule that a model was trained on; `None` for flow matching, of which some schedulers
    keep a schedule that they do not use."""
    if scheduler is None or scheduler.config.get("prediction_type") == "flow_prediction":
        return None
    return getattr(scheduler, "alphas_cumprod", None)


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

    def step(self, timestep: float, size: tuple[int, int] | None = None, guidance: float | None = None) -> Step:
        """A step as dictionaries read it, at a site with a token grid of this `size`."""
        return Step(timestep, self.coordinate(timestep), size, guidance)


class Clock:
    """
    Follows the calls of one denoiser: `timestep` (in training units), `generation` (a running number), `images` and
    `prompts` being drawn, and `streams`, what the equal parts of the batch are: `"cond"`, `"uncond"` or `"perturbed"`
    (conditional, but deliberately made worse, to guide away from it).

    The pipeline that is calling is found on the call stack. It knows what the batch does not say: how many prompts and
    images there are, which guidance is on at this very step, and the noise schedule, `alphas_cumprod`. Without a
    pipeline the whole batch counts as conditional. It tells the scale of `guidance` too.

    A new generation begins with a new call of a pipeline, when time jumps back to the beginning, and with another
    number or size of images. The scheduler is no witness: threads that share a pipeline share it.
    """

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        """Forget the running generation."""
        self.generation = 0
        self.timestep: float | None = None
        self.images = 0
        self.prompts: int | None = None
        self.latent_size: tuple[int, int] = (0, 0)
        self.streams: tuple[str, ...] = ("cond",)
        self.pipeline_calls = False
        self.alphas_cumprod: torch.Tensor | None = None
        self.guidance: float | None = None
        self._shape: tuple[int, ...] = ()
        self._first: float | None = None
        self._call, self._unit = None, 1

    def tick(self, sample: torch.Tensor, timestep: float | torch.Tensor, text: torch.Tensor | None = None) -> None:
        """Take note of a denoiser call by its arguments; see `call_arguments`."""
        pipeline, call = running_pipeline()
        scheduler = getattr(pipeline, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        timestep = float(timestep.flatten()[0]) if torch.is_tensor(timestep) else float(timestep)
        is_new = self.timestep is None or call.get(_CALL) is not self._call
        if is_new and timesteps is not None:
            self._unit = _time_unit(scheduler)
        timestep *= self._unit if timesteps is not None else 1
        if self._unit == 1 and 0 <= timestep <= 1 and timesteps is not None and timestep not in timesteps:
            timestep *= 1000  # the sampler counts in training steps, the denoiser from 0 to 1
        is_new = is_new or (timestep > self.timestep and timestep >= self._first)
        self.pipeline_calls, self._call = pipeline is not None, call.get(_CALL)
        self.alphas_cumprod = noise_schedule(scheduler)
        guidance = call.get("guidance_scale")
        self.guidance = float(guidance) if isinstance(guidance, int | float) else None
        self.prompts = call.get("batch_size")
        images = None
        if isinstance(self.prompts, int):
            images = self.prompts * (call.get("num_images_per_prompt") or 1)
        again = not is_new and timestep == self.timestep
        self.timestep = timestep
        self.streams = _streams(pipeline, call, len(sample), images, text, again)
        self.images = len(sample) // len(self.streams)
        if sample.ndim == 4:
            self.latent_size = tuple(sample.shape[-2:])
        else:  # packed tokens do not say their height and width, the pipeline's call does
            self.latent_size = (call.get("height") or 0, call.get("width") or 0)
        shape = (self.images, *sample.shape[1:])
        if is_new or shape != self._shape:
            self.generation += 1
            self._first, self._shape = timestep, shape

    def rows(self, batch_size: int) -> list[tuple[str, slice]]:
        """Each stream with its rows in a batch; a cache may leave all but the conditional ones out."""
        if batch_size == self.images and "cond" in self.streams:
            return [("cond", slice(0, batch_size))]
        part = batch_size // len(self.streams)
        return [(stream, slice(i * part, (i + 1) * part)) for i, stream in enumerate(self.streams)]


def _time_unit(scheduler) -> int:
    """Training steps in one unit of a scheduler's time; raises `ValueError` if it counts in noise levels instead."""
    timesteps, config, name = scheduler.timesteps, getattr(scheduler, "config", {}), type(scheduler).__name__
    if "sigma_data" in config or config.get("timestep_type") == "continuous":
        raise ValueError(f"{name} counts time in noise levels, not in training steps: it cannot be followed.")
    if timesteps.min() < -1 or timesteps.max() > 1001:
        raise ValueError(
            f"{name} calls with timesteps from {timesteps.max():.4g} to {timesteps.min():.4g}, expected 0 to 1000: a "
            "sampler that counts time in another unit cannot be followed."
        )
    return 1000 if 0 <= timesteps.min() and timesteps.max() <= 1 else 1  # some count time from 0 to 1


def _streams(pipeline, call: dict, rows: int, images: int | None, text, again: bool) -> tuple[str, ...]:
    """What the equal parts of a batch of `rows` are."""
    if pipeline is None:
        return ("cond",)
    guider_batch = call.get("guider_state_batch")  # modular pipelines call once for each
    if guider_batch is not None:
        kind = getattr(guider_batch, "__guidance_identifier__", "pred_cond")
        return ({"pred_cond": "cond", "pred_uncond": "uncond"}.get(kind, "perturbed"),)
    negative = call.get("negative_prompt_embeds")
    if text is not None and negative is not None and text.data_ptr() == negative.data_ptr() and len(text) == rows:
        return ("uncond",)  # true guidance of distilled models: a call of its own
    guided = bool(getattr(pipeline, "do_classifier_free_guidance", call.get("do_classifier_free_guidance", False)))
    perturbed = bool(getattr(pipeline, "do_perturbed_attention_guidance", False))
    streams = ("uncond",) * guided + ("cond",) + ("perturbed",) * perturbed
    if guided and "InstructPix2Pix" in type(pipeline).__name__:
        streams = ("cond", "uncond", "uncond")
    if guided and again and rows == images:  # skip-layer guidance: once more, worse
        streams = ("perturbed",)
    if images is not None and rows != images * len(streams) or rows % len(streams):
        raise ValueError(
            f"{type(pipeline).__name__} calls the denoiser with {rows} rows for {images or 'unknown'} images: this "
            f"layout of guidance is not supported; expected {' + '.join(streams)}."
        )
    return streams


def call_arguments(args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor | float, torch.Tensor | None]:
    """Sample, timestep and text of a denoiser call, however they were passed."""
    sample = args[0] if args else kwargs["sample"] if "sample" in kwargs else kwargs["hidden_states"]
    timestep = args[1] if len(args) > 1 and "timestep" not in kwargs else kwargs["timestep"]
    return sample, timestep, kwargs.get("encoder_hidden_states")


_CALL = "__rtsae_call__"  # among the local variables of a pipeline's call: an object of its own


def running_pipeline() -> tuple[object | None, dict]:
    """The innermost pipeline whose `__call__` is on the stack, and the local variables of that call."""
    frame, step = sys._getframe(1), {}
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            local = frame.f_locals
            if isinstance(local.get("self"), tuple(PIPELINES)):
                local.setdefault(_CALL, object())  # stays with the frame, whose own id another call may get
                return local["self"], local | step
            if "guider_state_batch" in local:  # the denoising block of a modular pipeline
                state = local["block_state"]
                counts = {name: getattr(state, name, None) for name in ("batch_size", "num_images_per_prompt")}
                step = {"guider_state_batch": local["guider_state_batch"], **counts}
        frame = frame.f_back
    return None, {}
