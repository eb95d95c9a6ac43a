"""`diffusers-rtsae`: the command line. What is on standard output with `--json` is JSON and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f'The command line needs {error.name}: pip install "diffusers-rtsae[analysis]"') from None

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console, errors = Console(), Console(stderr=True)
CLONE = Path(__file__).resolve().parents[1]

Pipeline = Annotated[str | None, typer.Option(help="Pipeline: a folder or Hub id; the bundled one by default.")]
Source = Annotated[str | None, typer.Option(help="Dictionary: a folder or Hub id; the bundled one by default.")]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
Guidance = Annotated[float, typer.Option(help="Guidance scale.")]
Seed = Annotated[int, typer.Option(help="Of the noise.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def main() -> None:
    """See and steer what a text-to-image model does while it denoises."""


def _bundled(name: str) -> Path:
    """What `examples/` holds, in the working directory or beside the package of a clone."""
    for root in (Path.cwd(), CLONE):
        if (root / "examples" / name).exists():
            return root / "examples" / name
    raise typer.BadParameter(
        f"examples/{name} was not found: run this from a clone of the repository, or pass a folder."
    )


def _pipeline(pipeline: str | None, dictionary: str | None):
    """A text-to-image pipeline with a dictionary loaded, on a GPU if there is one."""
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    import diffusers_rtsae  # noqa: F401 - gives pipelines their methods

    logging.disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    dtype = torch.float16 if on_gpu else torch.float32
    pipe = DiffusionPipeline.from_pretrained(pipeline or _bundled("shapes-sd"), torch_dtype=dtype)
    pipe.set_progress_bar_config(file=sys.stderr, leave=False)
    pipe.load_rtsae(dictionary or _bundled("shapes-rtsae"))
    return pipe.to("cuda") if on_gpu else pipe


def _strengths(features: list[str]) -> list[tuple[str, float]]:
    """`red=1.5` → `("red", 1.5)`."""
    chosen = []
    for feature in features:
        name, separator, strength = feature.rpartition("=")
        try:
            chosen.append((name, float(strength)))
        except ValueError:
            separator = ""
        if not separator:
            raise ValueError(f"Expected FEATURE=STRENGTH, like red=1.5 or 1234=-0.5, got {feature!r}.")
    return chosen


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("rtsae-demo"),
    pipeline: Pipeline = None,
    dictionary: Source = None,
    steps: Steps = 20,
    prompts: Annotated[int, typer.Option(min=1, help="Pictures each feature is measured on.")] = 10,
) -> None:
    """Steer the bundled pipeline, draw what happens, and measure it. Needs no network.

    Example: diffusers-rtsae demo --out rtsae-demo
    """
    from .analysis.scorer import FactorScorer
    from .demo import demonstrate

    pipe, scorer = _pipeline(pipeline, dictionary), FactorScorer.from_pretrained(_bundled("shapes-scorer"))
    pipe.set_progress_bar_config(disable=True)
    demonstrate(pipe, scorer, out, steps, prompts, console)


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
    pipeline: Pipeline = None,
    dictionary: Source = None,
    as_json: AsJson = False,
) -> None:
    """Draw a prompt with some features steered, and without.

    Example: diffusers-rtsae steer "a star" red=1.5 --out star.png
    """
    import torch
    from PIL import Image

    from .analysis.find import parse_feature
    from .pipeline import get_dictionary, own_size

    options = {"start": start, "end": end, "mask": mask, "operation": operation}
    if bool(features) == bool(preset):
        raise ValueError("Expected either features, like red=1.5, or --preset.")
    if preset and any(value is not None for value in options.values()):
        raise ValueError("A preset brings its own --start, --end, --mask and --operation.")
    strengths = _strengths(features or [])
    pipe = _pipeline(pipeline, dictionary)

    def draw():
        call = {"num_inference_steps": steps, "guidance_scale": guidance} | own_size(pipe)
        return pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0]

    plain = draw()
    if preset:
        pipe.set_rtsae_preset(preset)
    else:
        named = {parse_feature(name, get_dictionary(pipe)): strength for name, strength in strengths}
        pipe.set_rtsae_features(named, **options | {"mask": Image.open(mask) if mask else None})
    steered, beside = draw(), out.with_name(f"{out.stem}-plain{out.suffix}")
    out.parent.mkdir(parents=True, exist_ok=True)
    plain.save(beside)
    steered.save(out)
    report = pipe.rtsae_report()
    if as_json:
        print(json.dumps({"steered": str(out), "plain": str(beside), "report": report}))
    else:
        console.print(f"{out} and, without steering, {beside}")


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
    pipeline: Pipeline = None,
    dictionary: Source = None,
    as_json: AsJson = False,
) -> None:
    """Find the features that stand for a concept.

    Example: diffusers-rtsae find --with "a red star" --without "a blue star" --verify 3
    """
    from .analysis.find import find_features

    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    pipe = _pipeline(pipeline, dictionary)
    if strip and not verify:
        raise ValueError("A --strip shows what verified features do: expected --verify with how many.")
    pipe.set_progress_bar_config(disable=True)
    table = find_features(
        pipe, positive, negative, count, seeds=seeds, verify=verify, until=until, by=by, progress=not as_json, **call
    )
    if strip:
        from .analysis.plots import plot_strip

        plot_strip(table).savefig(strip, dpi=130)
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
    pipeline: Pipeline = None,
    dictionary: Source = None,
    as_json: AsJson = False,
) -> None:
    """Make a feature from pairs of prompts, by its effect, and write the dictionary with it.

    With an --out that holds a dictionary already, that one gets the label; a label it has is not fitted again.

    Example: diffusers-rtsae fit --from "a blue star" --to "a red star" --name red --rank 8
    """
    from .analysis.effect import check_pairs
    from .analysis.fit import fit_feature
    from .files import CONFIG_NAME, read_pairs
    from .hub import load_dictionary
    from .pipeline import get_dictionary

    if bool(pairs) == bool(before or after):
        raise ValueError("Expected either --from and --to, or --pairs.")
    if len(before or []) != len(after or []):
        raise ValueError(f"Expected as many --from as --to, got {len(before or [])} and {len(after or [])}.")
    chosen = check_pairs(read_pairs(pairs) if pairs else list(zip(before, after, strict=True)))
    if (out / CONFIG_NAME).is_file():
        if name in load_dictionary(out).labels and dictionary is None:
            console.print(f"{out} has a label {name} already.", markup=False, soft_wrap=True)
            return
        dictionary = dictionary or str(out)
    pipe = _pipeline(pipeline, dictionary)
    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    pipe.set_progress_bar_config(disable=True)
    fitted = fit_feature(pipe, chosen, latents, unchanged or [], rank, seed=seed, **call)
    pipe.add_rtsae_label(name, fitted)
    get_dictionary(pipe).save(out)
    if as_json:
        print(json.dumps({"label": name, "out": str(out), "measured": fitted.measured}))
    else:
        console.print(f"{name}: {fitted}", markup=False, soft_wrap=True)
        console.print(
            f'{out} holds it: diffusers-rtsae steer "a star" {name}=1 --dictionary {out}', markup=False, soft_wrap=True
        )


@app.command()
def inspect(
    dictionary: Annotated[str | None, typer.Argument(help="Folder or Hub id; the bundled one by default.")] = None,
    label: Annotated[str | None, typer.Option(help="Only labels that contain this.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a dictionary holds: its sites, figures, labels and presets.

    Example: diffusers-rtsae inspect org/sd15-rtsae --label red
    """
    from . import load_dictionary
    from .analysis.find import search_labels

    loaded = load_dictionary(dictionary or _bundled("shapes-rtsae"))
    labels = search_labels(loaded, label) if label else list(loaded.labels)
    metrics = loaded.config.get("metrics", {})
    if as_json:
        sites = {
            site: {"kind": type(sae).__name__}
            | {name: value for name, value in sae.config.items() if not name.startswith("_")}
            | {"metrics": metrics.get(site)}
            for site, sae in loaded.sites.items()
        }
        told = {"base_model": loaded.config.get("base_model"), "sites": sites, "presets": loaded.presets}
        print(json.dumps(told | {"labels": {name: loaded.labels[name] for name in labels}}))
        return
    console.print(f"for {loaded.config.get('base_model', 'an unnamed model')}")
    for site, sae in loaded.sites.items():
        c, m = sae.config, metrics.get(site, {})
        figures = [
            f"{name} {m[name]}" for name in ("fvu_online", "fvu_teacher_forced", "l0_threshold", "dead") if name in m
        ]
        console.print(
            f"{site}: {type(sae).__name__}, {c.num_latents:,} latents of {c.in_channels} channels at {len(c.anchors)} "
            "anchors",
            *figures,
        )
    table = Table("label", "seen by latents", "measured")
    for name in labels:
        measured = loaded.labels[name].get("measured", {})
        latents = [str(i) for entry in loaded.seen(name) for i in entry["latents"]]
        kept = ("effect", "effect_away", "success", "leakage", "valid", "prompts")
        table.add_row(name, ", ".join(latents), ", ".join(f"{k} {measured[k]:.2g}" for k in kept if k in measured))
    console.print(table)
    if loaded.presets:
        console.print("presets:", ", ".join(loaded.presets))


