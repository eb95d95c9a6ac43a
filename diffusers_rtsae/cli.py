"""`diffusers-rtsae`: the command line. What is on standard output with `--json` is JSON and nothing else."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f'The command line needs {error.name}: pip install "diffusers-rtsae[analysis]"') from None

from . import __version__
from .worlds import WORLDS, World

# what is imported below is imported by the command that needs it: torch alone takes a second or two
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
console, errors = Console(emoji=False, highlight=False), Console(stderr=True, emoji=False, highlight=False)
PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE / "bundled" if (PACKAGE / "bundled").is_dir() else PACKAGE.parent  # of what a wheel brings, or a clone
GENERAL_PROMPTS = ["a photo of a car in a street", "a portrait of an old man", "a house by the sea, oil painting"]
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
EXTRAS = {  # that bring a module
    "analysis": ("matplotlib", "rich", "typer"),
    "app": ("gradio",),
    "train": ("datasets", "pydantic", "scipy", "tokenizers", "tqdm", "yaml"),
}


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"expected a finite number, got {value}.")
    return value


Pipeline = Annotated[str | None, typer.Option(help="Pipeline: a folder or Hub id; the world's by default.")]
Source = Annotated[str | None, typer.Option(help="Dictionary: a folder or Hub id; the world's by default.")]


def _world(name: str) -> World:
    if name not in WORLDS:
        raise typer.BadParameter(f"expected one of {list(WORLDS)}, got {name!r}.")
    return WORLDS[name]


Bundled = Annotated[World, typer.Option("--world", parser=_world, metavar="shapes|people", help="Of those bundled.")]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
Guidance = Annotated[float, typer.Option(callback=_finite, help="Guidance scale.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the noise.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Pictures at once; fewer take less memory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"diffusers-rtsae {__version__}")
        raise typer.Exit(0)


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")] = False,
) -> None:
    """See and steer what a text-to-image model does while it denoises."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it tells of torchvision, which nothing here needs


def _say(text: str) -> None:
    """Print a line as it is: no markup, and broken nowhere, so that paths in it can be copied."""
    console.print(text, markup=False, soft_wrap=True)


def _show(head: list[str], rows: list[list[str]]) -> None:
    """Print a table whose cells are shown whole, as they are."""
    table = Table(*head)
    for name in table.columns:
        name.overflow = "fold"
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def _bundled(name: str, folder: str = "examples") -> Path:
    """What came with the package."""
    path = ROOT / folder / name
    if not path.exists():
        raise ValueError(f"{path} is missing: install diffusers-rtsae again, or pass a folder.")
    return path


def _contents(dictionary: str | None, weights: bool = True, world: World = WORLDS["shapes"]):
    """What a dictionary says besides its tensors, and the folder in which it lies; they are fetched too."""
    from .dictionary import locate, read_contents

    folder = locate(dictionary or _bundled(world.dictionary), weights=weights)
    return read_contents(folder), folder


def _pipeline(pipeline: str | None, dictionary: str | Path, world: World):
    """A text-to-image pipeline with a dictionary loaded, on a GPU if there is one."""
    import torch
    import transformers
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    import diffusers_rtsae  # noqa: F401 - gives pipelines their methods

    if pipeline is None:  # loaded in a moment
        logging.set_verbosity_error()  # PixArt tells at every call that it cleans no captions
        logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    dtype = torch.float16 if on_gpu else torch.float32
    pipe = DiffusionPipeline.from_pretrained(pipeline or _bundled(world.pipeline), dtype=dtype)
    pipe.set_progress_bar_config(file=sys.stderr, leave=False)
    pipe.load_rtsae(dictionary)
    return pipe.to("cuda") if on_gpu else pipe


def _strengths(features: Sequence[str]) -> dict[str, float]:
    """`red=1.5` → `{"red": 1.5}`."""
    chosen: dict[str, float] = {}
    for feature in features:
        name, separator, strength = feature.rpartition("=")
        try:
            value = float(strength)
        except ValueError:
            value = math.nan
        if not separator or not math.isfinite(value):
            raise ValueError(f"Expected FEATURE=STRENGTH, like red=1.5 or 1234=-0.5, got {feature!r}.")
        if name in chosen:
            raise ValueError(f"The feature {name!r} is given twice: expected one strength of each.")
        chosen[name] = value
    return chosen


