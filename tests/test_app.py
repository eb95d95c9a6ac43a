"""The app, in a real browser: what a person clicks turns the picture red."""

import ast
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

gradio = pytest.importorskip("gradio", reason="the app extra is not installed")

from diffusers_rtsae.app import as_code, build, launch, painted_mask  # noqa: E402

PROMPT = "a large heart in the centre, flat, on white"


@pytest.fixture
def address(steered):
    page = build(steered, "examples/shapes-sd", "examples/shapes-rtsae", PROMPT, steps=12)
    launch(page, None, False, prevent_thread_lock=True, quiet=True)
    assert page.local_url.startswith("http://127.0.0.1:")
    yield page.local_url
    page.close()


@pytest.fixture
def tab(browser, address):
    page = browser.new_page(viewport={"width": 1280, "height": 1100})
    page.foreign = []  # requests to anywhere but the app itself
    page.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or page.foreign.append(r.url))
    page.goto(address)
    page.wait_for_selector("#features input")
    yield page
    page.close()


def take(tab, label: str) -> None:
    tab.click("#features input")
    tab.keyboard.type(label)
    tab.get_by_role("option", name=re.compile(f"^{label}( |$)")).wait_for()
    tab.keyboard.press("Enter")
    tab.locator("#features input").blur()
    tab.wait_for_selector(f"label:has-text('{label}') >> visible=true")


def picture(tab, name: str) -> np.ndarray:
    """The picture as the pipeline drew it: the page shows it with eight times larger pixels."""
    shown = tab.wait_for_selector(f"#{name} img", timeout=120_000).get_attribute("src")
    enlarged = np.asarray(Image.open(io.BytesIO(tab.request.get(shown).body())).convert("RGB"))
    assert enlarged.shape == (512, 512, 3)
    return enlarged[::8, ::8]


def generate(tab) -> tuple[np.ndarray, np.ndarray]:
    before = tab.query_selector("#steered img")
    old = before.get_attribute("src") if before else ""
    tab.click("#generate")
    tab.wait_for_function(
        "old => { const i = document.querySelector('#steered img'); return i && i.getAttribute('src') !== old }",
        arg=old, timeout=120_000,
    )  # fmt: skip
    return picture(tab, "plain"), picture(tab, "steered")


def shown_code(tab, part: str) -> str:
    """The code, once it has `part`: it follows what is clicked a moment later."""
    tab.get_by_role("tab", name="Code").click()
    tab.wait_for_function("part => document.querySelector('#code .cm-content')?.innerText.includes(part)", arg=part)
    return tab.inner_text("#code .cm-content")


def colours(scorer, place: str, *images: np.ndarray) -> list[str]:
    readings = scorer.read(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255)
    return [reading[f"{place}.colour"] for reading in readings]


def test_find_red_move_the_slider_and_the_picture_turns_red(tab, scorer, steered):
    take(tab, "red")
    plain, moved = generate(tab)
    before, after = colours(scorer, "centre", plain, moved)
    assert before != "red" and after == "red"
    tab.fill("#strength-0 input[type=number]", "0")
    tab.keyboard.press("Tab")
    again, none = generate(tab)
    assert (again == plain).all() and (none == plain).all()

    code = shown_code(tab, "{'red': 0")
    ast.parse(code)
    assert "load_rtsae('examples/shapes-rtsae')" in code and "manual_seed(0)" in code
    assert not tab.foreign


