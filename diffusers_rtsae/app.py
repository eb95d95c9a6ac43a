"""The app: search features, move sliders, paint where they act, and see before and after."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from PIL import Image

from .analysis.find import find_features, parse_feature
from .analysis.plots import plot_heat_maps
from .analysis.record import record
from .pipeline import get_dictionary
from .steering.edits import APPLY_TO, OPERATIONS

FEATURES = 8  # sliders at most
_WITHOUT_SOURCE = [operation for operation in OPERATIONS if operation not in ("transfer", "replace")]
_SHOWN = 512  # pixels a small picture is enlarged to
_STYLE = "#painted {min-height: 560px}"


def enlarged(image: Image.Image) -> Image.Image:
    """A small picture with larger pixels, so that a browser does not blur it."""
    times = max(1, _SHOWN // max(image.size))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def painted_mask(editor: dict | None) -> np.ndarray | None:
    """Where something was painted, `(height, width)` in [0, 1]; `None` if nothing was."""
    if editor is None or not editor["layers"]:
        return None
    mask = np.max([np.asarray(layer.convert("RGBA"))[..., 3] for layer in editor["layers"]], axis=0) / 255
    return mask if mask.any() else None


def options_of(start: float, end: float, operation: str, apply_to: str) -> dict:
    """The options that are not what an edit does by default."""
    chosen = {"start": start, "end": end, "operation": operation, "apply_to": apply_to}
    default = {"start": 0.0, "end": 1.0, "operation": "add", "apply_to": "contrast"}
    return {key: value for key, value in chosen.items() if value != default[key]}


def as_code(pipeline: str, dictionary: str, features: dict, options: dict, call: dict, seed: int, masked: bool) -> str:
    """A script that makes the same picture."""
    call, told = dict(call), [f"{key}={value!r}" for key, value in options.items()]
    lines = ["import torch", "from diffusers import DiffusionPipeline"]
    if masked:
        lines += ["from PIL import Image"]
        told.append('mask=Image.open("mask.png")')
    generator = f"torch.Generator().manual_seed({seed})"
    arguments = [repr(call.pop("prompt")), f"generator={generator}", *(f"{k}={v!r}" for k, v in call.items())]
    return "\n".join(
        [
            *lines, "", "import diffusers_rtsae", "",
            f"pipe = DiffusionPipeline.from_pretrained({pipeline!r})",
            f"pipe.load_rtsae({dictionary!r})",
            f"pipe.set_rtsae_features({', '.join([repr(features), *told])})",
            f"image = pipe({', '.join(arguments)}).images[0]",
        ]
    )  # fmt: skip


def build(pipe, pipeline: str, dictionary: str, prompt: str, steps: int = 25, guidance: float = 3.0) -> gr.Blocks:
    """
    The app's page.

    Args:
        pipe (`DiffusionPipeline`): with a dictionary loaded.
        pipeline, dictionary (`str`): where they came from, for the code that is shown.
        prompt (`str`), steps (`int`), guidance (`float`): to begin with.
    """
    loaded = get_dictionary(pipe)
    sites = len(loaded.sites)
    choices = [(f"{name} ({label['factor']})" if label.get("factor") else name, name)
               for name, label in loaded.labels.items()]  # fmt: skip
    files = tempfile.TemporaryDirectory(prefix="diffusers-rtsae-app-")  # lives as long as the page does
    pipe.set_progress_bar_config(disable=True)

    def steered(names: list[str], strengths: tuple[float, ...]) -> dict:
        features = {}
        for name, strength in zip(names, strengths, strict=False):
            feature = parse_feature(name)
            loaded.features(feature)  # raises if there is none
            features[feature] = strength
        return features

    def draw(call: dict, seed: int, progress: gr.Progress, what: str) -> Image.Image:
        def on_step(pipe, step, timestep, tensors):
            progress((step + 1, call["num_inference_steps"]), desc=what, unit="steps")
            return tensors

        generator = torch.Generator().manual_seed(seed)
        return pipe(generator=generator, callback_on_step_end=on_step, **call).images[0]

    def settings(prompt, steps, guidance):
        if not prompt.strip():
            raise ValueError("Say what to draw: the prompt is empty.")
        return {"prompt": prompt, "num_inference_steps": int(steps), "guidance_scale": guidance}

    def generate(
        prompt, steps, guidance, seed, locked, names, start, end, operation, apply_to, editor, before, *strengths,
        progress=gr.Progress(),  # noqa: B008 - how gradio hands it over
    ):  # fmt: skip
        try:
            call, seed = settings(prompt, steps, guidance), int(seed) if locked else random.randrange(2**31)
            features = steered(names, strengths)
            key = json.dumps([call, seed])
            known = before is not None and before[0] == key
            plain = before[1] if known else draw(call, seed, progress, "without steering")
            mask = painted_mask(editor) if known else None  # what was painted, was painted on that picture
            with pipe.rtsae_steering(features, mask=mask, **options_of(start, end, operation, apply_to)):
                image = draw(call, seed, progress, "steered") if features else plain
        except (OSError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        return enlarged(plain), enlarged(image), seed, before if known else (key, plain)

    def choose(names, shown, *values):
        """Sliders for the chosen features; those that were there keep their value, and what is none is taken back."""
        known = []
        for name in names:
            try:
                steered([name], (0.0,))
                known.append(name)
            except ValueError as error:
                gr.Warning(str(error))
        kept = dict(zip(shown, values, strict=False))
        sliders = [gr.update(visible=True, label=name, value=kept.get(name, 1.0)) for name in known]
        hidden = [gr.update(visible=False)] * (FEATURES - len(known))
        return [gr.skip() if known == names else known, known, *sliders, *hidden]

    def code(prompt, steps, guidance, seed, names, start, end, operation, apply_to, editor, *strengths):
        try:
            features, call = steered(names, strengths), settings(prompt, steps, guidance)
        except ValueError as error:
            return f"# {error}"
        options = options_of(start, end, operation, apply_to)
        return as_code(pipeline, dictionary, features, options, call, int(seed), painted_mask(editor) is not None)

    def export(name, names, start, end, operation, apply_to, *strengths):
        features = [[list(f) if isinstance(f, tuple) else f, s] for f, s in steered(names, strengths).items()]
        if not features:
            raise gr.Error("Choose a feature first: a preset of none does nothing.")
        preset = {"features": features, "options": options_of(start, end, operation, apply_to)}
        path = Path(files.name, "presets.json")
        path.write_text(json.dumps({name.strip() or "preset": preset}, indent=2) + "\n", encoding="utf-8")
        return gr.update(value=str(path), visible=True)

    def save_mask(editor):
        mask = painted_mask(editor)
        if mask is None:
            raise gr.Error("Nothing is painted: features act everywhere.")
        path = Path(files.name, "mask.png")
        Image.fromarray((mask * 255).astype(np.uint8)).save(path)
        return gr.update(value=str(path), visible=True)

    def look(prompt, steps, guidance, seed, names):
        if not names:
            raise gr.Error("Choose a feature first, then see where it is active.")
        try:
            call, features = settings(prompt, steps, guidance), list(steered(names, (0.0,) * len(names)))
            with pipe.rtsae_steering({}):
                seen = record(pipe, call.pop("prompt"), generator=torch.Generator().manual_seed(int(seed)), **call)
            return plot_heat_maps(seen, features)
        except (OSError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    def find(positive, negative, steps, guidance):
        try:
            lines = [[line for line in text.splitlines() if line.strip()] for text in (positive, negative)]
            table = find_features(pipe, *lines, num_inference_steps=int(steps), guidance_scale=guidance)
        except (OSError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        names = [f"{f.site}:{f.index}" if sites > 1 else str(f.index) for f in table]
        rows = [[n, ", ".join(f.labels), f.present, f.specific, f.timestep] for n, f in zip(names, table, strict=True)]
        return gr.update(value=rows, visible=True), gr.update(choices=names, visible=True)

    with gr.Blocks(title="diffusers-rtsae", analytics_enabled=False) as page:
        shown, before = gr.State([]), gr.State(None)
        gr.Markdown(f"## Steer {loaded.config.get('base_model') or 'a model'} by its features")
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                text = gr.Textbox(prompt, label="Prompt", lines=2, elem_id="prompt")
                names = gr.Dropdown(
                    choices, value=[], multiselect=True, allow_custom_value=True, max_choices=FEATURES,
                    label="Features", info="labels, or numbers of latents", elem_id="features",
                )  # fmt: skip
                strengths = [
                    gr.Slider(-3, 3, 1.0, step=0.05, visible=False, elem_id=f"strength-{i}") for i in range(FEATURES)
                ]
                with gr.Row():
                    seed = gr.Number(7, label="Seed", precision=0, minimum=0, min_width=120, elem_id="seed")
                    locked = gr.Checkbox(True, label="keep the seed", min_width=120)
                run = gr.Button("Generate", variant="primary", elem_id="generate")
                with gr.Accordion("When and how", open=False):
                    start = gr.Slider(0, 1, 0.0, step=0.01, label="from", info="0: pure noise")
                    end = gr.Slider(0, 1, 1.0, step=0.01, label="until", info="1: the picture")
                    operation = gr.Dropdown(_WITHOUT_SOURCE, value="add", label="Operation")
                    apply_to = gr.Dropdown(list(APPLY_TO), value="contrast", label="Half of guidance")
                    count = gr.Slider(1, 100, steps, step=1, label="Steps", elem_id="steps")
                    scale = gr.Slider(1, 20, guidance, step=0.1, label="Guidance")
                with gr.Accordion("Find features by what a prompt adds", open=False):
                    positive = gr.Textbox(label="Prompts with it, one a line", lines=2)
                    negative = gr.Textbox(label="The same prompts without it", lines=2)
                    search = gr.Button("Find")
                    head = ["feature", "labels", "present", "specific", "timestep"]
                    table = gr.Dataframe(headers=head, interactive=False, visible=False, elem_id="found")
                    add = gr.Dropdown([], label="Take one", visible=False)
            with gr.Column(scale=3, min_width=340):
                with gr.Row():
                    shown_plain = gr.Image(label="without", format="png", elem_id="plain", interactive=False)
                    shown_steered = gr.Image(label="steered", format="png", elem_id="steered", interactive=False)
                with gr.Tabs():
                    with gr.Tab("Where"):
                        gr.Markdown("Paint where features act. Nothing painted: everywhere.")
                        editor = gr.ImageEditor(
                            sources=(), type="pil", transforms=(), show_label=False, format="png", elem_id="painted",
                            brush=gr.Brush(default_size=48, colors=["#ffffffb0"], color_mode="fixed"),
                        )  # fmt: skip
                        mask = gr.Button("Save mask.png")
                        mask_file = gr.DownloadButton("Download mask.png", visible=False)
                    with gr.Tab("When they are active"):
                        gr.Markdown("What the chosen features see in the picture without steering.")
                        watch = gr.Button("Show")
                        plot = gr.Plot(show_label=False, elem_id="maps")
                    with gr.Tab("Code"):
                        script = gr.Code(language="python", show_label=False, elem_id="code", interactive=False)
                    with gr.Tab("Preset"):
                        name = gr.Textbox("preset", label="Name")
                        make = gr.Button("Write presets.json")
                        preset_file = gr.DownloadButton("Download presets.json", visible=False, elem_id="preset")

        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "pipeline"}
        options = [start, end, operation, apply_to]
        run.click(
            generate, [text, count, scale, seed, locked, names, *options, editor, before, *strengths],
            [shown_plain, shown_steered, seed, before], **one_at_a_time,
        )  # fmt: skip
        before.change(lambda known: enlarged(known[1]), before, editor, queue=False)
        names.change(choose, [names, shown, *strengths], [names, shown, *strengths])
        told = [text, count, scale, seed, names, *options, editor, *strengths]
        gr.on([page.load, *(c.change for c in told)], code, told, script, queue=False, show_progress="hidden")
        watch.click(look, [text, count, scale, seed, names], plot, **one_at_a_time)
        search.click(find, [positive, negative, count, scale], [table, add], **one_at_a_time)
        add.input(lambda names, new: [*names, new], [names, add], names, queue=False)
        make.click(export, [name, names, *options, *strengths], preset_file)
        mask.click(save_mask, editor, mask_file)
    page.files = files
    return page


def launch(page: gr.Blocks, port: int | None, share: bool, **options) -> None:
    """Serve the page on this machine alone, unless it is shared; what is sent to it may have 8 MB."""
    fonts = ["system-ui", "sans-serif"]  # none that would be fetched
    page.launch(
        server_name="127.0.0.1", server_port=port, share=share, max_file_size="8mb", footer_links=[], ssr_mode=False,
        theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]), css=_STYLE,
        allowed_paths=[page.files.name], **options,
    )  # fmt: skip
