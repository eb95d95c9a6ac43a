"""The page: what is on it, and what happens when something is clicked."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from PIL import Image

from ..analysis.find import find_features
from ..analysis.fit import fit_feature
from ..analysis.plots import plot_heat_maps
from ..analysis.record import record
from ..analysis.report import STRENGTHS
from ..dictionary import parse_feature
from ..pipeline import own_size
from ..steering.edits import APPLY_TO
from ..steering.operations import OPERATIONS
from .studio import AGE, Studio, Wish, side_by_side

FEATURES = 8  # sliders at most
_LABELS = 48  # of which there are thumbnails
_HISTORY = 24  # pictures
_RANK = 8  # of the map of a feature that is made here
_DEFAULT = {"start": 0.0, "end": 1.0, "operation": "add", "apply_to": "contrast"}
_WITHOUT_SOURCE = [name for name, operation in OPERATIONS.items() if not operation.takes]

# every word that is not everyday language, by the label of its field
TERMS = {
    "Features": "What the picture is to have more or less of. Type a part of a name and press Enter, or the number of "
    "a latent: one of the many small things the model was found to tell apart.",
    "Strength": "0 changes nothing, 1 brings the feature fully in, 2 is twice as much; below 0 it is taken away.",
    "Seed": "The number the random noise is made from. Another seed is another picture of the same prompt.",
    "From": "A picture is made from noise bit by bit. Steer from this moment on: 0 is pure noise.",
    "Until": "And up to this moment: 1 is the finished picture.",
    "Operation": "add brings the feature in. scale, set and clamp change how active it is where it is active already; "
    "ablate removes it there.",
    "Half of guidance": "Each step asks the model twice, with the prompt and without it, and goes where the two "
    "differ. cond steers the answer with the prompt, all both, contrast pushes the two apart.",
    "Steps": "In how many steps noise becomes a picture. More are finer and take longer.",
    "Guidance": "How closely the prompt is followed.",
    "Not in the picture": "A second prompt, the negative one, that the picture is to get away from.",
    "Pictures": "How many at once, each from other noise.",
    "Width": "In pixels; 0 is the size the model was made for.",
    "Height": "In pixels; 0 is the size the model was made for.",
}
_STYLE = """
#painted {min-height: 560px}
.has-info::after {content: "?"; margin-left: .4em; padding: 0 .42em; border-radius: 1em; font-size: .8em; cursor: help;
    border: 1px solid currentColor; opacity: .7}
.block:has(.has-info) {overflow: visible !important}
.info-text {display: none}
.has-info:hover + .info-text {display: block; position: absolute; z-index: 30; left: 0; right: 0; top: 2.2em;
    padding: .6em .8em; border: 1px solid var(--border-color-primary); border-radius: 6px; text-align: left;
    background: var(--background-fill-primary); color: var(--body-text-color); box-shadow: var(--shadow-drop-lg)}
