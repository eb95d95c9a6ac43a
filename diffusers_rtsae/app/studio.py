"""Pictures for the page: one pipeline for everybody, that draws none twice and stops for a newer wish."""

from __future__ import annotations

import contextvars
import hashlib
import inspect
import math
import os
import tempfile
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..denoiser import get_denoiser
from ..files import whole
from ..pipeline import get_dictionary
from ..steering.operations import OPERATIONS

AGE = 3600  # seconds for which a picture's file is kept
_KEPT = 64  # wishes whose pictures are remembered
_SHOWN = 512  # pixels a small picture is enlarged to


class _Stopped(Exception):
    """What is being drawn is no longer wanted."""


@dataclass(frozen=True)
class Wish:
    """
    What to draw.

    Args:
        call (`dict`): what the pipeline is called with.
        seed (`int`): of the noise.
        features (`dict`), options (`dict`), mask (`np.ndarray`, *optional*): of `rtsae_steering`.
    """

    call: dict
    seed: int
    features: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    mask: np.ndarray | None = None

    @property
    def key(self) -> str:
        mask = None if self.mask is None else hashlib.sha256(self.mask.tobytes()).hexdigest()
        return repr((sorted(self.call.items()), self.seed, self.features, sorted(self.options.items()), mask))


def enlarged(image: Image.Image) -> Image.Image:
    """A small picture with larger pixels, so that a browser does not blur it."""
    times = max(1, _SHOWN // max(image.size))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def side_by_side(images: list[Image.Image], columns: int | None = None) -> Image.Image:
    """Pictures of one size as one, in a square or in so many columns."""
    columns = columns or math.ceil(len(images) ** 0.5)
    width, height = images[0].size
    sheet = Image.new("RGB", (width * columns, height * -(-len(images) // columns)), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


class Studio:
    """
    A pipeline with a dictionary, and the pictures it drew.

    Args:
        pipe (`DiffusionPipeline`): with a dictionary loaded.
        thread (`ThreadPoolExecutor`, *optional*): of one thread, which loaded it; a new one by default.
    """

    def __init__(self, pipe, thread: ThreadPoolExecutor | None = None):
        self.pipe, self.dictionary = pipe, get_dictionary(pipe)
        self.parameters = inspect.signature(pipe.__call__).parameters
        self.folder = tempfile.TemporaryDirectory(prefix="diffusers-rtsae-app-")  # lives as long as the page does
        self.thread = thread or ThreadPoolExecutor(1)  # one, however many people
        self.wishes: Counter[str] = Counter()  # how many each person had
        self._drawn: OrderedDict[str, tuple[list[Image.Image], float | None]] = OrderedDict()
        pipe.set_progress_bar_config(disable=True)

    def run(self, work: Callable, *arguments, **options):
        """
        Call `work` in the thread that does all with the pipeline, and wait for it.

        Pictures must not be drawn at the same time, and not by turns in several threads either: each would have
        OpenMP threads of its own, together more than there are cores, which made a picture take thrice as long.
        """
        context = contextvars.copy_context()  # by which gradio knows whose progress it is
        return self.thread.submit(context.run, work, *arguments, **options).result()

    def forget(self) -> None:
        """A label means something else now."""
        self._drawn.clear()

    def draw(
        self, wish: Wish, on_step: Callable[[int, int], None], wanted: Callable[[], bool] = lambda: True
    ) -> tuple[list[Image.Image], float | None] | None:
        """
        The pictures of a wish, and the share of the tokens that its features changed (`None` if it has none); `None`
        if it was no longer wanted.

        Args:
            on_step (`Callable`): is told how many steps are done, and of how many.
            wanted (`Callable`): asked at each step.
        """
        return self.run(self._draw, wish, on_step, wanted)

    def draw_both(
        self, wish: Wish, on_step: Callable[[int, int], None], wanted: Callable[[], bool] = lambda: True
    ) -> tuple[tuple[list[Image.Image], float | None], tuple[list[Image.Image], float | None]] | None:
        """The pictures of a wish without its features and with them, as [`draw`] returns them; in one batch if neither
        was drawn before."""
        plain = Wish(wish.call, wish.seed)
        if wish.features and {plain.key, wish.key}.isdisjoint(self._drawn):
            self.run(self._draw_batch, plain, wish, on_step, wanted)
        drawn = self.draw(plain, on_step, wanted), self.draw(wish, on_step, wanted)
        return None if None in drawn else drawn

    def _call(self, call: dict, generator, on_step: Callable[[int, int], None], wanted: Callable[[], bool]):
        """What the pipeline draws; it stops after the step at which that is no longer wanted."""

        def after_step(pipe, step, timestep, tensors):
            on_step(step + 1, call["num_inference_steps"])
            pipe._interrupt = not wanted()  # as diffusers wants it to be stopped
            return tensors

        def after_old_step(step, timestep, latents):  # of pipelines that know no other callback, and no stopping
            on_step(step + 1, call["num_inference_steps"])
            if not wanted():
                raise _Stopped

        own = {"callback_on_step_end": after_step} if "callback_on_step_end" in self.parameters else {}
        if not own and "callback" in self.parameters:
            own = {"callback": after_old_step}
        try:
            return list(self.pipe(generator=generator, **own, **call).images)
        except _Stopped:
            return []

    def _share(self) -> float:
        """Of the tokens, that the last pictures' features changed."""
        return max((row["edited"] for rows in self.pipe.rtsae_report().values() for row in rows), default=0.0)

    def _draw(
        self, wish: Wish, on_step: Callable[[int, int], None], wanted: Callable[[], bool]
    ) -> tuple[list[Image.Image], float | None] | None:
        if wish.key not in self._drawn and wanted():
            with self.pipe.rtsae_steering(wish.features, mask=wish.mask, **wish.options):
                images = self._call(wish.call, torch.Generator().manual_seed(wish.seed), on_step, wanted)
                share = self._share() if wish.features else None
            if wanted():
                self._keep(wish, images, share)
        if wish.key in self._drawn:
            self._drawn.move_to_end(wish.key)
        return self._drawn.get(wish.key)

    def _draw_batch(
        self, plain: Wish, wish: Wish, on_step: Callable[[int, int], None], wanted: Callable[[], bool]
    ) -> None:
        """Draw and remember both, where one strength a prompt can leave the first prompt as it is."""
        neutral = {feature: self._neutral(feature, wish) for feature in wish.features}
        if None in neutral.values() or "num_images_per_prompt" in wish.call or not wanted():
            return
        call = {k: [v, v] if k in ("prompt", "negative_prompt") else v for k, v in wish.call.items()}
        generators = [torch.Generator().manual_seed(wish.seed) for _ in range(2)]
        strengths = {feature: [neutral[feature], strength] for feature, strength in wish.features.items()}
        with self.pipe.rtsae_steering(strengths, mask=wish.mask, **wish.options):
            images = self._call(call, generators, on_step, wanted)
            share = 2 * self._share()
        if wanted():
            self._keep(plain, images[:1], None)
            self._keep(wish, images[1:], share)

    def _neutral(self, feature, wish: Wish) -> float | None:
        """The strength at which a feature changes nothing, if there is one."""
        own = self.dictionary.features(feature)[1].get("operation", "add")
        return OPERATIONS[wish.options.get("operation", own)].neutral

    def _keep(self, wish: Wish, images: list[Image.Image], share: float | None) -> None:
        self._drawn[wish.key] = images, share
        while len(self._drawn) > _KEPT:
            self._drawn.popitem(last=False)

    @property
    def size(self) -> int | None:
        """Of the pictures that the model was made for, in pixels a side; `None` if it does not say."""
        config = get_denoiser(self.pipe).config
        own, scale = getattr(config, "sample_size", None), getattr(self.pipe, "vae_scale_factor", None)
        return own * scale if isinstance(own, int) and isinstance(scale, int) else None

    def file(self, image: Image.Image) -> str:
        """A file with a picture, enlarged. It is never written again: the browser may be reading it."""
        image, folder = enlarged(image), Path(self.folder.name)
        path = folder / f"{hashlib.sha256(image.tobytes() + repr(image.size).encode()).hexdigest()[:32]}.png"
        for old in folder.glob("*.png"):
            if old != path and time.time() - old.stat().st_mtime > AGE:
                old.unlink(missing_ok=True)
        if path.exists():
            os.utime(path)
        else:
            with whole(path, threading.get_ident()) as partial:
                image.save(partial, "PNG")
        return str(path)
