"""
The app, in a real browser. Nothing here waits for a time: a test waits for the very picture that the pipeline draws
with the settings it chose, or for what the page says.
"""

import ast
import contextlib
import io
import json
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from small_analysis import find_less, fit_less

gradio = pytest.importorskip("gradio", reason="the app extra is not installed")

from diffusers_rtsae import load_dictionary  # noqa: E402
from diffusers_rtsae.analysis.report import STRENGTHS  # noqa: E402
from diffusers_rtsae.app import build, events, launch  # noqa: E402
from diffusers_rtsae.app.layout import choices_of  # noqa: E402
from diffusers_rtsae.app.script import as_code  # noqa: E402
from diffusers_rtsae.app.studio import Studio, Wish, enlarged, side_by_side  # noqa: E402

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPT, OTHER = "a large heart in the centre, flat, on white", "a small star at the top, striped, on white"
CALL = {"num_inference_steps": 6, "guidance_scale": 3.0}


class App:
    """The page, and what it should show."""

    def __init__(self, pipe, made):
        self.pipe, self.studio, self.address = pipe, made.studio, made.local_url

    def images(self, features, prompt=PROMPT, seed=0, call=None, **options) -> list[Image.Image]:
        """What the pipeline draws; nothing that the page remembers."""

        def drawn():
            with self.pipe.rtsae_steering(features, **options):
                return self.pipe(prompt, generator=torch.Generator().manual_seed(seed), **CALL | (call or {})).images

        return self.studio.run(drawn)

    def sheet(self, *arguments, **options) -> np.ndarray:
        """As the page shows it, enlarged."""
        return np.asarray(enlarged(side_by_side(self.images(*arguments, **options))), dtype=int)


@pytest.fixture(scope="module")
def app():
    pipe = StableDiffusionPipeline.from_pretrained(EXAMPLES / "shapes-sd")
    dictionary = load_dictionary(EXAMPLES / "shapes-rtsae")
    dictionary.labels["late"] = dictionary.labels["red"] | {"edit": {"apply_to": "all", "start": 0.5}}
    pipe.load_rtsae(dictionary)
    sources = ("examples/shapes-sd", "examples/shapes-rtsae")
    made = build(pipe, *sources, [PROMPT, OTHER], CALL["num_inference_steps"], CALL["guidance_scale"], "red")
    launch(made, None, False, prevent_thread_lock=True, quiet=True)
    assert made.local_url.startswith("http://127.0.0.1:")
    yield App(pipe, made)
    made.close()


@pytest.fixture
def tab(browser, app):
    with opened(browser, app, 1280) as tab:
        yield tab


@contextlib.contextmanager
def opened(browser, app, width: int):
    tab = browser.new_page(viewport={"width": width, "height": 1100})
    tab.set_default_timeout(120_000)
    tab.foreign = []  # requests to anywhere but the app itself
    tab.on("request", lambda r: r.url.startswith((app.address, "data:", "blob:")) or tab.foreign.append(r.url))
    tab.goto(app.address)
    shows(tab, "steered", app.sheet({"red": 1}))  # it opens with a picture
    yield tab
    tab.close()


def shows(tab, name: str, sheet: np.ndarray) -> None:
    """Wait until the page shows this picture, whole. Alone and in a batch, a model draws the same but for rounding."""
    loaded = "all => all.filter(i => i.complete && i.naturalWidth).map(i => new URL(i.src).pathname)"

    def is_there() -> bool:
        files = [path.rpartition("file=")[2] for path in tab.eval_on_selector_all(f"#{name} img", loaded)]
        pictures = [np.asarray(Image.open(file).convert("RGB"), dtype=int) for file in files if Path(file).is_file()]
        return any(picture.shape == sheet.shape and abs(picture - sheet).max() <= 3 for picture in pictures)

    until(is_there)


def says(tab, message: str) -> None:
    tab.locator(".toast-body", has_text=message).first.wait_for()


def take(tab, typed: str, label: str | None = None) -> None:
    tab.click("#features input")
    tab.keyboard.type(typed)
    tab.keyboard.press("Enter")
    tab.wait_for_selector(f"label:has-text('{label or typed}') >> visible=true")
    tab.wait_for_selector("#features ul.options", state="detached")  # the list closes by itself


def leave(tab, label: str) -> None:
    tab.locator("#features .token", has_text=label).locator("[role=button], button").click()


def go(tab, name: str) -> None:
    """To a tab, which is in a menu where there is no room."""
    button = tab.get_by_role("tab", name=name, exact=True)
    if not button.is_visible():
        tab.locator(".overflow-menu > button").last.click()
        button = tab.locator(".overflow-dropdown button", has_text=re.compile(f"^{re.escape(name)}$"))
    button.click()


