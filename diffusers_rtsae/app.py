"""The app: search features, move sliders, paint where they act, and see before and after."""

from __future__ import annotations

import functools
import json
import random
import tempfile
import threading
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from PIL import Image

from .analysis.find import find_features
from .analysis.plots import plot_heat_maps
from .analysis.record import record
from .contents import parse_feature
from .pipeline import get_dictionary
from .steering.edits import APPLY_TO, OPERATIONS

FEATURES = 8  # sliders at most
_DEFAULT = {"start": 0.0, "end": 1.0, "operation": "add", "apply_to": "contrast"}
_WITHOUT_SOURCE = [operation for operation in OPERATIONS if operation not in ("transfer", "replace")]
_SHOWN = 512  # pixels a small picture is enlarged to
_STYLE = "#painted {min-height: 560px}"


def enlarged(image: Image.Image) -> Image.Image:
    """A small picture with larger pixels, so that a browser does not blur it."""
    times = max(1, _SHOWN // max(image.size))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def painted_mask(editor: dict | None) -> np.ndarray | None:
    """Where something was painted, `(height, width)`: 1 there, 0 elsewhere; `None` if nothing was."""
    if editor is None or not editor["layers"]:
        return None
    mask = np.max([np.asarray(layer.convert("RGBA"))[..., 3] for layer in editor["layers"]], axis=0) > 0
    return mask.astype(np.float32) if mask.any() else None  # the brush is see-through, what it means is not


def as_code(
    pipeline: str, dictionary: str, dtype: torch.dtype, device: str, features: dict, options: dict, call: dict,
    seed: int, masked: bool,
) -> str:  # fmt: skip
    """A script that makes the same picture."""
    call, told = dict(call), [f"{key}={value!r}" for key, value in options.items()]
    lines = ["import torch", "from diffusers import DiffusionPipeline"]
    if masked:
        lines += ["from PIL import Image"]
        told.append('mask=Image.open("mask.png")')
    generator = f"torch.Generator().manual_seed({seed})"
    arguments = [repr(call.pop("prompt")), f"generator={generator}", *(f"{k}={v!r}" for k, v in call.items())]
    loaded = repr(pipeline) if dtype == torch.float32 else f"{pipeline!r}, dtype={dtype}"
    moved = "" if device == "cpu" else f".to({device!r})"
    return "\n".join(
        [
            *lines, "", "import diffusers_rtsae", "",
            f"pipe = DiffusionPipeline.from_pretrained({loaded}){moved}",
            f"pipe.load_rtsae({dictionary!r})",
            f"pipe.set_rtsae_features({', '.join([repr(features), *told])})",
            f"image = pipe({', '.join(arguments)}).images[0]",
        ]
    )  # fmt: skip


def _told(function):
    """What goes wrong is said on the page, whatever it is."""

    @functools.wraps(function)
    def wrapper(*arguments, **options):
        try:
            return function(*arguments, **options)
        except gr.Error:
            raise
        except Exception as error:
            expected = isinstance(error, OSError | ValueError)
            message = str(error) if expected else f"{type(error).__name__}: {error}"
            raise gr.Error(message, print_exception=not expected) from error

    return wrapper


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
    busy = threading.Lock()  # one pipeline, however many people
    pipe.set_progress_bar_config(disable=True)

    def steered(names: list[str], strengths: tuple[float, ...]) -> dict:
        features = {}
        for name, strength in zip(names, strengths, strict=False):
            feature = parse_feature(name, loaded)
            loaded.features(feature)  # raises if there is none
            features[feature] = strength
        return features

    def draw(call: dict, seed: int, progress: gr.Progress, what: str) -> Image.Image:
        def on_step(pipe, step, timestep, tensors):
            progress((step + 1, call["num_inference_steps"]), desc=what, unit="steps")
            return tensors

        generator = torch.Generator().manual_seed(seed)
        return pipe(generator=generator, callback_on_step_end=on_step, **call).images[0]

    def settings(prompt, steps, guidance, seed) -> tuple[dict, int]:
        if not prompt.strip():
            raise ValueError("Say what to draw: the prompt is empty.")
        if seed is None:
            raise ValueError("The seed is empty: expected a number.")
        return {"prompt": prompt, "num_inference_steps": int(steps), "guidance_scale": guidance}, int(seed)

    @_told
    def generate(
        prompt, steps, guidance, seed, locked, names, start, end, operation, apply_to, editor, before, *strengths,
        progress=gr.Progress(),  # noqa: B008 - how gradio hands it over
    ):  # fmt: skip
        seed = seed if locked else random.randrange(2**31)
        call, seed = settings(prompt, steps, guidance, seed)
        features, mask = steered(names, strengths), painted_mask(editor)
        options = {"start": start, "end": end, "operation": operation, "apply_to": apply_to}
        key = json.dumps([call, seed])
        with busy:
            plain = before[1] if before and before[0] == key else None
            if plain is None:
                with pipe.rtsae_steering({}):
                    plain = draw(call, seed, progress, "without steering")
            with pipe.rtsae_steering(features, mask=mask, **options):
                image = draw(call, seed, progress, "steered") if features else plain
        return enlarged(plain), enlarged(image), seed, (key, plain)

    @_told
    def choose(names, shown, *values):
        """
        Sliders for the chosen features, which keep their value; what is none is taken back. A label brings the options
        it was verified with.
        """
        known, brought = [], {}
        for name in dict.fromkeys(names):
            try:
                options = loaded.features(parse_feature(name, loaded))[1]
                known.append(name)
                brought |= {} if name in shown else options
            except ValueError as error:
                gr.Warning(str(error))
        if len(known) > FEATURES:
            gr.Warning(f"At most {FEATURES} features have sliders.")
        known = known[:FEATURES]
        kept = dict(zip(shown, values, strict=False))
        sliders = [gr.update(visible=True, label=name, value=kept.get(name, 1.0)) for name in known]
        hidden = [gr.update(visible=False)] * (FEATURES - len(known))
        options = [brought.get(key, gr.skip()) for key in ("start", "end", "operation", "apply_to")]
        return [gr.skip() if known == names else known, known, *options, *sliders, *hidden]

    def options_of(names, start, end, operation, apply_to) -> dict:
        """The options that are not what the chosen features do by themselves."""
        options = {"start": start, "end": end, "operation": operation, "apply_to": apply_to}
        own = [loaded.features(parse_feature(name, loaded))[1] for name in names]

        def differ(*keys: str) -> bool:
            return any(label.get(key, _DEFAULT[key]) != options[key] for label in own for key in keys)

        if differ("operation"):  # a label's options are for its own
            return options
        return {k: options[k] for keys in (("start", "end"), ("apply_to",)) if differ(*keys) for k in keys}

    def code(prompt, steps, guidance, seed, names, start, end, operation, apply_to, editor, *strengths):
        try:
            features, (call, seed) = steered(names, strengths), settings(prompt, steps, guidance, seed)
            options = options_of(names, start, end, operation, apply_to)
        except ValueError as error:
            return f"# {error}"
        masked, device = painted_mask(editor) is not None, str(pipe.device.type)
        return as_code(pipeline, dictionary, pipe.dtype, device, features, options, call, seed, masked)

    @_told
    def export(name, names, start, end, operation, apply_to, *strengths):
        features = [[list(f) if isinstance(f, tuple) else f, s] for f, s in steered(names, strengths).items()]
        if not features:
            raise ValueError("Choose a feature first: a preset of none does nothing.")
        preset = {"features": features, "options": options_of(names, start, end, operation, apply_to)}
        path = Path(files.name, "presets.json")
        path.write_text(json.dumps({name.strip() or "preset": preset}, indent=2) + "\n", encoding="utf-8")
        return gr.update(value=str(path), visible=True)

    @_told
    def save_mask(editor):
        mask = painted_mask(editor)
        if mask is None:
            raise ValueError("Nothing is painted: features act everywhere.")
        path = Path(files.name, "mask.png")
        Image.fromarray((mask * 255).astype(np.uint8)).save(path)
        return gr.update(value=str(path), visible=True)

    @_told
    def look(prompt, steps, guidance, seed, names):
        if not names:
            raise ValueError("Choose a feature first, then see where it is active.")
        call, seed = settings(prompt, steps, guidance, seed)
        features = list(steered(names, (0.0,) * len(names)))
        generator = torch.Generator().manual_seed(seed)
        with busy, pipe.rtsae_steering({}):
            seen = record(pipe, call.pop("prompt"), generator=generator, **call)
        return plot_heat_maps(seen, features)

    @_told
    def find(positive, negative, steps, guidance):
        lines = [[line for line in text.splitlines() if line.strip()] for text in (positive, negative)]
        with busy, pipe.rtsae_steering({}):
            table = find_features(pipe, *lines, num_inference_steps=int(steps), guidance_scale=guidance)
        names = [f"{f.site}:{f.index}" if sites > 1 else str(f.index) for f in table]
        rows = [[n, ", ".join(f.labels), f.present, f.specific, f.timestep] for n, f in zip(names, table, strict=True)]
        return gr.update(value=rows, visible=True), gr.update(choices=names, visible=True)

    def under(before, editor):
        """The new picture below what was painted."""
        background = enlarged(before[1])
        layers = [layer for layer in (editor or {}).get("layers", []) if layer.size == background.size]
        return {"background": background, "layers": layers, "composite": None}

    with gr.Blocks(title="diffusers-rtsae", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
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
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120, elem_id="seed")
                    locked = gr.Checkbox(True, label="keep the seed", min_width=120)
                run = gr.Button("Generate", variant="primary", elem_id="generate")
                with gr.Accordion("When and how", open=False):
                    start = gr.Slider(0, 1, 0.0, step=0.01, label="from", info="0: pure noise", elem_id="start")
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
            [shown_plain, shown_steered, seed, before], show_progress_on=[shown_plain, shown_steered], **one_at_a_time,
        )  # fmt: skip
        before.change(under, [before, editor], editor, show_progress="hidden")
        names.change(choose, [names, shown, *strengths], [names, shown, *options, *strengths])
        told = [text, count, scale, seed, names, *options, editor, *strengths]
        gr.on([page.load, *(c.change for c in told)], code, told, script, queue=False, show_progress="hidden")
        watch.click(look, [text, count, scale, seed, names], plot, **one_at_a_time)
        search.click(find, [positive, negative, count, scale], [table, add], **one_at_a_time)
        add.input(lambda names, new: [*names, new], [names, add], names, queue=False)
        make.click(export, [name, names, *options, *strengths], preset_file)
        mask.click(save_mask, editor, mask_file)
    page.files = files
    return page.queue(api_open=False)


def launch(page: gr.Blocks, port: int | None, share: bool, **options) -> None:
    """Serve the page on this machine alone, unless it is shared; what is sent to it may have 8 MB."""
    fonts = ["system-ui", "sans-serif"]  # none that would be fetched
    page.launch(
        server_name="127.0.0.1", server_port=port, share=share, max_file_size="8mb", footer_links=[], ssr_mode=False,
        show_error=True,
        theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]), css=_STYLE,
        allowed_paths=[page.files.name], **options,
    )  # fmt: skip