def test_what_is_painted_is_where_it_acts(tab, scorer):
    tab.fill("#prompt textarea", "a heart to the left of a blue star, flat, on white")
    tab.fill("#seed input", "1")
    take(tab, "orange")
    plain, _ = generate(tab)
    tab.wait_for_timeout(3000)  # the picture comes to the canvas
    canvas = tab.wait_for_selector("#painted canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    left, middle = box["x"] + box["width"] / 2 - 200, box["y"] + box["height"] / 2
    for y in range(-200, 201, 40):
        tab.mouse.move(left, middle + y)
        tab.mouse.down()
        tab.mouse.move(left + 130, middle + y, steps=6)
        tab.mouse.up()
    tab.wait_for_timeout(1500)
    again, moved = generate(tab)
    assert (again == plain).all()
    left, right = (colours(scorer, place, plain, moved) for place in ("left", "right"))
    assert left[0] != "orange" and left[1] == "orange" and right[0] == right[1] != "orange"
    tab.fill("#seed input", "2")  # another picture comes to the canvas below what is painted
    plain, moved = generate(tab)
    left, right = (colours(scorer, place, plain, moved) for place in ("left", "right"))
    assert left[0] != "orange" and left[1] == "orange" and right[0] == right[1] != "orange"
    tab.wait_for_timeout(1500)
    tab.get_by_role("button", name="Save mask.png").click()
    with tab.expect_download() as download:
        tab.get_by_text("Download mask.png").click()
    mask = np.asarray(Image.open(download.value.path()))
    assert set(np.unique(mask)) == {0, 255} and mask[:, :150].mean() > 200 and mask[:, 300:].max() == 0


def test_a_feature_that_is_not_there_is_said(tab):
    tab.fill("#features input", "rde")
    tab.keyboard.press("Enter")
    tab.wait_for_selector("text=Did you mean", timeout=20_000)


def test_what_is_missing_is_said(tab):
    def says(message: str) -> None:
        tab.locator(".toast-body", has_text=message).first.wait_for(timeout=20_000)

    tab.fill("#prompt textarea", " ")
    tab.click("#generate")
    says("Say what to draw")
    tab.fill("#prompt textarea", PROMPT)
    tab.fill("#seed input", "")
    tab.click("#generate")
    says("The seed is empty")
    tab.get_by_role("button", name="Save mask.png").click()
    says("Nothing is painted")
    tab.get_by_role("tab", name="Preset").click()
    tab.get_by_role("button", name="Write presets.json").click()
    says("a preset of none")
    tab.get_by_role("tab", name="When they are active").click()
    tab.get_by_role("button", name="Show").click()
    says("then see where it is active")


def test_a_label_brings_the_options_it_was_verified_with(browser, pipe, dictionary):
    labels = {"late": dictionary.labels["red"] | {"edit": {"apply_to": "cond", "start": 0.5}}}
    pipe.load_rtsae(replace(dictionary, labels=labels))
    page = build(pipe, "a", "b", PROMPT)
    launch(page, None, False, prevent_thread_lock=True, quiet=True)
    tab = browser.new_page(viewport={"width": 1280, "height": 1100})
    tab.goto(page.local_url)
    tab.wait_for_selector("#features input")
    take(tab, "late")
    tab.get_by_text("When and how").click()
    tab.wait_for_function("document.querySelector('#start input[type=number]')?.value === '0.5'")
    assert tab.get_by_label("Half of guidance").input_value() == "cond"
    shown_code(tab, "set_rtsae_features({'late': 1})")  # it does so by itself
    tab.close()
    page.close()


def test_painted_is_what_layers_hold():
    empty, stroke = Image.new("RGBA", (8, 8)), Image.new("RGBA", (8, 8))
    stroke.paste((255, 255, 255, 176), (0, 0, 4, 8))  # the brush is see-through
    assert painted_mask(None) is None and painted_mask({"layers": [empty]}) is None
    mask = painted_mask({"layers": [empty, stroke]})
    assert mask[:, :4].min() == 1 and mask[:, 4:].max() == 0


def test_the_code_draws_the_same_picture(pipe, dictionary, tmp_path):
    call = {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 3.0}
    options, sources = {"end": 0.6, "apply_to": "cond"}, ("examples/shapes-sd", "examples/shapes-rtsae")
    features = {"red": 1.0, 5: 0.5}
    code = as_code(*sources, torch.float32, "cpu", features, options, call, 3, False)
    on_gpu = as_code(*sources, torch.float16, "cuda", features, options, call, 3, True)
    assert "dtype=torch.float16).to('cuda')" in on_gpu and 'mask=Image.open("mask.png")' in on_gpu
    ran: dict = {}
    exec(code, ran)
    pipe.load_rtsae(dictionary)
    with pipe.rtsae_steering({"red": 1.0, 5: 0.5}, end=0.6, apply_to="cond"):
        image = pipe(generator=torch.Generator().manual_seed(3), **call).images[0]
    assert (np.asarray(image) == np.asarray(ran["image"])).all()


def test_a_written_preset_can_be_loaded(tab, dictionary, steered):
    take(tab, "red")
    take(tab, "heart")
    tab.get_by_role("tab", name="Preset").click()
    tab.get_by_role("button", name="Write presets.json").click()
    with tab.expect_download() as download:
        tab.get_by_text("Download presets.json").click()
    presets = json.loads(open(download.value.path()).read())
    assert presets == {"preset": {"features": [["red", 1], ["heart", 1]], "options": {}}}
    steered.load_rtsae(replace(dictionary, presets=presets), "with_presets")
    steered.set_rtsae_preset("preset", "with_presets")