def slide(tab, number: int, strength: float) -> None:
    tab.fill(f"#strength-{number} input[type=number]", str(strength))


def shown_code(tab, part: str) -> str:
    """The code, once it has `part`."""
    go(tab, "Code")
    tab.wait_for_function("part => document.querySelector('#code .cm-content')?.innerText.includes(part)", arg=part)
    return tab.inner_text("#code .cm-content")


def colours(scorer, place: str, *images: Image.Image) -> list[str]:
    readings = scorer.read(torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2) / 255)
    return [reading[f"{place}.colour"] for reading in readings]


def test_move_the_slider_and_the_picture_turns_red(tab, app, scorer):
    (plain,), (red,) = app.images({}), app.images({"red": 1})
    before, after = colours(scorer, "centre", plain, red)
    assert before != "red" and after == "red"
    shows(tab, "plain", app.sheet({}))
    slide(tab, 0, 0.5)
    shows(tab, "steered", app.sheet({"red": 0.5}))
    slide(tab, 0, 0)
    shows(tab, "steered", app.sheet({}))
    tab.wait_for_selector("#status:has-text('at strength 0 nothing does')")
    code = shown_code(tab, "{'red': 0}")
    ast.parse(code)
    assert "load_rtsae('examples/shapes-rtsae')" in code and "manual_seed(0)" in code
    assert not tab.foreign


def test_enter_draws_and_so_does_an_example(tab, app):
    tab.fill("#prompt textarea", "a large star, flat, on black")
    tab.press("#prompt textarea", "Enter")
    shows(tab, "plain", app.sheet({}, "a large star, flat, on black"))
    assert tab.input_value("#prompt textarea") == "a large star, flat, on black"
    tab.get_by_text(OTHER).click()
    shows(tab, "plain", app.sheet({}, OTHER))
    shows(tab, "steered", app.sheet({"red": 1}, OTHER))
    tab.fill("#seed input", "7")
    shows(tab, "steered", app.sheet({"red": 1}, OTHER, 7))
    tab.get_by_role("tab", name="One over the other").click()
    shows(tab, "compared", app.sheet({}, OTHER, 7))
    go(tab, "History")
    tab.locator("#history button", has_text="red 1").last.click()  # the picture it opened with
    shows(tab, "steered", app.sheet({"red": 1}))
    assert tab.input_value("#prompt textarea") == PROMPT and tab.input_value("#seed input") == "0"


def test_a_part_of_a_name_takes_the_feature(tab, app):
    take(tab, "oran", "orange")
    shows(tab, "steered", app.sheet({"red": 1, "orange": 1}))
    take(tab, "12")
    shows(tab, "steered", app.sheet({"red": 1, "orange": 1, 12: 1}, apply_to="cond"))  # as the labels brought it
    tab.click("#features input")
    tab.keyboard.type("rde")
    tab.keyboard.press("Enter")
    says(tab, "Did you mean")


def blue(png: bytes) -> int:
    """How many pixels of a screenshot are blue."""
    red, _, blue = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int).transpose(2, 0, 1)
    return int((blue - red > 120).sum())


def test_what_is_painted_is_where_it_acts(tab, app, scorer):
    prompt = "a heart to the left of a blue star, flat, on white"
    leave(tab, "red")
    tab.fill("#prompt textarea", prompt)
    tab.press("#prompt textarea", "Enter")
    tab.fill("#seed input", "1")
    take(tab, "orange")
    shows(tab, "steered", app.sheet({"orange": 1}, prompt, 1))
    go(tab, "Where")
    canvas = tab.wait_for_selector("#canvas canvas")
    canvas.scroll_into_view_if_needed()
    until(lambda: blue(canvas.screenshot()) > 1000)  # the picture has come to the canvas
    sent = []
    tab.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    box = canvas.bounding_box()
    tab.locator("#canvas input[type=range]").fill("160")
    tab.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + 10)
    tab.mouse.down()
    for y in range(10, int(box["height"]) - 10, 20):
        tab.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + y)
    tab.mouse.up()  # one stroke is enough, and is sent once
    tab.wait_for_selector("#where:has-text('Features act on the painted 3')")
    assert sum("upload" in url for url in sent) == 0 and sent
    tab.wait_for_selector("#status:has-text('of the places on the model')")
    tab.get_by_role("button", name="Save mask.png").click()
    tab.get_by_text("Download mask.png").wait_for()
    mask = Image.open(Path(app.studio.folder.name, "mask.png"))
    values = np.asarray(mask)
    assert set(np.unique(values)) == {0, 255} and values[:, :150].mean() > 200 and values[:, 200:].max() == 0
    for seed in (1, 2):  # another picture comes to the canvas below what is painted
        tab.fill("#seed input", str(seed))
        shows(tab, "steered", app.sheet({"orange": 1}, prompt, seed, mask=mask))
        (plain,), (moved,) = app.images({}, prompt, seed), app.images({"orange": 1}, prompt, seed, mask=mask)
        left, right = (colours(scorer, place, plain, moved) for place in ("left", "right"))
        assert left[0] != "orange" and left[1] == "orange" and right[0] == right[1] != "orange"