@app.command()
def report(
    dictionary: Annotated[str | None, typer.Argument(help="Folder or Hub id; the bundled one by default.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt a line: where to look.")] = None,
    steer_prompts: Annotated[list[str] | None, typer.Option("--steer", help="Prompt to steer; repeatable.")] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    count: Annotated[int, typer.Option(min=0, help="Latents of each site, those active most often.")] = 2048,
    steered: Annotated[int, typer.Option(min=0, help="Features to steer: labels first.")] = 128,
    steps: Steps = 25,
    guidance: Guidance = 3.0,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once; fewer take less memory.")] = 16,
    pipeline: Pipeline = None,
) -> None:
    """Explain a dictionary on one HTML page: its figures, and what each feature sees and does.

    Example: diffusers-rtsae report org/sd15-rtsae --pipeline MODEL --prompts prompts.txt --out report.html
    """
    from .analysis.report import write_report

    if prompts is None:
        if pipeline is not None:
            raise ValueError("A report on another pipeline needs --prompts, a text file with one prompt a line.")
        from .demo import SCENES

        prompts = _bundled("shapes-prompts.txt")
        steer_prompts = steer_prompts or [scenes[0] for scenes in SCENES.values()]
    texts = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    pipe = _pipeline(pipeline, dictionary)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_report(pipe, out, texts, steer_prompts or (), count, steered, batch_size=batch_size, seed=seed, **call)
    console.print(f"{out}, {out.stat().st_size / 2**20:.1f} MiB: open it in a browser")