def _check_prompts(prompts: Sequence[str], option: str) -> None:
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError(f"A prompt of {option} is empty: expected words.")


def _check_output(out: Path, endings: Sequence[str] = (), is_folder: bool = False) -> None:
    """Raise unless a file with one of these endings, or a folder, can be written there."""
    if endings and out.suffix.lower() not in endings:
        raise ValueError(f"{out} must end in {', '.join(endings)}.")
    if out.exists() and out.is_dir() != is_folder:
        raise OSError(f"{out} is a {'file' if is_folder else 'folder'}: expected another name to write to.")
    there = out if is_folder and out.exists() else next(path for path in out.absolute().parents if path.exists())
    if not there.is_dir():
        raise OSError(f"{out} cannot be written: {there} is a file.")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror}.") from None


def _picture(path: Path | None):
    """A picture, read."""
    if path is None:
        return None
    from PIL import Image

    with Image.open(path) as image:
        image.load()
    return image


def _check_extras(*extras: str) -> None:
    """Raise unless these extras are installed."""
    for extra in extras:
        for module in EXTRAS[extra]:
            if importlib.util.find_spec(module) is None:
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("rtsae-demo"),
    world: Bundled = "shapes",
    pipeline: Pipeline = None,
    dictionary: Source = None,
    steps: Steps = 20,
    prompts: Annotated[int, typer.Option(min=1, help="Pictures each feature is measured on.")] = 10,
) -> None:
    """Steer a bundled pipeline, draw what happens, and measure it. Needs no network.

    Example: diffusers-rtsae demo --world people --out rtsae-demo
    """
    _check_extras("analysis")
    _check_output(out, is_folder=True)
    _, folder = _contents(dictionary, world=world)
    from .analysis.scorer import FactorScorer
    from .demo import demonstrate

    pipe, scorer = _pipeline(pipeline, folder, world), FactorScorer.from_pretrained(_bundled(world.scorer))
    pipe.set_progress_bar_config(disable=True)
    demonstrate(pipe, world, scorer, out, steps, prompts, console)


@app.command()
def steer(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    features: Annotated[list[str] | None, typer.Argument(help="FEATURE=STRENGTH, as many as you like.")] = None,
    preset: Annotated[str | None, typer.Option(help="A preset of the dictionary instead.")] = None,
    out: Annotated[Path, typer.Option(help="Picture to write; the plain one lies beside it.")] = Path("steered.png"),
    start: Annotated[float | None, typer.Option(min=0, max=1, help="Denoising time from which on to steer.")] = None,
    end: Annotated[float | None, typer.Option(min=0, max=1, help="And until when.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Picture that is white where to steer.")] = None,
    operation: Annotated[str | None, typer.Option(help="add, set, scale, clamp, ablate, …")] = None,
    steps: Steps = 25,
    guidance: Guidance = 3.0,
    seed: Seed = 0,
    world: Bundled = "shapes",
    pipeline: Pipeline = None,
    dictionary: Source = None,
    as_json: AsJson = False,
) -> None:
    """Draw a prompt with some features steered, and without.

    Example: diffusers-rtsae steer "a star" red=1.5 --out star.png
    """
    options = {"start": start, "end": end, "operation": operation}
    beside = out.with_name(f"{out.stem}-plain{out.suffix}")
    if bool(features) == bool(preset):
        raise ValueError("Expected either features, like red=1.5, or --preset.")
    if preset and any(value is not None for value in (*options.values(), mask)):
        raise ValueError("A preset brings its own --start, --end, --mask and --operation.")
    strengths = _strengths(features or [])
    for path in (out, beside):
        _check_output(path, PICTURES)
    painted = _picture(mask)
    contents, folder = _contents(dictionary, world=world)
    from .dictionary import parse_feature

    named = {parse_feature(name, contents): strength for name, strength in strengths.items()}
    for feature in named:
        contents.features(feature)
    if preset:
        contents.preset(preset)
    pipe = _pipeline(pipeline, folder, world)
    import torch
    from PIL import Image

    from .files import whole
    from .pipeline import own_size, resting

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
        _say(f"{out} and, without steering, {beside}")


