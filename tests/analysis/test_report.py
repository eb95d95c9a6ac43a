"""The report page: one file, right about what it shows, and usable."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_rtsae import RTSAE, Dictionary
from diffusers_rtsae.analysis.record import record
from diffusers_rtsae.analysis.report import _map_side, write_report
from diffusers_rtsae.models import FeatureTimes
from diffusers_rtsae.pairs import has_phrase

SITE = "up_blocks.1.attentions.1"
PROMPTS = ["a large red square on the left, flat, on white", "a small blue star at the top, dotted, on black"]
PROMPTS += ["a large heart on the right, on brown"]
CALL = {"num_inference_steps": 6, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def written(_pipeline, dictionary, tmp_path_factory):
    _pipeline.load_rtsae(dictionary)
    path = tmp_path_factory.mktemp("report") / "report.html"
    steer = ["a large heart in the centre, flat, on white", "a star"]
    write_report(_pipeline, path, PROMPTS, steer, count=100, steered=2, top=2, batch_size=2, **CALL)
    _pipeline.unload_rtsae()
    return path


@pytest.fixture(scope="module")
def told(written):
    (text,) = re.findall('<script type="application/json" id="data">(.*?)</script>', written.read_text(), re.DOTALL)
    return json.loads(text)


def test_everything_is_in_one_small_file(written, told, dictionary):
    page = written.read_text()
    assert written.stat().st_size < 15 * 2**20
    assert not re.search(r"""(src|href)=["']?(http|//)""", page) and "@import" not in page
    assert len(told["features"]) == len(dictionary.labels) + 100 and len(told["images"]) == 3
    assert sum("strips" in feature for feature in told["features"]) == 2


def test_what_it_says_of_a_feature_is_what_a_recording_shows(told, steered, dictionary):
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    seen = record(steered, PROMPTS[:2], generator=generators, **CALL)
    feature = next(f for f in told["features"] if f["name"] == "square")
    maps = seen.maps(["square"])[:, 0]
    assert feature["top"][0][0] == int(maps.mean((2, 3)).amax(1).argmax()) == 0
    assert feature["top"][0][1] == pytest.approx(maps[0].mean((1, 2)).max().item(), abs=2e-3)
    stored = np.frombuffer(base64.b64decode(feature["maps"]), np.uint8).reshape(-1, 5, 8, 8)
    expected = maps[0][told["shown"]].numpy() / feature["highest"] * 255
    np.testing.assert_allclose(stored[0], expected, atol=2)
    rtsae = dictionary.sites[SITE]
    path = dictionary.trajectory("square") / rtsae.dynamics.scale[:, None]
    times = FeatureTimes.of(path.norm(dim=1)[None])
    assert (feature["peak"], feature["onset"]) == (int(times.peak), int(times.onset))
    assert feature["density"] == pytest.approx(rtsae.density[feature["latents"]].max().item())


def test_pictures_of_a_label_are_those_whose_prompts_name_it(told):
    named = [
        f for f in told["features"] if f.get("label") and any(has_phrase(prompt, f["name"]) for prompt in PROMPTS)
    ]
    assert {"red", "star", "brown"} & {f["name"] for f in named}
    for feature in named:
        for place in feature["places"]:
            assert place["named"] and place["top"]
            assert all(feature["value"] in PROMPTS[image] for image, _ in place["top"])
    others = [f for f in told["features"] if f.get("label") and f not in named]
    assert others and not any(place["named"] for f in others for place in f["places"])


def test_strips_show_the_prompts_at_all_strengths(told, steered):
    shown = [feature for feature in told["features"] if feature.get("strips")]
    strips = [base64.b64decode(feature["strips"][0].partition(",")[2]) for feature in shown]
    strips = [np.asarray(Image.open(io.BytesIO(strip)).convert("RGB"), dtype=float) for strip in strips]
    assert told["strengths"] == [-1, 0, 0.25, 0.5, 0.75, 1, 1.5, 2]
    pictures = [strip.reshape(64, 8, 64, 3).transpose(1, 0, 2, 3) for strip in strips]
    plain = steered(told["steer_prompts"][0], generator=torch.Generator().manual_seed(0), **CALL).images[0]
    assert np.abs(pictures[0][1] - np.asarray(plain)).mean() < 6  # but for the compression
    for feature, (_, none, *_, full, _, _) in zip(shown, pictures, strict=True):
        assert np.abs(full - none).mean() > 1 and 0 < feature["change"] < 1
    assert max(np.abs(full - none).mean() for _, none, *_, full, _, _ in pictures) > 6


def test_similar_features_are_similar(told, dictionary):
    rtsae, features = dictionary.sites[SITE], told["features"]
    paths = (rtsae.feature_trajectories() / rtsae.dynamics.scale[:, None]).flatten(1).detach()
    paths = torch.nn.functional.normalize(paths, dim=1)
    alone = [i for i, f in enumerate(features) if not f.get("label")]
    for i in alone[:5]:
        assert len(features[i]["similar"]) == 4
        for j, cosine in features[i]["similar"]:
            if j in alone:
                expected = paths[features[i]["latents"]] @ paths[features[j]["latents"]].T
                assert cosine == pytest.approx(expected.item(), abs=0.006)


def test_maps_of_many_features_fit():
    for features, top in ((2048, 4), (4096, 4), (100, 4)):
        side = _map_side(features, top)
        assert features * top * 5 * side**2 * 4 / 3 < 7 * 2**20
    assert _map_side(100, 4) == 16