def test_what_is_chosen_or_painted_is_removed(tab, app):
    leave(tab, "red")
    go(tab, "Where")
    tab.click("#remove")
    says(tab, "Paint over what is to go")
    take(tab, "heart")
    tab.click("#remove")
    erased = {"operation": "erase", "apply_to": "all"}
    shows(tab, "steered", app.sheet({"heart": 1}, **erased))
    canvas = tab.wait_for_selector("#canvas canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    tab.locator("#canvas input[type=range]").fill("160")
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2 + 20)
    tab.mouse.up()
    tab.wait_for_selector("#where:has-text('Features act on the painted')")
    tab.get_by_role("button", name="Save mask.png").click()
    tab.get_by_text("Download mask.png").wait_for()
    mask = Image.open(Path(app.studio.folder.name, "mask.png"))
    leave(tab, "heart")  # all that is painted goes, whatever is chosen
    shows(tab, "steered", app.sheet({0: 1}, **erased, where="everywhere", mask=mask))
    assert "where='everywhere'" in shown_code(tab, "operation='erase'")


def test_a_label_brings_the_options_it_was_verified_with(tab, app):
    take(tab, "late")
    leave(tab, "red")
    shows(tab, "steered", app.sheet({"late": 1}))
    go(tab, "Settings")
    tab.wait_for_function("document.querySelector('#start input[type=number]')?.value === '0.5'")
    assert tab.get_by_label("Guidance branch").input_value() == "all"
    shown_code(tab, "set_rtsae_features({'late': 1})")  # it does so by itself
    go(tab, "Settings")
    tab.fill("#start input[type=number]", "0.7")
    shows(tab, "steered", app.sheet({"late": 1}, start=0.7))


def test_what_is_missing_is_said(tab):
    go(tab, "When")
    leave(tab, "red")
    tab.wait_for_selector("#status:has-text('Choose a feature')")
    tab.get_by_role("button", name="Show").click()
    says(tab, "then see where it is active")
    go(tab, "Strengths")
    tab.get_by_role("button", name="Draw all strengths").click()
    says(tab, "then see what its strengths do")
    go(tab, "Where")
    tab.get_by_role("button", name="Save mask.png").click()
    says(tab, "Nothing is painted")
    go(tab, "Preset")
    tab.get_by_role("button", name="Write presets.json").click()
    says(tab, "a preset of none")
    go(tab, "Make a feature")
    tab.click("#make")
    says(tab, "needs a name")
    tab.fill("#new textarea", "red")
    tab.click("#make")
    says(tab, "There is a feature 'red' already")
    tab.fill("#new textarea", "other")
    tab.fill("#to textarea", "a red star")
    tab.click("#make")
    says(tab, "as many prompts with it as without, got 1 and 0")
    tab.fill("#seed input", "")
    says(tab, "The seed is empty")
    tab.fill("#prompt textarea", " ")
    tab.click("#generate")
    says(tab, "Say what to draw")


def test_stop_stops(tab, app):
    done = threading.Event()
    app.studio.thread.submit(done.wait)  # somebody else's picture is being drawn
    try:
        before = sum(app.studio.wishes.values())
        tab.fill("#prompt textarea", "a circle")
        tab.click("#generate")
        until(lambda: sum(app.studio.wishes.values()) == before + 1)
        until(lambda: app.studio.thread._work_queue.qsize() == 1)  # what was not begun cannot be stopped
        tab.click("#stop")
        until(lambda: sum(app.studio.wishes.values()) == before + 2)
    finally:
        done.set()
    tab.wait_for_selector("#status:has-text('Stopped.')")


def until(condition) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come true in two minutes")


def test_what_is_no_longer_wanted_is_not_drawn_to_its_end(app):
    steps, studio = [], Studio(app.pipe)
    wish = Wish({"prompt": PROMPT} | CALL, 0, {"red": 1.0})
    assert studio.draw(wish, lambda step, count: steps.append(step), lambda: len(steps) < 2) is None
    assert steps == [1, 2]
    images, share = studio.draw(wish, lambda step, count: None)
    assert share == 1 and (np.asarray(images[0]) == np.asarray(app.images({"red": 1})[0])).all()
    assert studio.draw(wish, lambda step, count: steps.append(step))[0] is images and len(steps) == 2  # none twice


