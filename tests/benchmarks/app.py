"""From a click to its picture: from a changed strength, or another seed, until Chromium shows the picture, beside one
picture drawn by the pipeline alone, 20 steps each. First what the app's process computes, then by the clock, which has
the browser's part too, and whatever else the machine does."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from .timing import rows, take_turns

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT, STEPS, GUIDANCE = "a large heart in the centre, flat, on white", 20, 3.0
STRENGTH = "#strength-0 input[type=number]"
PICTURE = "document.querySelector('#steered img')?.getAttribute('src')"


def measure(budget: float) -> list[dict]:
    from playwright.sync_api import sync_playwright

    from diffusers_rtsae.app import build, launch

    def loaded() -> StableDiffusionPipeline:
        pipe = StableDiffusionPipeline.from_pretrained(EXAMPLES / "shapes-sd")
        pipe.load_rtsae(EXAMPLES / "shapes-rtsae")
        return pipe

    thread = ThreadPoolExecutor(1)  # as the command does it
    pipe = thread.submit(loaded).result()
    made = build(pipe, "examples/shapes-sd", "examples/shapes-rtsae", [PROMPT], STEPS, GUIDANCE, "red", thread)
    launch(made, None, False, prevent_thread_lock=True, quiet=True)
    strengths, seeds = itertools.count(1), itertools.count(1)

    def picture(features: dict[str, float]) -> None:
        with pipe.rtsae_steering(features):
            generator = torch.Generator().manual_seed(0)
            pipe(PROMPT, generator=generator, num_inference_steps=STEPS, guidance_scale=GUIDANCE)

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        tab = browser.new_page(viewport={"width": 1280, "height": 1100})
        tab.goto(made.local_url)
        tab.wait_for_selector("#steered img")

        def drawn(now: Callable[[], float]) -> float:
            started = now()
            made.studio.run(picture, {"red": 1})
            return now() - started

        def clicked(now: Callable[[], float], selector: str, value: str) -> float:
            tab.wait_for_timeout(500)  # what came before is over
            before = tab.evaluate(PICTURE)
            started = now()
            tab.fill(selector, value)
            tab.wait_for_function(
                f"before => {PICTURE} !== before && document.querySelector('#steered img').complete", arg=before
            )
            return now() - started

        found = []
        for now, how in ((time.process_time, ""), (time.perf_counter, ", by the clock")):
            one = {
                f"one picture, by the pipeline{how}": lambda now=now: drawn(now),
                f"another strength{how}": lambda now=now: clicked(now, STRENGTH, f"{next(strengths) / 50:g}"),
                f"another seed, without and with{how}": lambda now=now: clicked(now, "#seed input", str(next(seeds))),
            }
            found += rows(take_turns(one, budget / 2, 10))
        browser.close()
    made.close()
    return found
