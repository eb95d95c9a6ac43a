"""What is on the page: its fields, tabs and words, without what they do."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import gradio as gr

from ..analysis.report import STRENGTHS
from ..steering.edits import APPLY_TO
from ..steering.operations import OPERATIONS

FEATURES = 8  # sliders at most
DEFAULT_OPTIONS = {"start": 0.0, "end": 1.0, "operation": "add", "apply_to": "contrast"}
_WITHOUT_SOURCE = [name for name, operation in OPERATIONS.items() if not operation.takes]

# every word that is not everyday language, by the label of its field
TERMS = {
    "Features": "What the picture should have more or less of. Type a part of a name and press Enter, or the index of "
    "a latent, which is one of the many small things that the model tells apart.",
    "Strength": "0 changes nothing, 1 brings the feature fully in, 2 is twice as much; below 0 it is taken away.",
    "Seed": "The number that the random noise is made from. Another seed gives another picture of the same prompt.",
    "From": "A picture is made from noise step by step. Steering begins here: 0 is pure noise.",
    "Until": "Steering ends here: 1 is the finished picture.",
    "Operation": "add brings the feature in. scale, set and clamp change how active it is where it is active already; "
    "ablate removes it there. erase takes away the whole thing that has it, or all that is painted.",
    "Guidance branch": "At each step the model answers twice, with the prompt and without it, and the picture moves "
    "along their difference. cond steers the answer with the prompt, all steers both, contrast moves the two apart.",
    "Steps": "In how many steps noise becomes a picture. More are finer and take longer.",
    "Guidance": "How closely the prompt is followed.",
    "Not in the picture": "The negative prompt: what the picture should move away from.",
    "Pictures": "How many at once, each from other noise.",
    "Width": "In pixels; 0 is the size the model was made for.",
    "Height": "In pixels; 0 is the size the model was made for.",
}
STYLE = """
#canvas canvas {display: block; width: min(100%, 512px); cursor: crosshair; touch-action: none; border-radius: 8px;
    background-size: 100% 100%; image-rendering: pixelated; background-color: var(--background-fill-secondary)}
#canvas .tools {display: flex; flex-wrap: wrap; gap: .6em 1.2em; align-items: center; margin: .4em 0}
#canvas button, #words button {border: 1px solid var(--border-color-primary); border-radius: 6px; padding: .15em .7em}
#words {min-height: 2.2em; display: flex; flex-wrap: wrap; gap: .4em; align-items: center; font-size: .9em}
.has-info::after {content: "?"; margin-left: .4em; padding: 0 .42em; border-radius: 1em; font-size: .8em; cursor: help;
    border: 1px solid currentColor; opacity: .7}
.block:has(.has-info) {overflow: visible !important}
.info-text {display: none}
.has-info:hover + .info-text {display: block; position: absolute; z-index: 30; left: 0; right: 0; top: 2.2em;
    padding: .6em .8em; border: 1px solid var(--border-color-primary); border-radius: 6px; text-align: left;
    background: var(--background-fill-primary); color: var(--body-text-color); box-shadow: var(--shadow-drop-lg)}