def test_nothing_is_computed_twice(tab, app):
    """Another strength takes one picture's calls of the denoiser, another seed those of a batch of both pictures."""
    rows, steps = [], CALL["num_inference_steps"]
    changed, other, plain = app.sheet({"red": 0.3}), app.sheet({"red": 0.3}, seed=3), app.sheet({}, seed=3)
    hook = app.pipe.unet.register_forward_pre_hook(lambda unet, given: rows.append(len(given[0])))
    try:
        slide(tab, 0, 0.3)
        shows(tab, "steered", changed)
        assert rows == [2] * steps  # with and without guidance
        tab.fill("#seed input", "3")
        shows(tab, "steered", other)
        shows(tab, "plain", plain)
        assert rows == [2] * steps + [4] * steps
    finally:
        hook.remove()


def test_a_file_that_a_browser_may_be_reading_is_not_written_again(app):
    image = Image.new("RGB", (8, 8), "red")
    path = Path(app.studio.file(image))
    was, whole = path.stat().st_ino, path.read_bytes()
    with path.open("rb") as reading:
        assert Path(app.studio.file(image.copy())) == path and path.stat().st_ino == was
        assert reading.read() == whole
    assert Image.open(path).size == (512, 512) and not list(path.parent.glob("*.partial"))


def test_a_picture_of_every_feature_and_of_every_strength(tab, app, monkeypatch):
    monkeypatch.setattr(events, "LABELS", 2)
    go(tab, "All features")
    first, second = list(app.studio.dictionary.labels)[:2]
    shows(tab, "labels", app.sheet({second: 1}))
    tab.click(f"#labels img[alt='{first}']")
    tab.wait_for_selector(f"label:has-text('{first}') >> visible=true")
    shows(tab, "steered", app.sheet({"red": 1, first: 1}))
    go(tab, "Strengths")
    tab.get_by_role("button", name="Draw all strengths").click()
    for strength in (STRENGTHS[0], STRENGTHS[-1]):
        shows(tab, "strip", app.sheet({first: strength}))
    captions = tab.locator("#strip .caption-label").all_inner_texts()
    assert captions == ["−1", "0", "0.25", "0.5", "0.75", "1", "1.5", "2"]


def test_a_row_of_what_was_found_can_be_clicked(tab, app, monkeypatch):
    find_less(monkeypatch)
    go(tab, "Find")
    tab.fill("#with textarea", "a red star")
    tab.fill("#without textarea", "a blue star")
    tab.get_by_role("button", name="Find").click()
    row = tab.locator("#found [role=gridcell] >> visible=true").first
    row.wait_for()
    index = int(row.inner_text())
    row.click()
    tab.wait_for_selector(f"label:has-text('{index}') >> visible=true")
    shows(tab, "steered", app.sheet({"red": 1, index: 1}, apply_to="cond"))


def test_a_word_is_explained_and_what_carries_it_can_be_used(tab):
    go(tab, "Why")
    tab.click("#explain")
    says(tab, "Type a word of the prompt first")
    tab.fill("#word textarea, #word input", "heart")
    tab.click("#explain")
    tab.wait_for_selector("#ledger img")
    assert "in all 1.00" in tab.inner_text("#total") and "“a large in the centre" in tab.inner_text("#total")
    row = tab.locator("#carriers [role=gridcell] >> visible=true").first
    row.wait_for()
    index = row.inner_text()
    row.click()
    tab.wait_for_selector(f"label:has-text('{index}') >> visible=true")


def test_a_feature_is_made_of_two_prompts(tab, app, monkeypatch, tmp_path):
    fit_less(monkeypatch, pictures=3)
    go(tab, "Make a feature")
    tab.fill("#from textarea", "a large heart, flat, on white")
    tab.fill("#to textarea", "a large heart, flat, on black")
    tab.fill("#stay textarea", "a star on black")
    tab.fill("#new textarea", "night")
    tab.click("#make")
    tab.locator(".progress-text, .meta-text").first.wait_for()
    tab.wait_for_selector("#numbers:has-text('Ceiling')")
    told = tab.inner_text("#numbers")
    label = app.studio.dictionary.labels["night"]
    assert all(f"{label['measured'][key]:.2f}" in told for key in ("effect", "ceiling", "harm", "effect_away"))
    shows(tab, "steered", app.sheet({"red": 1, "night": 1}))
    for prompt in ("a large heart, flat", "a large heart, flat, on white"):  # leaves it open, and contradicts it
        for features in ({}, {"night": 1}):
            shows(tab, "made", app.sheet(features, prompt))
    assert len(tab.locator("#made img").all()) == 4
    tab.click("#keep")
    with tab.expect_download() as download:
        tab.get_by_text("Download dictionary.zip").click()
    ZipFile(download.value.path()).extractall(tmp_path)
    saved = load_dictionary(tmp_path)
    assert saved.labels["night"]["measured"] == label["measured"] and saved.labels["red"]
    assert "load_rtsae('dictionary')" in shown_code(tab, "'night': 1")


