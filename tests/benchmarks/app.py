"""From a click to its picture: the clock from a changed strength, or another seed, until Chromium shows the picture,
beside one picture drawn by the pipeline alone, 20 steps each."""

from __future__ import annotations

import itertools
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from .timing import rows, take_turns

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT, STEPS, GUIDANCE = "a large heart in the centre, flat, on white", 20, 3.0
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

    def drawn(*pictures: dict[str, float]) -> float:
        started = time.perf_counter()
        for features in pictures:
            made.studio.run(picture, features)
        return time.perf_counter() - started

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        tab = browser.new_page(viewport={"width": 1280, "height": 1100})
        tab.goto(made.local_url)
        tab.wait_for_selector("#steered img")

        def clicked(selector: str, value: str) -> float:
            tab.wait_for_timeout(500)  # what came before is over
            before = tab.evaluate(PICTURE)
            started = time.perf_counter()
            tab.fill(selector, value)
            tab.wait_for_function(
                f"before => {PICTURE} !== before && document.querySelector('#steered img').complete", arg=before
            )
            return time.perf_counter() - started

        one = {
            "one picture, by the pipeline": lambda: drawn({"red": 1}),
            "another strength": lambda: clicked("#strength-0 input[type=number]", f"{next(strengths) / 50:g}"),
        }
        both = {
            "one picture, by the pipeline": lambda: drawn({"red": 1}),
            "another seed: without and with": lambda: clicked("#seed input", str(next(seeds))),
        }
        found = [line for contenders in (one, both) for line in rows(take_turns(contenders, budget / 2, 10))]
        browser.close()
    made.close()
    return found