#plain img, #steered img, #strip img, #labels img, #history img, #made img {image-rendering: pixelated}
.gradio-container {overflow: clip !important} /* or nothing in it could be sticky */
#pictures {position: sticky; top: 0; align-self: flex-start; z-index: 20; background: var(--body-background-fill)}
@media (max-width: 760px) {
    #pictures {order: -1; padding-top: 4px}
    #pictures .tab-wrapper, #pictures button[role=tab] {font-size: .85em}
    #plain, #steered {height: 180px !important}
    .overflow-dropdown {top: auto !important; bottom: 100% !important} /* below it the page may end */
    #strip .grid-container, #labels .grid-container, #made .grid-container {grid-template-columns: repeat(4, 1fr)}
}
"""
# Enter in the prompt draws, where a new line would mean nothing. Below it stand the words that may be meant by what is
# typed: those of the model that begin like the last word, or the whole list until something is typed.
ON_LOAD = """() => {
    const prompt = document.querySelector("#prompt textarea"), shown = document.querySelector("#words .list");
    prompt.addEventListener("keydown", (event) => {
        if (event.key !== "Enter") return;
        event.preventDefault();
        event.stopImmediatePropagation();
        document.querySelector("#generate").click();
    }, true);
    if (!shown) return;
    const words = JSON.parse(shown.dataset.words);
    prompt.addEventListener("input", () => {
        const last = prompt.value.match(/[\\w-]*$/)[0].toLowerCase();
        const fit = last ? words.filter((word) => word.startsWith(last) && word !== last).slice(0, 8) : [];
        shown.replaceChildren(...fit.map((word) => {
            const button = document.createElement("button");
            button.textContent = word;
            button.addEventListener("click", () => {
                prompt.value = prompt.value.slice(0, prompt.value.length - last.length) + word + " ";
                prompt.dispatchEvent(new Event("input"));
                prompt.focus();
            });
            return button;
        }));
    });
}"""
# The list of features closes when one is taken, so that it does not lie over the sliders.
CLOSE_LIST = """() => { document.querySelector("#features input")?.blur(); }"""
# The picture that was drawn, with what is painted on it. Each stroke is sent once, when it ends.
_CANVAS = """
<div class="tools">
  <label>Brush <input type="range" min="8" max="160" value="64" aria-label="Brush size"></label>
  <label><input type="checkbox" aria-label="Erase"> erase</label>
  <button type="button">Clear</button>
