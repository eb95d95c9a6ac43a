"""The command `app`: the page in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from ..worlds import bundled
from .common import (
    GENERAL_PROMPTS,
    Bundled,
    Guidance,
    Pipeline,
    Source,
    Steps,
    app,
    check_extras,
    check_prompts,
    load_pipeline,
    read_dictionary,
)


@app.command("app")
def app_(
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="Prompt to begin with and to choose from; repeatable.")
    ] = None,
    steps: Steps = 20,
    guidance: Guidance = 3.0,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; the first free one from 7860 on by default.")
    ] = None,
    share: Annotated[bool, typer.Option(help="Give the app a public address, through gradio's servers.")] = False,
    world: Bundled = "shapes",
    pipeline: Pipeline = None,
    dictionary: Source = None,
) -> None:
    """Steer in a browser: sliders, a brush for where, before and after, features of your own.

    Example: diffusers-rtsae app
    """
    check_extras("app", "analysis")
    check_prompts(prompts or [], "--prompt")
    from concurrent.futures import ThreadPoolExecutor

    _, folder = read_dictionary(dictionary, world=world)
    from ..app import build, launch

    if not prompts and pipeline is None:
        prompts = [scenes[0][0] for scenes in world.scenes.values()][:3]
    thread = ThreadPoolExecutor(1)
    pipe = thread.submit(load_pipeline, pipeline, folder, world).result()
    names = [str(pipeline or bundled(world.pipeline)), str(dictionary or bundled(world.dictionary))]
    known = world if pipeline is None else None
    launch(build(pipe, *names, prompts or GENERAL_PROMPTS, steps, guidance, thread=thread, world=known), port, share)