#plain img, #steered img, #painted img, #strip img, #labels img, #history img {image-rendering: pixelated}
@media (max-width: 600px) {#strip .grid-container, #labels .grid-container {grid-template-columns: repeat(4, 1fr)}}
"""
# Enter in the prompt draws; a new line would mean nothing
_ENTER = """() => document.querySelector("#prompt textarea").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    event.stopImmediatePropagation();
    document.querySelector("#generate").click();
}, true)"""


def painted_mask(editor: dict | None) -> np.ndarray | None:
    """Where something was painted, `(height, width)`: 1 there, 0 elsewhere; `None` if nothing was."""
    if editor is None or not editor["layers"]:
        return None
    mask = np.max([np.asarray(layer.convert("RGBA"))[..., 3] for layer in editor["layers"]], axis=0) > 0
    return mask.astype(np.float32) if mask.any() else None  # the brush is see-through, what it means is not


def as_code(pipeline: str, dictionary: str, dtype: torch.dtype, device: str, wish: Wish) -> str:
    """A script that makes the same picture."""
    call, told = dict(wish.call), [f"{key}={value!r}" for key, value in wish.options.items()]
    lines = ["import torch", "from diffusers import DiffusionPipeline"]
    if wish.mask is not None:
        lines += ["from PIL import Image"]
        told.append('mask=Image.open("mask.png")')
    generator = f"torch.Generator().manual_seed({wish.seed})"
    arguments = [repr(call.pop("prompt")), f"generator={generator}", *(f"{k}={v!r}" for k, v in call.items())]
    loaded = repr(pipeline) if dtype == torch.float32 else f"{pipeline!r}, dtype={dtype}"
    moved = "" if device == "cpu" else f".to({device!r})"
    made, of = ("images", "images") if "num_images_per_prompt" in call else ("image", "images[0]")
    return "\n".join(
        [
            *lines, "", "import diffusers_rtsae", "",
            f"pipe = DiffusionPipeline.from_pretrained({loaded}){moved}",
            f"pipe.load_rtsae({dictionary!r})",
            f"pipe.set_rtsae_features({', '.join([repr(wish.features), *told])})",
            f"{made} = pipe({', '.join(arguments)}).{of}",
        ]
    )  # fmt: skip


@contextlib.contextmanager
def _told():
    """What goes wrong is said on the page, whatever it is."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        expected = isinstance(error, OSError | ValueError)
        message = str(error) if expected else f"{type(error).__name__}: {error}"
        raise gr.Error(message, print_exception=not expected) from error


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _numbers(measured: dict) -> str:
    """What a fitted feature was measured to do, in plain words."""
    rows = [
        ("Effect", "effect", "of what changing the prompt does; 1 is all of it"),
        ("Ceiling", "ceiling", "the most that can be done at this place in the model"),
        ("Harm", "harm", "change of the prompts that were to stay, in the same unit"),
        ("Effect of −1", "effect_away", "of what changing the prompt back does"),
    ]
    told = [f"| {name} | **{measured[key]:.2f}** | {words} |" for name, key, words in rows if key in measured]
    if "harm" not in measured:
        told.append("| Harm | – | not measured: no prompts that were to stay |")
    return "\n".join(
        ["| | | |", "| --- | --- | --- |", *told, "", "Judged on pictures from other noise than it was made from."]
    )