def test_settings_of_the_pipeline(tab, app):
    go(tab, "Settings")
    tab.fill("#negative textarea", "blue")
    tab.press("#negative textarea", "Enter")
    tab.fill("#width input", "96")
    tab.press("#width input", "Enter")
    says(tab, "made for 64 × 64 pixels")
    tab.fill("#images input[type=number]", "2")
    call = {"negative_prompt": "blue", "width": 96, "num_images_per_prompt": 2}
    shows(tab, "steered", app.sheet({"red": 1}, call=call))
    assert "width=96" in shown_code(tab, "num_images_per_prompt=2")


def test_a_feature_that_is_nowhere_active_says_so(tab, app):
    sae = next(iter(app.studio.dictionary.sites.values()))
    dead = int(sae.density.argmin())
    take(tab, str(dead))
    go(tab, "When")
    tab.get_by_role("button", name="Show").click()
    tab.wait_for_selector(f"#nowhere:has-text('{dead} is nowhere active')")
    tab.wait_for_selector("#maps img")
    leave(tab, "red")
    go(tab, "Settings")
    tab.click("#operation input")
    tab.get_by_role("option", name="ablate", exact=True).click()
    tab.wait_for_selector("#status:has-text('nowhere active in this picture')")


@pytest.mark.parametrize("width", [390])
def test_a_telephone_will_do(browser, app, width):
    with opened(browser, app, width) as tab:
        for name in ("Where", "When", "Strengths", "Find", "Make a feature", "History", "Settings", "Code", "?"):
            go(tab, name)
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        assert tab.locator("#plain").bounding_box()["width"] > 140
        tab.evaluate("document.querySelector('#strength-0').scrollIntoView({block: 'end'})")
        slide(tab, 0, 0.25)
        shows(tab, "steered", app.sheet({"red": 0.25}))
        seen, moved = tab.locator("#steered img").bounding_box(), tab.locator("#strength-0").bounding_box()
        assert 0 <= seen["y"] and seen["y"] + seen["height"] <= moved["y"] and moved["y"] + moved["height"] <= 1100
        tab.hover("#features .has-info")
        assert "What the picture should have" in tab.inner_text("#features .info-text")


def test_an_exact_match_is_the_first_of_the_list():
    labels = {"medium-dark": {"factor": "tone"}, "woman": {"factor": "who"}, "dark": {"factor": "tone"}, "man": {}}
    assert [name for _, name in choices_of(labels)] == ["dark", "medium-dark", "woman", "man"]


def test_the_code_draws_the_same_picture(app):
    wish = Wish({"prompt": PROMPT} | CALL, 3, {"red": 1.0, 5: 0.5}, {"end": 0.6, "apply_to": "cond"})
    sources = ("examples/shapes-sd", "examples/shapes-rtsae")
    on_gpu = as_code(*sources, torch.float16, "cuda", replace(wish, mask=np.ones((8, 8))))
    assert "dtype=torch.float16).to('cuda')" in on_gpu and 'mask=Image.open("mask.png")' in on_gpu
    ran: dict = {}
    exec(as_code(*sources, torch.float32, "cpu", wish), ran)
    (image,) = app.images(wish.features, seed=3, **wish.options)
    assert (np.asarray(image) == np.asarray(ran["image"])).all()


def test_a_written_preset_can_be_loaded(tab, app):
    take(tab, "heart")
    go(tab, "Preset")
    tab.get_by_role("button", name="Write presets.json").click()
    with tab.expect_download() as download:
        tab.get_by_text("Download presets.json").click()
    presets = json.loads(Path(download.value.path()).read_text())
    assert presets == {"preset": {"features": [["red", 1], ["heart", 1]], "options": {}}}
    app.studio.run(app.pipe.load_rtsae, replace(app.studio.dictionary, presets=presets), "with_presets")
    app.studio.run(app.pipe.set_rtsae_preset, "preset", "with_presets")
    app.studio.run(app.pipe.delete_rtsae, "with_presets")
