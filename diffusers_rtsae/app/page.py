"""The page: laid out, connected, and served."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import gradio as gr

from ..worlds import World
from .events import Events
from .layout import DEFAULT_OPTIONS, STYLE, choices_of, lay_out
from .studio import AGE, Studio
from .wiring import connect


def build(
    pipe, pipeline: str, dictionary: str, prompts: Sequence[str], steps: int = 25, guidance: float = 3.0,
    feature: str | None = None, thread: ThreadPoolExecutor | None = None, world: World | None = None,
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
        world (`World`, *optional*): whose pipeline it is, if it is a bundled one: the page then says which words it
            knows.
    """
    studio = Studio(pipe, thread)
    labels = studio.dictionary.labels
    effects = {name: label.get("measured", {}).get("effect", 0) for name, label in labels.items()}
    chosen = [feature] if feature else sorted(effects, key=effects.get, reverse=True)[:1]
    options = dict(DEFAULT_OPTIONS)
    for name in chosen:
        verified = studio.dictionary.features(name)[1]
        options |= {key: value for key, value in verified.items() if key in DEFAULT_OPTIONS}
    known: dict = {}
    if world:
        factor, ((without, naming), *_) = next(iter(world.scenes.items()))
        value = next(v for v in world.values[factor] if v != "none")
        shown = {name: own for name, own in world.values.items() if name != "valid"}
        known = {"words": world.words, "values": shown, "pair": (without, naming.format(value))}
    with gr.Blocks(title="diffusers-rtsae", analytics_enabled=False, delete_cache=(AGE, AGE)) as page:
        components = lay_out(
            studio.dictionary.config.get("base_model") or "a model", prompts, choices_of(labels), chosen, options,
            studio.parameters, steps, guidance, **known,
        )  # fmt: skip
        connect(page, Events(studio, components, pipeline, dictionary, world))
    page.studio = studio
    return page.queue(api_open=False)


def launch(page: gr.Blocks, port: int | None, share: bool, **options) -> None:
    """Serve the page on this machine alone, unless it is shared; what is sent to it may have 8 MB."""
    fonts = ["system-ui", "sans-serif"]  # none that would be fetched
    page.launch(
        server_name="127.0.0.1", server_port=port, share=share, max_file_size="8mb", footer_links=[], ssr_mode=False,
        show_error=True,
        theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]), css=STYLE,
        allowed_paths=[page.studio.folder.name], **options,
    )  # fmt: skip