def build(
    pipe, pipeline: str, dictionary: str, prompts: Sequence[str], steps: int = 25, guidance: float = 3.0,
    feature: str | None = None, thread: ThreadPoolExecutor | None = None,
) -> gr.Blocks:  # fmt: skip
    """
    The app's page.

    Args:
        pipe (`DiffusionPipeline`): with a dictionary loaded.
        pipeline, dictionary (`str`): where they came from, for the code that is shown.
        prompts (`Sequence[str]`): to begin with the first, and to choose from.
        steps (`int`), guidance (`float`): to begin with.
        feature (`str`, *optional*): to begin with; the label that was measured to have most effect by default.
        thread (`ThreadPoolExecutor`, *optional*): of one thread, that loaded the pipeline: no other draws then.
    """
    studio = Studio(pipe, thread)
    loaded, folder = studio.dictionary, Path(studio.folder.name)
    measured = {name: label.get("measured", {}).get("effect", 0) for name, label in loaded.labels.items()}
    first = [feature] if feature else sorted(measured, key=measured.get, reverse=True)[:1]
    begun = _DEFAULT | {k: v for name in first for k, v in loaded.features(name)[1].items() if k in _DEFAULT}
    own: set[str] = set()  # labels made here

    def choices() -> list[tuple[str, str]]:
        factors = {name: label.get("factor") for name, label in loaded.labels.items()}
        return [(f"{name} ({factor})" if factor else name, name) for name, factor in factors.items()]

    def known(name: str) -> str | None:
        """What was typed as a feature there is: itself, or the first label that begins with it or contains it."""
        try:
            loaded.features(parse_feature(name, loaded))
            return name
        except ValueError as error:
            typed = name.strip().lower()
            found = [label for label in loaded.labels if typed and typed in label.lower()]
            if found:
                return min(found, key=lambda label: not label.lower().startswith(typed))
            gr.Warning(str(error))
            return None

    def options_of(features: dict, chosen: dict) -> dict:
        """The options that are not what the features do by themselves."""
        verified = [loaded.features(feature)[1] for feature in features]

        def differ(*keys: str) -> bool:
            return any(label.get(key, _DEFAULT[key]) != chosen[key] for label in verified for key in keys)

        if differ("operation"):  # a label's options are for its own
            return chosen
        return {k: chosen[k] for keys in (("start", "end"), ("apply_to",)) if differ(*keys) for k in keys}

    def wish_of(data: dict) -> Wish:
        if not data[text].strip():
            raise ValueError("Say what to draw: the prompt is empty.")
        if data[seed] is None:
            raise ValueError("The seed is empty: expected a number.")
        call = own_size(pipe) | {"prompt": data[text].strip(), "num_inference_steps": int(data[count])}
        call |= {"guidance_scale": data[scale]}
        call |= {"negative_prompt": data[negative].strip()} if (data[negative] or "").strip() else {}
        call |= {name: int(data[side]) for name, side in (("width", width), ("height", height)) if data[side]}
        call |= {"num_images_per_prompt": int(data[images])} if data[images] > 1 else {}
        named = zip(data[shown], (data[slider] for slider in strengths), strict=False)
        features = {parse_feature(name, loaded): strength for name, strength in named}
        options = options_of(features, {name: data[option] for name, option in options_shown.items()})
        return Wish(call, int(data[seed]), features, options, data[mask])

    def one_picture(data: dict) -> Wish:
        """Of the prompt, without features."""
        wish = wish_of(data)
        return Wish({k: v for k, v in wish.call.items() if k != "num_images_per_prompt"}, wish.seed)

    def hurry(request: gr.Request):
        studio.wishes[request.session_hash] += 1

    @_told()
    def generate(data, request: gr.Request, progress=gr.Progress()):  # noqa: B008 - how gradio hands it over
        number, wish = studio.wishes[request.session_hash], wish_of(data)
        drawn = []
        for what, one in (("without steering", Wish(wish.call, wish.seed)), ("steered", wish)):

            def on_step(step, steps, what=what):
                progress((step, steps), desc=what, unit="steps")

            drawn.append(studio.draw(one, on_step, lambda: studio.wishes[request.session_hash] == number))
            if drawn[-1] is None:
                return [gr.skip()] * 5 + ["Stopped."]
        (plain, _), (steered, share) = drawn
        without, with_it = studio.file(side_by_side(plain)), studio.file(side_by_side(steered))
        told = "Choose a feature to see what it does." if share is None else f"Steered on {share:.0%} of the picture."
        if share == 0:
            told = "Nothing changed: at strength 0 nothing does, and a feature that only acts where it is active is "
            told += "nowhere active in this picture."
        caption = ", ".join(f"{name} {wish.features[parse_feature(name, loaded)]:g}" for name in data[shown])
        entry = {"file": with_it, "caption": caption or "without", "data": [data[c] for c in restored]}
        entry |= {"names": list(data[shown]), "strengths": [data[slider] for slider in strengths]}
        history = [old for old in data[past] if old["file"] != with_it and Path(old["file"]).exists()]
        below = studio.file(plain[0])
        return without, with_it, (without, with_it), [entry, *history][:_HISTORY], below, told

    def sliders_of(names: list[str], values: Sequence[float]) -> list:
        moved = [gr.update(visible=True, label=n, value=v) for n, v in zip(names, values, strict=False)]
        return moved + [gr.update(visible=False)] * (FEATURES - len(moved))

    @_told()
    def choose(names, shown, *values):
        """
        Sliders for the chosen features, which keep their value; what is none is taken back. A label brings the options
        it was verified with.
        """
        found = list(dict.fromkeys(filter(None, map(known, names))))
        if len(found) > FEATURES:
            gr.Warning(f"At most {FEATURES} features have sliders.")
        found, kept, brought = found[:FEATURES], dict(zip(shown, values, strict=False)), {}
        for name in found:
            brought |= {} if name in shown else loaded.features(parse_feature(name, loaded))[1]
        options = [brought.get(name, gr.skip()) for name in options_shown]
        sliders = sliders_of(found, [kept.get(name, 1.0) for name in found])
        return [gr.skip() if found == names else found, found, *options, *sliders]

    def restore(past, event: gr.SelectData):
        """All that a picture of the history was made with, but for what was painted."""
        entry = past[event.index]
        names, sliders = entry["names"], sliders_of(entry["names"], entry["strengths"])
        return [*entry["data"], names, names, random.random(), *sliders]

    def code(data):
        try:
            wish = wish_of(data)
        except ValueError as error:
            return f"# {error}"
        made_here = [name for name in data[shown] if name in own]
        told = as_code(pipeline, "dictionary" if made_here else dictionary, pipe.dtype, pipe.device.type, wish)
        return f"# dictionary: what “Save” in “Make a feature” gives, unpacked\n{told}" if made_here else told

    @_told()
    def export(data):
        wish = wish_of(data)
        if not wish.features:
            raise ValueError("Choose a feature first: a preset of none does nothing.")
        features = [[list(f) if isinstance(f, tuple) else f, s] for f, s in wish.features.items()]
        preset = {(data[preset_name] or "").strip() or "preset": {"features": features, "options": wish.options}}
        path = folder / "presets.json"
        path.write_text(json.dumps(preset, indent=2) + "\n", encoding="utf-8")
        return gr.update(value=str(path), visible=True)

    def see_painted(editor):
        mask = painted_mask(editor)
        if mask is None:
            return None, "Nothing is painted: features act everywhere."
        return mask, f"Features act on the painted {mask.mean():.0%} of the picture."

    @_told()
    def save_mask(mask):
        if mask is None:
            raise ValueError("Nothing is painted: features act everywhere.")
        path = folder / "mask.png"
        Image.fromarray((mask * 255).astype(np.uint8)).save(path)
        return gr.update(value=str(path), visible=True)

    def under(below, editor):
        """The new picture below what was painted."""
        size = Image.open(below).size
        layers = [layer for layer in (editor or {}).get("layers", []) if layer.size == size]
        return {"background": below, "layers": layers, "composite": None}

    @_told()
    def look(data):
        if not data[shown]:
            raise ValueError("Choose a feature first, then see where it is active.")
        wish = one_picture(data)
        generator, call = torch.Generator().manual_seed(wish.seed), dict(wish.call)

        def recorded():
            with pipe.rtsae_steering({}):
                return record(pipe, call.pop("prompt"), generator=generator, **call)

        seen = studio.run(recorded)
        features = list(wish_of(data).features)
        absent = [str(f) for f, of in zip(features, seen.maps(features)[0], strict=True) if not of.any()]
        told = [f"{name} is nowhere active in this picture, so it cannot be scaled or taken away." for name in absent]
        return plot_heat_maps(seen, features), "\n\n".join(told)

    @_told()
    def find(positive, negative, steps, guidance, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
        with_it, without = _lines(positive), _lines(negative)
        by = "effect" if len(with_it) == len(without) else "presence"
        call = {"num_inference_steps": int(steps), "guidance_scale": guidance}

        def found():
            with pipe.rtsae_steering({}):
                return find_features(pipe, with_it, without, by=by, progress=True, **call)

        table = studio.run(found)
        names = [f"{f.site}:{f.index}" if len(loaded.sites) > 1 else str(f.index) for f in table]
        rows = [
            [name, ", ".join(f.labels), None if f.slope is None else round(f.score, 3), round(f.present, 3)]
            for name, f in zip(names, table, strict=True)
        ]
        return gr.update(value=rows, visible=True)

    def take_row(names, event: gr.SelectData):
        return [*names, event.row_value[0]]

    def take_thumbnail(names, event: gr.SelectData):
        return [*names, event.value["caption"]]

    def thumbnails(data):
        with _told():
            plain, pictures = one_picture(data), []
            for name in list(loaded.labels)[:_LABELS]:
                images, _ = studio.draw(replace(plain, features={name: 1.0}), lambda step, steps: None)
                pictures.append((studio.file(images[0]), name))
                yield pictures

    @_told()
    def strip(data, name: str, progress) -> list[tuple[str, str]]:
        plain, pictures = one_picture(data), []
        for strength in progress.tqdm(STRENGTHS, desc=f"{name} at all strengths", unit="pictures"):
            wish = replace(plain, features={parse_feature(name, loaded): strength}) if strength else plain
            images, _ = studio.draw(wish, lambda step, steps: None)
            pictures.append((studio.file(images[0]), f"{strength:g}".replace("-", "−")))
        return pictures

    @_told()
    def strip_of_chosen(data, progress=gr.Progress()):  # noqa: B008
        if not data[shown]:
            raise ValueError("Choose a feature first, then see what its strengths do.")
        return strip(data, data[shown][-1], progress)

    @_told()
    def make(data, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
        name, before, after = data[new].strip(), _lines(data[before_lines]), _lines(data[after_lines])
        if not name:
            raise ValueError("The new feature needs a name.")
        if name in loaded.labels and name not in own:
            raise ValueError(f"There is a feature {name!r} already: choose another name.")
        if len(before) != len(after):
            raise ValueError(f"Expected as many prompts with it as without, got {len(after)} and {len(before)}.")
        call = {"num_inference_steps": int(data[count]), "guidance_scale": data[scale]}
        pairs, unchanged = list(zip(before, after, strict=True)), _lines(data[same_lines])
        fitted = studio.run(fit_feature, pipe, pairs, unchanged=unchanged, rank=_RANK, **call)
        studio.run(pipe.add_rtsae_label, name, fitted)
        own.add(name)
        studio.forget()
        chosen = [*(n for n in data[names] if n != name), name]
        return _numbers(fitted.measured), gr.update(choices=choices(), value=chosen), gr.update(visible=True)

    def strip_of_made(data, progress=gr.Progress()):  # noqa: B008
        return strip(data, data[new].strip(), progress)

    @_told()
    def save():
        def saved() -> str:
            loaded.save(folder / "dictionary")
            return shutil.make_archive(str(folder / "dictionary"), "zip", folder / "dictionary")

        return gr.update(value=studio.run(saved), visible=True)

    has = studio.parameters
    with gr.Blocks(title="diffusers-rtsae", analytics_enabled=False, delete_cache=(AGE, AGE)) as page:
        shown, mask, past, below, again = (gr.State(v) for v in (first, None, [], None, 0))
        gr.Markdown(
            f"## Steer {loaded.config.get('base_model') or 'a model'} by its features\n"
            "Say what to draw, choose a feature (a colour, a style, whatever the model was found to know of), and "
            "move its slider: the picture is drawn again, without it and with it. Paint where it is to act, see when "
            "it is active, or make a feature of your own from two prompts."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                text = gr.Textbox(prompts[0], label="Prompt", lines=2, elem_id="prompt")
                examples = gr.Examples([[prompt] for prompt in prompts], text, label="For example")
                names = gr.Dropdown(
                    choices(), value=first, multiselect=True, allow_custom_value=True, max_choices=FEATURES,
                    label="Features", info=TERMS["Features"], elem_id="features",
                )  # fmt: skip
                strengths = [
                    gr.Slider(
                        -3, 3, 1.0, step=0.05, label="".join(first[i : i + 1]), info=TERMS["Strength"],
                        visible=i < len(first), elem_id=f"strength-{i}",
                    )
                    for i in range(FEATURES)
                ]  # fmt: skip
                with gr.Row():
                    run = gr.Button("Draw", variant="primary", elem_id="generate", min_width=120)
                    stop = gr.Button("Stop", elem_id="stop", min_width=80)
                with gr.Row(equal_height=True):
                    seed = gr.Number(
                        0, label="Seed", info=TERMS["Seed"], precision=0, minimum=0, min_width=120, elem_id="seed"
                    )
                    another = gr.Button("Another seed", min_width=120)
            with gr.Column(scale=3, min_width=320):
                picture = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}
                with gr.Tabs():
                    with gr.Tab("Side by side"), gr.Row():
                        plain_shown = gr.Image(label="without", elem_id="plain", min_width=140, **picture)
                        steered_shown = gr.Image(label="steered", elem_id="steered", min_width=140, **picture)
                    with gr.Tab("One over the other"):
                        compared = gr.ImageSlider(label="without | steered", elem_id="compared", **picture)
                status = gr.Markdown(elem_id="status")
        with gr.Tabs():
            gallery = {"show_label": False, "height": "auto", "object_fit": "contain", "buttons": []}
            with gr.Tab("Strengths"):
                gr.Markdown("The feature that was chosen last, at all strengths.")
                draw_strip = gr.Button("Draw all strengths")
                strip_shown = gr.Gallery(columns=len(STRENGTHS), elem_id="strip", **gallery)
            with gr.Tab("All features") as all_features:
                gr.Markdown("What each makes of the prompt at strength 1. Click one to take it.")
                labels_shown = gr.Gallery(columns=10, allow_preview=False, elem_id="labels", **gallery)
            # not the first one: its canvas is drawn all the time, which costs much where there is no GPU
            with gr.Tab("Where"):
                where = gr.Markdown("Nothing is painted: features act everywhere.", elem_id="where")
                editor = gr.ImageEditor(
                    sources=(), type="pil", transforms=(), show_label=False, format="png", elem_id="painted",
                    brush=gr.Brush(default_size=48, colors=["#ffffffb0"], color_mode="fixed"),
                )  # fmt: skip
                keep_mask = gr.Button("Save mask.png")
                mask_file = gr.DownloadButton("Download mask.png", visible=False)
            with gr.Tab("When"):
                gr.Markdown("Where and when the chosen features are active in the picture without steering.")
                watch = gr.Button("Show")
                nowhere = gr.Markdown(elem_id="nowhere")
                plot = gr.Plot(show_label=False, elem_id="maps")
            with gr.Tab("Find"):
                gr.Markdown("Which features do what naming something in the prompt does? Click a row to take one.")
                with gr.Row():
                    positive = gr.Textbox(label="Prompts with it, one a line", lines=2, elem_id="with")
                    negative_lines = gr.Textbox(label="The same without it", lines=2, elem_id="without")
                search = gr.Button("Find")
                head = ["feature", "labels", "effect", "present"]
                table = gr.Dataframe(headers=head, interactive=False, visible=False, elem_id="found")
            with gr.Tab("Make a feature"):
                gr.Markdown(
                    "A feature that does what changing a prompt does: say the same without and with what it is to "
                    "bring. More pairs, one a line, make it hold for more pictures."
                )
                with gr.Row():
                    before_lines = gr.Textbox(
                        label="From: prompts without it", lines=2, placeholder="a blue star", elem_id="from"
                    )
                    after_lines = gr.Textbox(
                        label="To: the same with it", lines=2, placeholder="a red star", elem_id="to"
                    )
                    same_lines = gr.Textbox(
                        label="To stay as they are (optional)", lines=2, placeholder="a red circle", elem_id="stay"
                    )
                with gr.Row(equal_height=True):
                    new = gr.Textbox(label="Its name", elem_id="new", min_width=120)
                    fit = gr.Button("Make it", variant="primary", elem_id="make", min_width=120)
                numbers = gr.Markdown(elem_id="numbers")
                made_strip = gr.Gallery(columns=len(STRENGTHS), elem_id="made", **gallery)
                keep = gr.Button("Save", visible=False, elem_id="keep")
                kept_file = gr.DownloadButton("Download dictionary.zip", visible=False)
            with gr.Tab("History"):
                gr.Markdown("Click a picture to have its settings back.")
                pictures = gr.Gallery(columns=8, allow_preview=False, elem_id="history", **gallery)
            with gr.Tab("Settings"):
                with gr.Row():
                    count = gr.Slider(1, 100, steps, step=1, label="Steps", info=TERMS["Steps"], elem_id="steps")
                    scale = gr.Slider(1, 20, guidance, step=0.1, label="Guidance", info=TERMS["Guidance"])
                with gr.Row():
                    start = gr.Slider(
                        0, 1, begun["start"], step=0.01, label="From", info=TERMS["From"], elem_id="start"
                    )
                    end = gr.Slider(0, 1, begun["end"], step=0.01, label="Until", info=TERMS["Until"])
                with gr.Row():
                    operation = gr.Dropdown(
                        _WITHOUT_SOURCE, value=begun["operation"], label="Operation", info=TERMS["Operation"],
                        elem_id="operation",
                    )  # fmt: skip
                    apply_to = gr.Dropdown(
                        list(APPLY_TO), value=begun["apply_to"], label="Half of guidance",
                        info=TERMS["Half of guidance"],
                    )  # fmt: skip
                with gr.Row():
                    negative = gr.Textbox(
                        label="Not in the picture", info=TERMS["Not in the picture"], elem_id="negative", scale=2,
                        visible="negative_prompt" in has,
                    )  # fmt: skip
                    images = gr.Slider(
                        1, 9, 1, step=1, label="Pictures", info=TERMS["Pictures"], elem_id="images",
                        visible="num_images_per_prompt" in has,
                    )  # fmt: skip
                    width, height = (
                        gr.Number(
                            0, label=name, info=TERMS[name], precision=0, minimum=0, maximum=2048, min_width=100,
                            elem_id=name.lower(), visible=name.lower() in has,
                        )
                        for name in ("Width", "Height")
                    )  # fmt: skip
            with gr.Tab("Code"):
                script = gr.Code(language="python", show_label=False, elem_id="code", interactive=False)
            with gr.Tab("Preset"):
                preset_name = gr.Textbox("preset", label="Name")
                write = gr.Button("Write presets.json")
                preset_file = gr.DownloadButton("Download presets.json", visible=False, elem_id="preset")
            with gr.Tab("?", elem_id="terms"):
                gr.Markdown("\n".join(f"**{word}.** {meaning}\n" for word, meaning in TERMS.items()))

        options_shown = {"start": start, "end": end, "operation": operation, "apply_to": apply_to}
        options = list(options_shown.values())
        restored = [text, negative, width, height, images, count, scale, seed, *options]
        asked = {*restored, shown, mask, *strengths}
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "pipeline"}
        at_once = {"queue": False, "trigger_mode": "always_last", "show_progress": "hidden"}

        moved = [c.input for c in (*strengths, *options, count, scale, images)]
        typed = [event for c in (negative, width, height) for event in (c.submit, c.blur)]
        redraws = [run.click, page.load, seed.change, shown.change, mask.change, again.change, *moved, *typed]
        gr.on(redraws, hurry, None, None, **at_once).then(
            generate, asked | {past}, [plain_shown, steered_shown, compared, past, below, status],
            show_progress_on=[plain_shown, steered_shown], trigger_mode="always_last", **one_at_a_time,
        )  # fmt: skip
        stop.click(hurry, None, None, **at_once)
        page.load(None, js=_ENTER)
        examples.load_input_event.then(random.random, None, again, show_progress="hidden")
        another.click(lambda: random.randrange(2**31), None, seed, queue=False)
        names.change(choose, [names, shown, *strengths], [names, shown, *options, *strengths], show_progress="hidden")
        gr.on([page.load, *(c.change for c in asked)], code, asked, script, **at_once)

        below.change(under, [below, editor], editor, show_progress="hidden")
        editor.change(see_painted, editor, [mask, where], show_progress="hidden", trigger_mode="always_last")
        keep_mask.click(save_mask, mask, mask_file)
        past.change(
            lambda past: [(one["file"], one["caption"]) for one in past], past, pictures, show_progress="hidden"
        )
        pictures.select(restore, past, [*restored, names, shown, again, *strengths], show_progress="hidden")
        watch.click(look, asked, [plot, nowhere], **one_at_a_time)
        draw_strip.click(strip_of_chosen, asked, strip_shown, **one_at_a_time)
        drawing = all_features.select(thumbnails, asked, labels_shown, concurrency_id="thumbnails")
        stop.click(None, cancels=drawing)
        labels_shown.select(take_thumbnail, names, names, **at_once)
        search.click(find, [positive, negative_lines, count, scale], table, **one_at_a_time)
        table.select(take_row, names, names, **at_once)
        made = fit.click(
            make, asked | {names, new, before_lines, after_lines, same_lines}, [numbers, names, keep], **one_at_a_time
        )
        made.success(strip_of_made, asked | {new}, made_strip, **one_at_a_time)
        keep.click(save, None, kept_file)
        write.click(export, asked | {preset_name}, preset_file)
    page.studio = studio
    return page.queue(api_open=False)


def launch(page: gr.Blocks, port: int | None, share: bool, **options) -> None:
    """Serve the page on this machine alone, unless it is shared; what is sent to it may have 8 MB."""
    fonts = ["system-ui", "sans-serif"]  # none that would be fetched
    page.launch(
        server_name="127.0.0.1", server_port=port, share=share, max_file_size="8mb", footer_links=[], ssr_mode=False,
        show_error=True,
        theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]), css=_STYLE,
        allowed_paths=[page.studio.folder.name], **options,
    )  # fmt: skip