@app.command("app")
def app_(
    prompt: Annotated[
        str, typer.Option(help="To begin with.")
    ] = "a large heart on the left, flat, on a gray background",
    steps: Steps = 25,
    guidance: Guidance = 3.0,
    port: Annotated[int | None, typer.Option(help="On which to listen; the first free one from 7860 on.")] = None,
    share: Annotated[bool, typer.Option(help="Make a public address for it, through gradio's servers.")] = False,
    pipeline: Pipeline = None,
    dictionary: Source = None,
) -> None:
    """Play with features in a browser: sliders, a brush for where, before and after.

    Example: diffusers-rtsae app
    """
    try:
        from .app import build, launch
    except ImportError as error:
        raise ValueError(f'The app needs {error.name}: pip install "diffusers-rtsae[app]"') from None

    pipe = _pipeline(pipeline, dictionary)
    names = [str(source or _bundled(name)) for source, name in ((pipeline, "shapes-sd"), (dictionary, "shapes-rtsae"))]
    launch(build(pipe, *names, prompt, steps, guidance), port, share)


@app.command("list")
def list_(
    refresh: Annotated[bool, typer.Option(help="Ask the Hub too.")] = False,
    as_json: AsJson = False,
) -> None:
    """The dictionaries that are known to exist.

    Example: diffusers-rtsae list --refresh
    """
    from . import list_pretrained

    known = list_pretrained(refresh)
    if as_json:
        print(json.dumps(known))
    elif not known:
        console.print("None is published yet." if refresh else "None is known; --refresh asks the Hub.")
    else:
        table = Table("id", "base model", "sites", "description")
        for entry in known:
            table.add_row(entry["id"], entry["base_model"], ", ".join(entry["sites"]), entry["description"])
        console.print(table)


@app.command()
def push(
    dictionary: Annotated[str, typer.Argument(help="Folder of the dictionary.")],
    repo_id: Annotated[str, typer.Argument(help="user/name on the Hub.")],
    private: Annotated[bool, typer.Option(help="A new repository only you see.")] = False,
) -> None:
    """Upload a dictionary with a model card. Log in first: hf auth login.

    Example: diffusers-rtsae push runs/sd15 you/sd15-rtsae
    """
    from . import load_dictionary

    console.print(load_dictionary(dictionary).push_to_hub(repo_id, private=private or None))


def _training(module: str, arguments: list[str]) -> None:
    """Hand the arguments to the trainer, which is part of a clone and not of the package."""
    if not (CLONE / "training").is_dir():
        raise ValueError("Training needs a clone of the repository: the trainer is no part of the installed package.")
    command = [sys.executable, "-m", f"training.{module}", *arguments]
    path = os.pathsep.join([str(CLONE), *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.exit(subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode)


FORWARDED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=FORWARDED)
def collect(context: typer.Context) -> None:
    """Collect the trajectories of a recipe and stop; `train` with the same recipe goes on from there (in a clone).

    Example: diffusers-rtsae collect training/recipes/sd15.yaml --work runs/sd15
    """
    _training("train", ["--collect-only", *context.args])


@app.command(context_settings=FORWARDED)
def train(context: typer.Context) -> None:
    """Collect, fit, train, evaluate and save the dictionaries of a recipe (in a clone).

    Example: diffusers-rtsae train training/recipes/sd15.yaml --out runs/sd15 --dry-run
    """
    _training("train", context.args)


@app.command(context_settings=FORWARDED)
def evaluate(context: typer.Context) -> None:
    """Report how well dictionaries describe a pipeline (in a clone).

    Example: diffusers-rtsae evaluate runs/sd15 --pipeline MODEL --prompts prompts.txt
    """
    _training("evaluate", context.args)


def run() -> None:
    """Entry point: what a user got wrong is one sentence, not a traceback."""
    try:
        app()
    except (OSError, ValueError) as error:
        errors.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    run()
