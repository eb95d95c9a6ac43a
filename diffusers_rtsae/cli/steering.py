"""Commands that draw: `demo` and `steer`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..worlds import bundled
from .common import (
    PICTURES,
    AsJson,
    Bundled,
    Guidance,
    Pipeline,
    Seed,
    Source,
    Steps,
    app,
    check_extras,
    check_output,
    console,
    load_pipeline,
    parse_strengths,
    read_dictionary,
    read_picture,
    say,
    say_aside,
)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write the pictures to.")] = Path("rtsae-demo"),
    world: Bundled = "shapes",
    pipeline: Pipeline = None,
    dictionary: Source = None,
    steps: Steps = 20,
    prompts: Annotated[int, typer.Option(min=1, help="Pictures that each feature is measured on.")] = 10,
) -> None:
    """Steer a bundled pipeline, draw what happens, and measure it. Needs no network.

    Example: diffusers-rtsae demo --world people --out rtsae-demo
    """
    check_extras("analysis")
    check_output(out, is_folder=True)
    _, folder = read_dictionary(dictionary, world=world)
    from ..analysis.scorer import FactorScorer
    from ..demo import demonstrate

    pipe, scorer = load_pipeline(pipeline, folder, world), FactorScorer.from_pretrained(bundled(world.scorer))
    pipe.set_progress_bar_config(disable=True)
    demonstrate(pipe, world, scorer, out, steps, prompts, console)


@app.command()
def steer(
    prompt: Annotated[str, typer.Argument(help="The prompt to draw.")],
    features: Annotated[
        list[str] | None, typer.Argument(help="FEATURE=STRENGTH; a label, or the index of a latent.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Preset of the dictionary, instead of features.")] = None,
    out: Annotated[Path, typer.Option(help="Picture to write; one without steering is written beside it.")] = Path(
        "steered.png"
    ),
    start: Annotated[
        float | None, typer.Option(min=0, max=1, help="Steer from here on: 0 is noise, 1 the picture.")
    ] = None,
    end: Annotated[float | None, typer.Option(min=0, max=1, help="Steer up to here.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Picture that is white where to steer, black elsewhere.")] = None,
    operation: Annotated[
        str | None, typer.Option(help="What to do to the features: add, set, scale, clamp, ablate …")
    ] = None,
    steps: Steps = 25,
    guidance: Guidance = 3.0,
    seed: Seed = 0,
    world: Bundled = "shapes",
    pipeline: Pipeline = None,
    dictionary: Source = None,
    as_json: AsJson = False,
) -> None:
    """Draw a prompt twice: with features steered, and without.

    Example: diffusers-rtsae steer "a star" red=1.5 --out star.png
    """
    options = {"start": start, "end": end, "operation": operation}
    beside = out.with_name(f"{out.stem}-plain{out.suffix}")
    if bool(features) == bool(preset):
        raise ValueError("Expected either features, like red=1.5, or --preset.")
    if preset and any(value is not None for value in (*options.values(), mask)):
        raise ValueError("A preset brings its own --start, --end, --mask and --operation.")
    strengths = parse_strengths(features or [])
    for path in (out, beside):
        check_output(path, PICTURES)
    painted = read_picture(mask)
    contents, folder = read_dictionary(dictionary, world=world)
    from ..dictionary import parse_feature

    named = {parse_feature(name, contents): strength for name, strength in strengths.items()}
    for feature in named:
        contents.features(feature)
    if preset:
        contents.preset(preset)
    for remark in world.remarks(prompt) if pipeline is None else ():
        say_aside(remark)
    pipe = load_pipeline(pipeline, folder, world)
    import torch
    from PIL import Image

    from ..files import whole
    from ..pipeline import own_size, resting

    def draw():
        call = {"num_inference_steps": steps, "guidance_scale": guidance} | own_size(pipe)
        return pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0]

    if preset:
        pipe.set_rtsae_preset(preset)
    else:
        pipe.set_rtsae_features(named, mask=painted, **options)
    with resting(pipe):
        plain = draw()
    steered = draw()
    out.parent.mkdir(parents=True, exist_ok=True)
    for image, path in ((plain, beside), (steered, out)):
        with whole(path) as partial:
            image.save(partial, Image.registered_extensions()[path.suffix.lower()])
    report = pipe.rtsae_report()
    if as_json:
        print(json.dumps({"steered": str(out), "plain": str(beside), "report": report}))
    else:
        say(f"{out} and, without steering, {beside}")