@pytest.fixture
def strange(pipe):
    """Two sites of different kinds, a label at both, no metrics, latents that are never active; wide pictures."""
    torch.manual_seed(0)
    sites = {}
    for site, width, kind in (("mid_block", 192, "output"), (SITE, 160, "update")):
        rtsae = RTSAE(site, width, [961, 1], 12, 2, kind)
        rtsae.threshold.fill_(0.1)
        rtsae.encoder_bias.data[:3] = -1e4
        sites[site] = rtsae
    features = [{"site": site, "latents": [i], "weights": [1.0]} for i, site in enumerate(sites, start=4)]
    pipe.load_rtsae(Dictionary(sites, {"both": {"features": features}}, {"metrics": None}))
    return pipe


def test_a_strange_dictionary_is_reported_too(strange, browser, tmp_path):
    path, prompts = tmp_path / "report.html", ["</script><!-- <script> \"a\" 'star'", "a heart"]
    write_report(strange, path, prompts, steered=3, batch_size=2, height=64, width=96, **CALL)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(f"{path.as_uri()}#{SITE}:5")
    assert page.inner_text("#name") == "latent 5" and SITE in page.inner_text("#detail")
    assert page.inner_text("#count") == "25 of 25 features"
    page.select_option("#site", "0")
    assert page.inner_text("#count") == "13 of 25 features"
    page.locator("#rows button", has_text="both").click()
    assert "read at 2 sites" in page.inner_text("#detail") and "Here by latent 4." in page.inner_text("#detail")
    page.locator("[aria-label=sites] button", has_text=SITE.split(".")[-1]).last.click()
    assert "Here by latent 5." in page.inner_text("#detail")
    page.fill("#search", "1")
    page.locator("#rows button", has_text="1").first.click()
    assert page.inner_text("#name") == "latent 1" and "active in none of the pictures" in page.inner_text("#detail")
    page.reload()
    assert page.inner_text("#name") == "latent 1" and "mid_block" in page.inner_text("#detail")
    page.goto(f"{path.as_uri()}#mid_block:5")
    page.reload()
    box = page.locator("#detail .maps img").first.bounding_box()
    assert box["width"] / box["height"] == pytest.approx(1.5, abs=0.02)
    page.goto(f"{path.as_uri()}#%E0%A4%A")
    assert not errors
    page.close()


def test_a_report_needs_prompts(steered, tmp_path):
    with pytest.raises(ValueError, match="Expected prompts"):
        write_report(steered, tmp_path / "report.html", [])


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_works_in_a_browser_with_the_keyboard_alone(browser, written, told, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    errors, asked = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{written.as_uri()}#red")
    assert page.inner_text("#name") == "red"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out
    page.focus("#search")
    page.keyboard.type("squa")
    count, square = len(told["features"]), next(f for f in told["features"] if f["name"] == "square")
    page.wait_for_function(f"document.querySelector('#count').textContent !== '{count} of {count} features'")
    names = page.locator("#rows button").all_inner_texts()
    assert names[0] == "square" and {int(name) for name in names[1:]} <= set(square["latents"])
    page.locator("#rows button", has_text="square").first.focus()
    page.keyboard.press("Enter")
    assert page.inner_text("#name") == "square" and page.url.endswith("#square")
    assert page.evaluate("document.activeElement.id") == "detail"
    page.fill("#search", "")
    page.select_option("#kind", "=colour")
    assert page.inner_text("#count") == f"8 of {count} features"
    page.locator("#head button", has_text="active on").focus()
    page.keyboard.press("Enter")
    shown = [float(v.split()[0]) for v in page.locator("#rows td:nth-child(6)").all_inner_texts()]
    assert shown == sorted(shown, reverse=True) and page.get_attribute("th[aria-sort]", "aria-sort") == "descending"
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, input, select, canvas, svg, [role=img]')].filter(e =>"
        " !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length)).length"
    )
    assert unnamed == 0 and not errors and len(asked) - sum(u.startswith("data:") for u in asked) == 1
    page.close()


def test_what_a_layman_tries_works(browser, written, told):
    page = browser.new_page(viewport={"width": 1280, "height": 500})
    page.goto(written.as_uri())
    latent = next(f["name"] for f in told["features"] if not f.get("label"))
    page.fill("#search", f"latent {latent}")
    assert latent in page.locator("#rows button").all_inner_texts()
    page.fill("#search", "")
    page.locator("#rows tr", has_text="square").first.locator("td.thumb").click()  # a thumbnail, not the name
    assert page.inner_text("#name") == "square"
    page.locator("#head button", has_text="effect").click()
    for _ in range(2):  # what has none is last, up and down
        page.locator("#head button", has_text="effect").click()
        effects = page.locator("#rows td:nth-child(3)").all_inner_texts()
        labels = sum("measured" in f and f["measured"].get("effect") is not None for f in told["features"])
        assert all(effects[:labels]) and not any(effects[labels:])
    page.fill("#search", "no such thing")
    assert "Nothing matches. Try a name" in page.inner_text("#rows")
    page.locator("#rows button", has_text="show all").click()
    assert page.inner_text("#count").startswith(f"{len(told['features'])} of")
    page.evaluate("scrollTo(0, 0)")
    page.goto(f"{written.as_uri()}#cross")
    page.wait_for_function("document.querySelector('#name').textContent === 'cross'")
    assert page.locator("#rows tr.chosen").evaluate("e => e.getBoundingClientRect().bottom <= innerHeight")
    assert "No prompt of this report names it" in page.inner_text("#detail")
    sticks_out = "(e) => e.getBoundingClientRect().right > e.closest('.card').getBoundingClientRect().right"
    assert not page.locator("table:has(#rows)").evaluate(sticks_out)
    page.get_by_text("What the words mean").click()
    meant = page.inner_text("#legend")
    assert all(word in meant for word in ("active on", "from t", "lasts", "leakage", "strength", "effect"))
    page.close()