@app.command()
def find(
    positive: Annotated[list[str], typer.Option("--with", help="A prompt with the concept; repeatable.")],
    negative: Annotated[list[str], typer.Option("--without", help="A prompt without it; repeatable.")],
    count: Annotated[int, typer.Option(min=1, help="How many features, of each site.")] = 10,
    verify: Annotated[int, typer.Option(min=0, help="Steer so many of the best, and measure what that does.")] = 0,
    by: Annotated[str, typer.Option(help="Rank by effect or by presence.")] = "effect",
    strip: Annotated[Path | None, typer.Option(help="Picture of what the verified ones do.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures of each prompt.")] = 2,
    until: Annotated[float, typer.Option(help="The beginning of denoising in which presence counts.")] = 0.35,
    steps: Steps = 25,
    guidance: Guidance = 3.0,
    batch_size: BatchSize = 16,
    world: Bundled = "shapes",
    pipeline: Pipeline = None,
    dictionary: Source = None,
    as_json: AsJson = False,
) -> None:
    """Find the features that stand for a concept.

    Example: diffusers-rtsae find --with "a red star" --without "a blue star" --verify 3
    """
    if strip and not verify:
        raise ValueError("A --strip shows what verified features do: expected --verify with how many.")
    if strip:
        _check_extras("analysis")
        _check_output(strip, PICTURES)
    _check_prompts(positive, "--with")
    _check_prompts(negative, "--without")
    _, folder = _contents(dictionary, world=world)
    pipe = _pipeline(pipeline, folder, world)
    from .analysis.find import find_features
    from .files import whole

    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    pipe.set_progress_bar_config(disable=True)
    table = find_features(
        pipe, positive, negative, count, seeds=seeds, verify=verify, until=until, by=by, batch_size=batch_size,
        progress=not as_json, **call,
    )  # fmt: skip
    if strip:
        from .analysis.plots import plot_strip

        strip.parent.mkdir(parents=True, exist_ok=True)
        with whole(strip) as partial:
            plot_strip(table).savefig(partial, format=strip.suffix[1:].lower(), dpi=130)
    print(json.dumps([feature.told() for feature in table]) if as_json else table)