</div>
<canvas width="512" height="512" aria-label="Paint where features should act"></canvas>
"""
_PAINT = """
const mask = document.createElement("canvas"), pen = mask.getContext("2d");
let from = null, picture = null;
function setUp() {
    const canvas = element.querySelector("canvas"), brush = element.querySelector("[type=range]");
    const erase = element.querySelector("[type=checkbox]");
    const draw = () => {
        const over = canvas.getContext("2d");
        over.clearRect(0, 0, canvas.width, canvas.height);
        over.globalAlpha = 0.65;
        over.drawImage(mask, 0, 0);
        over.globalAlpha = 1;
    };
    const at = (event) => {
        const box = canvas.getBoundingClientRect();
        return [(event.clientX - box.left) / box.width * canvas.width,
                (event.clientY - box.top) / box.height * canvas.height];
    };
    const stroke = (to) => {
        pen.globalCompositeOperation = erase.checked ? "destination-out" : "source-over";
        Object.assign(pen, {strokeStyle: "#fff", lineWidth: Number(brush.value), lineCap: "round"});
        pen.beginPath();
        pen.moveTo(...from);
        pen.lineTo(...to);
        pen.stroke();
        from = to;
        draw();
    };
    const send = () => trigger("input", {png: mask.toDataURL("image/png")});
    const show = (image) => {  // what is painted stays, unless pictures have another shape
        const [width, height] = [image.naturalWidth, image.naturalHeight];
        const scale = 512 / Math.max(width, height);
        const size = [Math.round(width * scale), Math.round(height * scale)];
        if (mask.width !== size[0] || mask.height !== size[1]) [mask.width, mask.height] = size;
        [canvas.width, canvas.height] = size;
        canvas.style.backgroundImage = `url("${image.src}")`;
        draw();
    };
    if (picture) show(picture);
    if (canvas.dataset.ready) return;
    canvas.dataset.ready = "yes";
    canvas.addEventListener("pointerdown", (event) => {
        canvas.setPointerCapture(event.pointerId);
        from = at(event);
        stroke(from);
    });
    canvas.addEventListener("pointermove", (event) => { if (from) stroke(at(event)); });
    for (const end of ["pointerup", "pointercancel"])
        canvas.addEventListener(end, () => { if (from) { from = null; send(); } });
    element.querySelector("button").addEventListener("click", () => {
        pen.clearRect(0, 0, mask.width, mask.height);
        draw();
        send();
    });
}
setUp();
function load() {
    if (!props.value) return;
    const image = new Image();
    image.onload = () => { picture = image; setUp(); };
    image.src = props.value;
}
load();
watch("value", load);
"""


def _words(words: Sequence[str], values: Mapping[str, Sequence[str]]) -> str:
    """The line below the prompt: what the model knows, and a place for suggestions."""
    listed = " · ".join(f"<b>{factor}</b> {', '.join(own)}" for factor, own in values.items())
    place = f'<span class="list" data-words="{html.escape(json.dumps(list(words)))}"></span>'
    return f"{place}<details><summary>Words it knows</summary>{listed}</details>"


def lay_out(
    title: str,
    prompts: Sequence[str],
    choices: Sequence[tuple[str, str]],
    chosen: Sequence[str],
    options: Mapping[str, float | str],
    arguments: Mapping,
    steps: int,
    guidance: float,
    words: Sequence[str] = (),
    values: Mapping[str, Sequence[str]] | None = None,
    pair: tuple[str, str] = ("a blue star", "a red star"),
) -> SimpleNamespace:
    """
    Create the components of the page, inside a `gr.Blocks`.

    Args:
        title (`str`): what is steered.
        prompts (`Sequence[str]`): to begin with the first, and to choose from.
        choices (`Sequence[tuple[str, str]]`): the features that can be chosen, as shown and as meant.
        chosen (`Sequence[str]`), options (`Mapping`): to begin with: features, and how they act.
        arguments (`Mapping`): of the pipeline's call: fields for what it does not take are hidden.
        steps (`int`), guidance (`float`): to begin with.
        words (`Sequence[str]`), values (`Mapping`): that the model knows, all, and those of each factor; empty if that
            is not known.
        pair (`tuple[str, str]`): of prompts, as an example of how a feature is made.

    Returns:
        `SimpleNamespace`: the components, by name.
    """
    c = SimpleNamespace()
    c.shown, c.mask, c.past, c.again, c.warned = (gr.State(v) for v in (list(chosen), None, [], None, False))
    gr.Markdown(
        f"## Steer {title} by its features\n"
        "Say what to draw, choose a feature (a colour, a style, whatever the model was found to know of), and "
        "move its slider: the picture is drawn again, without it and with it. Paint where it should act, see when "
        "it is active, or make a feature of your own from pairs of prompts."
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            c.text = gr.Textbox(prompts[0], label="Prompt", lines=2, elem_id="prompt")
            gr.HTML(_words(words, values or {}), elem_id="words", visible=bool(words))
            c.examples = gr.Examples([[prompt] for prompt in prompts], c.text, label="For example")
            c.names = gr.Dropdown(
                choices, value=list(chosen), multiselect=True, allow_custom_value=True, max_choices=FEATURES,
                label="Features", info=TERMS["Features"], elem_id="features",
            )  # fmt: skip
            c.strengths = [
                gr.Slider(
                    -3, 3, 1.0, step=0.05, label="".join(chosen[i : i + 1]), info=TERMS["Strength"],
                    visible=i < len(chosen), elem_id=f"strength-{i}",
                )
                for i in range(FEATURES)
            ]  # fmt: skip
            with gr.Row():
                c.run = gr.Button("Draw", variant="primary", elem_id="generate", min_width=120)
                c.stop = gr.Button("Stop", elem_id="stop", min_width=80)
            with gr.Row(equal_height=True):
                c.seed = gr.Number(
                    0, label="Seed", info=TERMS["Seed"], precision=0, minimum=0, min_width=120, elem_id="seed"
                )
                c.another = gr.Button("Another seed", min_width=120)
        with gr.Column(scale=3, min_width=320, elem_id="pictures"):
            picture = {"format": "png", "interactive": False, "buttons": ["download", "fullscreen"]}
            with gr.Tabs():
                with gr.Tab("Side by side"), gr.Row():
                    c.plain = gr.Image(label="without", elem_id="plain", min_width=140, **picture)
                    c.steered = gr.Image(label="steered", elem_id="steered", min_width=140, **picture)
                with gr.Tab("One over the other"):
                    c.compared = gr.ImageSlider(label="without | steered", elem_id="compared", **picture)
            c.status = gr.Markdown(elem_id="status")
    with gr.Tabs():
        gallery = {"show_label": False, "height": "auto", "object_fit": "contain", "buttons": []}
        with gr.Tab("Strengths"):
            gr.Markdown("The feature that was chosen last, at all strengths.")
            c.draw_strip = gr.Button("Draw all strengths")
            c.strip = gr.Gallery(columns=len(STRENGTHS), elem_id="strip", **gallery)
        with gr.Tab("All features") as c.all_features:
            gr.Markdown("What each feature makes of the prompt at strength 1. Click one to use it.")
            c.labels = gr.Gallery(columns=10, allow_preview=False, elem_id="labels", **gallery)
        with gr.Tab("Where"):
            c.where = gr.Markdown("Nothing is painted: features act everywhere.", elem_id="where")
            c.canvas = gr.HTML(
                "", html_template=_CANVAS, js_on_load=_PAINT, elem_id="canvas", apply_default_css=False, label="Where"
            )
            with gr.Row():
                c.remove = gr.Button("Remove this", elem_id="remove")
                c.keep_mask = gr.Button("Save mask.png")
                c.mask_file = gr.DownloadButton("Download mask.png", visible=False)
            gr.Markdown(
                "A change may also show outside what is painted: later layers of the model look at the whole picture "
                "and even it out, a face above all. To keep more of it inside, steer for a shorter time (Settings: "
                "Until 0.6 or less), use a lower strength, or paint the whole of one thing.",
                elem_id="leaks",
            )
        with gr.Tab("When"):
            gr.Markdown("Where and when the chosen features are active in the picture without steering.")
            c.watch = gr.Button("Show")
            c.nowhere = gr.Markdown(elem_id="nowhere")
            c.plot = gr.Plot(show_label=False, elem_id="maps")
        with gr.Tab("Why"):
            _lay_out_why(c)
        with gr.Tab("Find"):
            gr.Markdown("Finds the features that do what naming something in the prompt does. Click a row to use one.")
            with gr.Row():
                c.positive = gr.Textbox(label="Prompts that name it, one a line", lines=2, elem_id="with")
                c.negative_lines = gr.Textbox(label="The same prompts without it", lines=2, elem_id="without")
            c.search = gr.Button("Find")
            c.is_label = gr.Markdown(elem_id="is-label")
            head = ["feature", "labels", "effect", "present"]
            c.table = gr.Dataframe(headers=head, interactive=False, visible=False, elem_id="found")
        with gr.Tab("Make a feature"):
            gr.Markdown(
                "A feature that does what changing a prompt does: write prompts without and with what it brings. "
                "More pairs, one a line, make it hold for more pictures. Of eight or more, some are kept apart, to "
                "judge it on prompts that it was not made from."
            )
            with gr.Row():
                c.before_lines = gr.Textbox(
                    label="From: prompts without it", lines=3, placeholder=pair[0], elem_id="from"
                )
                c.after_lines = gr.Textbox(
                    label="To: the same prompts with it", lines=3, placeholder=pair[1], elem_id="to"
                )
                c.same_lines = gr.Textbox(
                    label="Prompts that should not change (optional)", lines=3, placeholder=pair[1], elem_id="stay"
                )
            with gr.Row(equal_height=True):
                c.new = gr.Textbox(label="Name of the feature", elem_id="new", min_width=120)
                c.more = gr.Button("More pairs of this kind", min_width=120, elem_id="more")
                c.make = gr.Button("Make it", variant="primary", elem_id="make", min_width=120)
                c.progress = gr.Markdown(elem_id="making")
            c.numbers = gr.Markdown(elem_id="numbers")
            c.made = gr.Gallery(columns=4, elem_id="made", **gallery)
            c.keep = gr.Button("Save", visible=False, elem_id="keep")
            c.kept_file = gr.DownloadButton("Download dictionary.zip", visible=False)
        with gr.Tab("History"):
            gr.Markdown("Click a picture to bring its settings back.")
            c.pictures = gr.Gallery(columns=8, allow_preview=False, elem_id="history", **gallery)
        with gr.Tab("Settings"):
            with gr.Row():
                c.count = gr.Slider(1, 100, steps, step=1, label="Steps", info=TERMS["Steps"], elem_id="steps")
                c.scale = gr.Slider(1, 20, guidance, step=0.1, label="Guidance", info=TERMS["Guidance"])
            with gr.Row():
                c.start = gr.Slider(
                    0, 1, options["start"], step=0.01, label="From", info=TERMS["From"], elem_id="start"
                )
                c.end = gr.Slider(0, 1, options["end"], step=0.01, label="Until", info=TERMS["Until"])
            with gr.Row():
                c.operation = gr.Dropdown(
                    _WITHOUT_SOURCE, value=options["operation"], label="Operation", info=TERMS["Operation"],
                    elem_id="operation",
                )  # fmt: skip
                c.apply_to = gr.Dropdown(
                    list(APPLY_TO), value=options["apply_to"], label="Guidance branch",
                    info=TERMS["Guidance branch"],
                )  # fmt: skip
            with gr.Row():
                c.negative = gr.Textbox(
                    label="Not in the picture", info=TERMS["Not in the picture"], elem_id="negative", scale=2,
                    visible="negative_prompt" in arguments,
                )  # fmt: skip
                c.images = gr.Slider(
                    1, 9, 1, step=1, label="Pictures", info=TERMS["Pictures"], elem_id="images",
                    visible="num_images_per_prompt" in arguments,
                )  # fmt: skip
                c.width, c.height = (
                    gr.Number(
                        0, label=name, info=TERMS[name], precision=0, minimum=0, maximum=2048, min_width=100,
                        elem_id=name.lower(), visible=name.lower() in arguments,
                    )
                    for name in ("Width", "Height")
                )  # fmt: skip
        with gr.Tab("Code"):
            c.script = gr.Code(language="python", show_label=False, elem_id="code", interactive=False)
        with gr.Tab("Preset"):
            gr.Markdown(
                "A preset is these features, strengths and options under one name. Put `presets.json` into the folder "
                "of the dictionary, and it is loaded with it:\n"
                '```python\npipe.load_rtsae("that folder")\npipe.set_rtsae_preset("preset")\n```\n'
                "or, on the command line, `diffusers-rtsae steer PROMPT --preset preset --dictionary THAT_FOLDER`."
            )
            c.preset_name = gr.Textbox("preset", label="Name")
            c.write = gr.Button("Write presets.json")
            c.preset_file = gr.DownloadButton("Download presets.json", visible=False, elem_id="preset")
        with gr.Tab("?", elem_id="terms"):
            gr.Markdown("\n".join(f"**{word}.** {meaning}\n" for word, meaning in TERMS.items()))
    c.options = {"start": c.start, "end": c.end, "operation": c.operation, "apply_to": c.apply_to}
    return c


def _lay_out_why(c: SimpleNamespace) -> None:
    """Create what asks and tells what a word does to the picture without steering."""
    gr.Markdown(
        "What a word of the prompt does to the picture without steering, and which features carry it: how much, where "
        "and at which steps. The shares add up to 1. *Rest* is what the dictionary misses. Click a row to use a "
        "feature."
    )
    with gr.Row(equal_height=True):
        c.word = gr.Textbox(label="Word of the prompt", elem_id="word", min_width=120)
        c.instead = gr.Textbox(
            label="The prompt without it",
            placeholder="the word is left out",
            elem_id="instead",
            min_width=120,
            scale=2,
        )
        c.explain = gr.Button("Explain", min_width=120, elem_id="explain")
    c.total = gr.Markdown(elem_id="total")
    head = ["feature", "labels", "share", "if ablated", "present"]
    c.carriers = gr.Dataframe(headers=head, interactive=False, visible=False, elem_id="carriers")
    c.ledger = gr.Plot(show_label=False, elem_id="ledger")


def choices_of(labels: dict[str, dict]) -> list[tuple[str, str]]:
    """Labels as they are shown, with their factor, and meant; one that another contains stands before it, so that an
    exact match is the first of those that contain what is typed."""
    factors = list(dict.fromkeys(label.get("factor") or "" for label in labels.values()))

    def place(name: str) -> tuple[int, int]:
        inside = sum(other != name and other.lower() in name.lower() for other in labels)
        return factors.index(labels[name].get("factor") or ""), inside

    return [
        (f"{name} ({labels[name]['factor']})" if labels[name].get("factor") else name, name)
        for name in sorted(labels, key=place)
    ]