@app.command()
def fit(
    name: Annotated[str, typer.Option(help="Of the new label.")],
    before: Annotated[
        list[str] | None, typer.Option("--from", help="A prompt without the concept; repeatable.")
    ] = None,
    after: Annotated[list[str] | None, typer.Option("--to", help="The same with it; repeatable.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="JSON file of [[from, to], …] instead.")] = None,
    unchanged: Annotated[list[str] | None, typer.Option(help="A prompt that is to stay as it is; repeatable.")] = None,
    latents: Annotated[int, typer.Option(min=1, help="At most.")] = 16,
    rank: Annotated[int | None, typer.Option(min=1, help="Fit a linear map of this rank instead of latents.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the dictionary with the label.")] = Path("fitted"),
    steps: Steps = 25,
    guidance: Guidance = 3.0,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    world: Bundled = "shapes",
    pipeline: Pipeline = None,
    dictionary: Source = None,
    as_json: AsJson = False,
) -> None:
    """Make a feature from pairs of prompts, by its effect, and write the dictionary with it.

    With an --out that holds a dictionary already, that one gets the label; a label it has is not fitted again.

    Example: diffusers-rtsae fit --from "a blue star" --to "a red star" --name red --rank 8
    """
    from .dictionary import CONFIG_NAME
    from .files import read_pairs

    if bool(pairs) == bool(before or after):
        raise ValueError("Expected either --from and --to, or --pairs.")
    if len(before or []) != len(after or []):
        raise ValueError(f"Expected as many --from as --to, got {len(before or [])} and {len(after or [])}.")
    chosen = read_pairs(pairs) if pairs else list(zip(before, after, strict=True))
    _check_output(out, is_folder=True)
    if (out / CONFIG_NAME).is_file():
        if name in _contents(str(out))[0].labels and dictionary is None:
            _say(f"{out} has a label {name} already.")
            return
        dictionary = dictionary or str(out)
    _, folder = _contents(dictionary, world=world)
    from .analysis.effect import check_pairs
    from .analysis.fit import fit_feature
    from .pipeline import get_dictionary

    chosen = check_pairs(chosen)
    pipe = _pipeline(pipeline, folder, world)
    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    pipe.set_progress_bar_config(disable=True)
    fitted = fit_feature(pipe, chosen, latents, unchanged or [], rank, seed=seed, batch_size=batch_size, **call)
    pipe.add_rtsae_label(name, fitted)
    get_dictionary(pipe).save(out)
    if as_json:
        print(json.dumps({"label": name, "out": str(out), "measured": fitted.measured}))
    else:
        _say(f"{name}: {fitted}")
        of = ["--pipeline", pipeline] if pipeline else ["--world", next(n for n, w in WORLDS.items() if w == world)]
        of += ["--dictionary", str(out)]
        command = shlex.join(["diffusers-rtsae", "steer", chosen[0][0], f"{name}=1", *of])
        _say(f"{out} holds it: {command}")


@app.command()
def inspect(
    dictionary: Annotated[str | None, typer.Argument(help="Folder or Hub id; the world's by default.")] = None,
    world: Bundled = "shapes",
    label: Annotated[str | None, typer.Option(help="Only labels that contain this.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a dictionary holds: its sites, figures, labels and presets.

    Example: diffusers-rtsae inspect org/sd15-rtsae --label red
    """
    contents, _ = _contents(dictionary, weights=False, world=world)
    from .dictionary import search_labels

    labels = search_labels(contents, label) if label else list(contents.labels)
    metrics = contents.config.get("metrics") or {}
    if as_json:
        sites = {
            site: {"kind": sae.kind} | vars(sae.config) | {"metrics": metrics.get(site)}
            for site, sae in contents.sites.items()
        }
        told = {"base_model": contents.config.get("base_model"), "sites": sites, "presets": contents.presets}
        print(json.dumps(told | {"labels": {name: contents.labels[name] for name in labels}}))
        return
    _say(f"for {contents.config.get('base_model') or 'an unnamed model'}")
    for site, sae in contents.sites.items():
        c, m = sae.config, metrics.get(site, {})
        kept = ("fvu_online", "fvu_teacher_forced", "l0_threshold", "dead")
        figures = "".join(f" {name} {m[name]}" for name in kept if name in m)
        _say(
            f"{site}: {sae.kind}, {c.num_latents:,} latents of {c.in_channels} channels at {len(c.anchors)} anchors"
            f"{figures}"
        )
    rows = []
    for name in labels:
        measured = contents.labels[name].get("measured", {})
        latents = [str(i) for entry in contents.seen(name) for i in entry["latents"]]
        kept = ("effect", "effect_away", "success", "leakage", "valid", "prompts")
        rows.append([name, ", ".join(latents), ", ".join(f"{k} {measured[k]:.2g}" for k in kept if k in measured)])
    _show(["label", "seen by latents", "measured"], rows)
    if contents.presets:
        _say(f"presets: {', '.join(contents.presets)}")


@app.command()
def report(
    dictionary: Annotated[str | None, typer.Argument(help="Folder or Hub id; the world's by default.")] = None,
    world: Bundled = "shapes",
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line: where to look.")] = None,
    steer_prompts: Annotated[list[str] | None, typer.Option("--steer", help="Prompt to steer; repeatable.")] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    count: Annotated[int, typer.Option(min=0, help="Latents of each site, those active most often.")] = 512,
    steered: Annotated[int, typer.Option(min=0, help="Features to steer: labels first.")] = 32,
    full: Annotated[bool, typer.Option(help="More of everything: 2,048 latents, 128 steered.")] = False,
    steps: Steps = 25,
    guidance: Guidance = 3.0,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    pipeline: Pipeline = None,
) -> None:
    """Explain a dictionary on one HTML page: its figures, and what each feature sees and does.

    Example: diffusers-rtsae report org/sd15-rtsae --pipeline MODEL --prompts prompts.txt --out report.html
    """
    _check_output(out, (".html", ".htm"))
    _check_prompts(steer_prompts or [], "--steer")
    most = None
    if prompts is None:
        if pipeline is not None:
            raise ValueError("A report on another pipeline needs --prompts, a text file with one prompt a line.")
        prompts, most = _bundled(world.prompts), None if full else 64
        steer_prompts = steer_prompts or [scenes[0][0] for scenes in world.scenes.values()][: None if full else 1]
    from .files import read_lines

    texts = read_lines(prompts)[:most]
    count, steered = (2048, 128) if full else (count, steered)
    _, folder = _contents(dictionary, world=world)
    pipe = _pipeline(pipeline, folder, world)
    from .analysis.report import write_report

    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_report(pipe, out, texts, steer_prompts or (), count, steered, batch_size=batch_size, seed=seed, **call)
    _say(f"{out}, {out.stat().st_size / 2**20:.1f} MiB: open it in a browser")


@app.command("app")
def app_(
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="To begin with, and to choose from; repeatable.")
    ] = None,
    steps: Steps = 20,
    guidance: Guidance = 3.0,
    port: Annotated[int | None, typer.Option(help="On which to listen; the first free one from 7860 on.")] = None,
    share: Annotated[bool, typer.Option(help="Make a public address for it, through gradio's servers.")] = False,
    world: Bundled = "shapes",
    pipeline: Pipeline = None,
    dictionary: Source = None,
) -> None:
    """Play with features in a browser: sliders, a brush for where, before and after, features of your own.

    Example: diffusers-rtsae app
    """
    _check_extras("app", "analysis")
    _check_prompts(prompts or [], "--prompt")
    from concurrent.futures import ThreadPoolExecutor

    _, folder = _contents(dictionary, world=world)
    from .app import build, launch

    if not prompts and pipeline is None:
        prompts = [scenes[0][0] for scenes in world.scenes.values()][:3]
    thread = ThreadPoolExecutor(1)
    pipe = thread.submit(_pipeline, pipeline, folder, world).result()
    names = [str(pipeline or _bundled(world.pipeline)), str(dictionary or _bundled(world.dictionary))]
    launch(build(pipe, *names, prompts or GENERAL_PROMPTS, steps, guidance, thread=thread), port, share)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="What somebody published: a folder or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder for the dictionary.")],
    site: Annotated[
        list[str] | None, typer.Option(help="Only this one; or what it is of, if no name says it; repeatable.")
    ] = None,
    subfolder: Annotated[str | None, typer.Option(help="Of the folder or repository.")] = None,
    pipeline: Annotated[str | None, typer.Option(help="Its pipeline, to measure how active latents are.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line, to measure on.")] = None,
    steps: Steps = 25,
    guidance: Guidance = 7.5,
    as_json: AsJson = False,
) -> None:
    """Make a dictionary of what others published (SDLens, sparsify, SAELens, dictionary_learning, DifFRACT).

    Pickles are read for their tensors alone. Without --pipeline and --prompts the statistics are those of the files,
    if they have any.

    Example: diffusers-rtsae convert Artalmaz31/DifFRACT flux-saes --subfolder temporal-aware-saes
    """
    from .dictionary import convertible
    from .files import read_lines

    if (pipeline is None) != (prompts is None):
        raise ValueError("Expected both --pipeline and --prompts, or neither.")
    dictionary, measured = convertible(source, site, subfolder=subfolder), "as the files say, or left at 1"
    if pipeline:
        import torch
        from diffusers import DiffusionPipeline

        from .analysis.statistics import measure

        on_gpu = torch.cuda.is_available()
        pipe = DiffusionPipeline.from_pretrained(pipeline, torch_dtype=torch.float16 if on_gpu else torch.float32)
        pipe.set_progress_bar_config(disable=True)
        pipe = pipe.to("cuda") if on_gpu else pipe
        texts = read_lines(prompts)
        measure(pipe, dictionary, texts, num_inference_steps=steps, guidance_scale=guidance)
        measured = f"measured on {len(texts)} prompts"
    dictionary.config["statistics"] = measured
    dictionary.save(out)
    if as_json:
        print(json.dumps({"out": str(out), "sites": list(dictionary.sites), "statistics": measured}))
    else:
        _say(f"{out} has {', '.join(dictionary.sites)}; statistics: {measured}")


@app.command("list")
def list_(
    refresh: Annotated[bool, typer.Option(help="Ask the Hub too.")] = False,
    as_json: AsJson = False,
) -> None:
    """The dictionaries that are known to exist.

    Example: diffusers-rtsae list --refresh
    """
    from .dictionary import list_pretrained

    known = list_pretrained(refresh)
    if as_json:
        print(json.dumps(known))
    else:
        head = ["id", "ours", "base model", "sites", "size", "license", "description"]
        names = ("base_model", "sites", "size", "license", "description")
        told = []
        for entry in known:
            values = [entry[name] or "not known" for name in names]
            cells = [", ".join(value) if isinstance(value, list) else value for value in values]
            told.append([entry["id"], "yes" if entry["ours"] else "no", *cells])
        _show(head, told)


@app.command()
def push(
    dictionary: Annotated[str, typer.Argument(help="Folder of the dictionary.")],
    repo_id: Annotated[str, typer.Argument(help="user/name on the Hub.")],
    private: Annotated[bool, typer.Option(help="A new repository only you see.")] = False,
) -> None:
    """Upload a dictionary with a model card. Log in first: hf auth login.

    Example: diffusers-rtsae push runs/sd15 you/sd15-rtsae
    """
    _contents(dictionary)
    from .dictionary import load_dictionary

    _say(load_dictionary(dictionary).push_to_hub(repo_id, private=private or None))


def _training(command: str, arguments: list[str], *extras: str) -> None:
    """Hand the arguments to the trainer, which nothing in the package imports: it runs beside it, on its own."""
    _check_extras("train", *extras)
    _bundled("commands.py", "training")
    code = f"from training import commands; commands.{command}('diffusers-rtsae {command}')"
    # -P: of all that may be called training, here or among other packages, it is the one that came with this package
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run([sys.executable, "-P", "-c", code, *arguments], env=os.environ | {"PYTHONPATH": path})
    sys.exit(run.returncode)


FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=FORWARDED)
def collect(context: typer.Context) -> None:
    """Collect the trajectories of a recipe and stop; `train` with the same recipe goes on from there.

    Example: diffusers-rtsae collect training/recipes/sd15.yaml --work runs/sd15
    """
    _training("collect", context.args)


@app.command(context_settings=FORWARDED)
def train(context: typer.Context) -> None:
    """Collect, fit, train, evaluate and save the dictionaries of a recipe.

    Example: diffusers-rtsae train training/recipes/sd15.yaml --out runs/sd15 --dry-run
    """
    _training("train", context.args)


@app.command(context_settings=FORWARDED)
def evaluate(context: typer.Context) -> None:
    """Report how well dictionaries describe a pipeline.

    Example: diffusers-rtsae evaluate runs/sd15 --pipeline MODEL --prompts prompts.txt
    """
    _training("evaluate", context.args, "analysis")


def run() -> None:
    """Entry point: what a user got wrong is one sentence, not a traceback."""
    try:
        app()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        extra = next((extra for extra, modules in EXTRAS.items() if missing in modules), None)
        if extra is None:
            raise
        _fail(f'This needs {missing}: pip install "diffusers-rtsae[{extra}]"')
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}." if error.filename and error.strerror else str(error))
    except ValueError as error:
        _fail(str(error))


def _fail(reason: str) -> NoReturn:
    errors.print("[red]error:[/red]", escape(reason), soft_wrap=True)
    raise SystemExit(1) from None


if __name__ == "__main__":
    run()
