"""Commands that look into a dictionary: `find`, `fit`, `name`, `explain`, `inspect` and `report`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..pairs import HELD_OUT_FROM, judgement, labels_between, more_pairs, prompts_to_show, unnamed
from ..worlds import WORLDS, bundled
from .common import (
    PICTURES,
    AsJson,
    BatchSize,
    Bundled,
    Guidance,
    Pipeline,
    Seed,
    Source,
    Steps,
    app,
    check_extras,
    check_output,
    check_prompts,
    load_pipeline,
    read_dictionary,
    say,
    say_aside,
    show_table,
)

_NAMES = 20  # shown unless they are searched


@app.command()
def find(
    positive: Annotated[list[str], typer.Option("--with", help="Prompt that shows the concept; repeatable.")],
    negative: Annotated[list[str], typer.Option("--without", help="Prompt without the concept; repeatable.")],
    count: Annotated[int, typer.Option(min=1, help="Features to list, for each site.")] = 10,
    verify: Annotated[int, typer.Option(min=0, help="Steer this many of the best, and measure what they do.")] = 0,
    by: Annotated[str, typer.Option(help="Rank by 'effect' on the prediction, or by 'presence'.")] = "effect",
    strip: Annotated[Path | None, typer.Option(help="Write a picture of what the verified features do.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures drawn of each prompt.")] = 2,
    until: Annotated[float, typer.Option(help="Presence counts from 0, which is noise, up to here.")] = 0.35,
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
        check_extras("analysis")
        check_output(strip, PICTURES)
    check_prompts(positive, "--with")
    check_prompts(negative, "--without")
    contents, folder = read_dictionary(dictionary, world=world)
    pipe = load_pipeline(pipeline, folder, world)
    from ..analysis.find import find_features

    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    pipe.set_progress_bar_config(disable=True)
    table = find_features(
        pipe, positive, negative, count, seeds=seeds, verify=verify, until=until, by=by, batch_size=batch_size,
        progress=not as_json, **call,
    )  # fmt: skip
    if strip:
        from ..analysis.plots import plot_strip

        _save_figure(plot_strip(table), strip)
    print(json.dumps([feature.told() for feature in table]) if as_json else table)
    labels = labels_between(contents.labels, negative, positive)
    if labels:
        of = {(e["site"], i) for name in labels for e in contents.seen(name) for i in e["latents"]}
        own = [str(f.index) for f in table if (f.site, f.index) in of]
        among = f"; of these latents {', '.join(own)} see it" if own else ""
        named = " and ".join(map(repr, labels))
        say_aside(f"There is a label for this already: {named}{among}. Steer with it: {labels[0]}=1")


@app.command()
def fit(
    name: Annotated[str, typer.Option(help="Name of the new label.")],
    before: Annotated[list[str] | None, typer.Option("--from", help="Prompt without the concept; repeatable.")] = None,
    after: Annotated[
        list[str] | None, typer.Option("--to", help="The same prompt with the concept; repeatable.")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="JSON file of [[from, to], …], instead of --from and --to.")
    ] = None,
    unchanged: Annotated[list[str] | None, typer.Option(help="Prompt that should not change; repeatable.")] = None,
    latents: Annotated[int, typer.Option(min=1, help="The most latents to use.")] = 16,
    rank: Annotated[int | None, typer.Option(min=1, help="Fit a linear map of this rank instead of latents.")] = None,
    more: Annotated[int, typer.Option(min=0, help="Add up to this many pairs of the same kind.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder to write the dictionary with the label to.")] = Path("fitted"),
    steps: Steps = 25,
    guidance: Guidance = 3.0,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    world: Bundled = "shapes",
    pipeline: Pipeline = None,
    dictionary: Source = None,
    as_json: AsJson = False,
) -> None:
    """Fit a label to pairs of prompts, and write a dictionary that has it.

    If --out holds a dictionary, the label is added to that one; a label that it already has is not fitted again.

    Example: diffusers-rtsae fit --from "a blue star" --to "a red star" --name red --rank 8
    """
    from ..dictionary import CONFIG_NAME
    from ..files import read_pairs

    if bool(pairs) == bool(before or after):
        raise ValueError("Expected either --from and --to, or --pairs.")
    if len(before or []) != len(after or []):
        raise ValueError(f"Expected as many --from as --to, got {len(before or [])} and {len(after or [])}.")
    chosen = read_pairs(pairs) if pairs else list(zip(before, after, strict=True))
    check_output(out, is_folder=True)
    if (out / CONFIG_NAME).is_file():
        if name in read_dictionary(str(out))[0].labels and dictionary is None:
            say(f"{out} has a label {name} already.")
            return
        dictionary = dictionary or str(out)
    _, folder = read_dictionary(dictionary, world=world)
    from ..analysis.effect import check_pairs
    from ..analysis.fit import fit_feature
    from ..pipeline import get_dictionary

    chosen = check_pairs(chosen)
    given = len(chosen)
    if more:
        made = more_pairs(chosen, None if pipeline else world, more)
        if not made:
            raise ValueError(
                "--more knows no pairs of this kind: expected --to to bring in a value of a bundled world, or several "
                "pairs whose words can be combined."
            )
        chosen += made
    of = "one pair" if len(chosen) == 1 else f"{len(chosen)} pairs"
    offer = ""
    if len(chosen) < HELD_OUT_FROM and more_pairs(chosen, None if pipeline else world, HELD_OUT_FROM):
        offer = f" --more {HELD_OUT_FROM - given} makes pairs of the same kind."
    few = f", too few to hold some out.{offer}" if len(chosen) < HELD_OUT_FROM else "."
    say_aside(f"Fitting to {of} of prompts{few} After the first pictures the bar says how long it takes.")
    pipe = load_pipeline(pipeline, folder, world)
    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    pipe.set_progress_bar_config(disable=True)
    fitted = fit_feature(pipe, chosen, latents, unchanged or [], rank, seed=seed, batch_size=batch_size, **call)
    pipe.add_rtsae_label(name, fitted)
    get_dictionary(pipe).save(out)
    if as_json:
        effects = [[*pair, round(effect, 4)] for pair, effect in fitted.effects.items()]
        print(json.dumps({"label": name, "out": str(out), "measured": fitted.measured, "effects": effects}))
    else:
        rows, judged = judgement(fitted.measured, len(chosen), fitted.effects)
        show_table([name, "", ""], [list(row) for row in rows])
        say(judged + offer)
        prompts = prompts_to_show(chosen)
        drawn = out.with_name(f"{out.name}.png")
        _draw_both(pipe, prompts, name, drawn, seed, call)
        say(f"{drawn}: without and with it, " + " and ".join(map(repr, prompts)))
        of = ["--pipeline", pipeline] if pipeline else ["--world", next(n for n, w in WORLDS.items() if w == world)]
        of += ["--dictionary", str(out)]
        command = shlex.join(["diffusers-rtsae", "steer", chosen[0][0], f"{name}=1", *of])
        say(f"{out} holds it: {command}")


def _draw_both(pipe, prompts: list[str], label: str, path: Path, seed: int, call: dict) -> None:
    """Write one picture: a row a prompt, without and with a label."""
    import torch
    from PIL import Image

    from ..files import whole
    from ..pipeline import own_size

    rows = []
    for strength in (0.0, 1.0):
        generators = [torch.Generator().manual_seed(seed) for _ in prompts]
        with pipe.rtsae_steering({label: strength}):
            rows.append(pipe(prompts, generator=generators, **call | own_size(pipe)).images)
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (2 * width, height * len(prompts)))
    for x, images in enumerate(rows):
        for y, image in enumerate(images):
            sheet.paste(image, (x * width, y * height))
    with whole(path) as partial:
        sheet.save(partial, "PNG")


@app.command()
def name(
    dictionary: Annotated[str | None, typer.Argument(help="Folder of the dictionary; the world's by default.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write the dictionary with its names to; may be its own.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Text file of prompts, one a line; the world's by default, or words of --pipeline's tokenizer."
        ),
    ] = None,
    word: Annotated[
        list[str] | None, typer.Option(help="Choose from this word and those it is exchanged for only; repeatable.")
    ] = None,
    pictures: Annotated[
        int, typer.Option(min=2, help="Pictures to rank on, and to measure on, for each group of words.")
    ] = 4,
    steps: Steps = 25,
    guidance: Guidance = 3.0,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    world: Bundled = "shapes",
    pipeline: Pipeline = None,
    as_json: AsJson = False,
) -> None:
    """Name latents after the words that they make, by their effect on the prediction.

    The words are those that the prompts exchange for others. Without --out nothing is kept.

    Example: diffusers-rtsae name --word red --out runs/named
    """
    _, folder = read_dictionary(dictionary, world=world)
    from ..files import read_lines

    prompts = prompts or (bundled(world.prompts) if pipeline is None else None)
    texts = None if prompts is None else read_lines(prompts)
    pipe = load_pipeline(pipeline, folder, world)
    from ..analysis.names import name_features
    from ..pipeline import get_dictionary

    pipe.set_progress_bar_config(disable=True)
    names = name_features(
        pipe, texts, word or None, pictures=pictures, seed=seed, batch_size=batch_size, progress=not as_json,
        num_inference_steps=steps, guidance_scale=guidance,
    )  # fmt: skip
    loaded = get_dictionary(pipe, None)
    loaded.names = names.content()
    if out is not None:
        loaded.save(out)
    if as_json:
        print(json.dumps(loaded.names))
        return
    say(str(names))
    say_aside(
        f"{len(names)} of {names.measured} measured latents have a name, of {len(names.words)} words."
        + (f" Written to {out}." if out else "")
    )


@app.command()
def explain(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    word: Annotated[str, typer.Argument(help="A word or phrase of the prompt.")],
    without: Annotated[
        str | None, typer.Option(help="The prompt without it; by default the word is left out.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Features to list.")] = 12,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the ledger to.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Write the ledger as a picture.")] = None,
    graph: Annotated[
        Path | None, typer.Option(help="Write how features lead to one another: a picture, or a JSON file.")
    ] = None,
    steps: Steps = 25,
    guidance: Guidance = 3.0,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    world: Bundled = "shapes",
    pipeline: Pipeline = None,
    dictionary: Source = None,
    as_json: AsJson = False,
) -> None:
    """Tell which features carry what a word does to a picture.

    The entries add up to 1, the whole of what the word changes in the model's predictions for this picture.

    Example: diffusers-rtsae explain "a large red star on white" red --picture red.png
    """
    check_prompts([prompt], "PROMPT")
    for path, endings in ((out, (".json",)), (picture, PICTURES), (graph, (".json", *PICTURES))):
        if path is not None:
            check_output(path, endings)
    if any(path is not None and path.suffix.lower() in PICTURES for path in (picture, graph)):
        check_extras("analysis")
    _, folder = read_dictionary(dictionary, world=world)
    from ..pairs import left_out

    left = left_out(prompt, word)  # which says if the prompt has no such word
    without = left if without is None else without
    for remark in world.remarks(f"{prompt}, {without}") if pipeline is None else ():
        say_aside(remark)
    pipe = load_pipeline(pipeline, folder, world)
    from ..analysis.explain import explain as explain_word

    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    ledger = explain_word(
        pipe, prompt, word, without, seed=seed, features=count, batch_size=batch_size, progress=not as_json, **call
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        ledger.save(out)
    if picture is not None:
        from ..analysis.plots import plot_ledger

        _save_figure(plot_ledger(ledger), picture)
    if graph is not None:
        from ..analysis.graph import feature_graph

        found = feature_graph(pipe, ledger, batch_size=batch_size, **call)
        if graph.suffix.lower() == ".json":
            graph.parent.mkdir(parents=True, exist_ok=True)
            found.save(graph)
        else:
            from ..analysis.plots import plot_graph

            _save_figure(plot_graph(found), graph)
    if as_json:
        print(json.dumps(ledger.content()))
        return
    say(str(ledger))
    say_aside(
        f"Compared with {without!r}." + "".join(f" Written to {path}." for path in (out, picture, graph) if path)
    )


def _save_figure(figure, path: Path) -> None:
    from ..files import whole

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        figure.savefig(partial, format=path.suffix[1:].lower(), dpi=130)


@app.command()
def inspect(
    dictionary: Annotated[
        str | None, typer.Argument(help="Folder or Hub id of the dictionary; the world's by default.")
    ] = None,
    world: Bundled = "shapes",
    label: Annotated[
        str | None, typer.Option(help="Show only labels that contain this text, and latents whose name does.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a dictionary holds: its sites, metrics, labels and presets.

    Example: diffusers-rtsae inspect --world people --label woman
    """
    contents, _ = read_dictionary(dictionary, weights=False, world=world)
    from ..dictionary import search_labels, search_names

    named = search_names(contents, label)
    in_labels = label is None or any(label.lower() in one.lower() for one in contents.labels)
    labels = (
        list(contents.labels) if label is None else search_labels(contents, label) if in_labels or not named else []
    )
    metrics = contents.config.get("metrics") or {}
    if as_json:
        sites = {
            site: {"kind": sae.kind} | vars(sae.config) | {"metrics": metrics.get(site)}
            for site, sae in contents.sites.items()
        }
        content = {"base_model": contents.config.get("base_model"), "sites": sites, "presets": contents.presets}
        names = {f"{site}:{index}": entry for site, index, entry in named}
        print(json.dumps(content | {"labels": {name: contents.labels[name] for name in labels}, "names": names}))
        return
    say(f"for {contents.config.get('base_model') or 'an unnamed model'}")
    for site, sae in contents.sites.items():
        c, m = sae.config, metrics.get(site, {})
        kept = ("fvu_online", "fvu_teacher_forced", "l0_threshold", "dead")
        figures = "".join(f" {name} {m[name]}" for name in kept if name in m)
        say(
            f"{site}: {sae.kind}, {c.num_latents:,} latents of {c.in_channels} channels at {len(c.anchors)} anchors"
            f"{figures}"
        )
    rows = []
    for name in labels:
        measured = contents.labels[name].get("measured", {})
        latents = [str(i) for entry in contents.seen(name) for i in entry["latents"]]
        kept = ("effect", "effect_away", "success", "leakage", "valid", "prompts")
        rows.append([name, ", ".join(latents), ", ".join(f"{k} {measured[k]:.2g}" for k in kept if k in measured)])
    if rows:
        show_table(["label", "seen by latents", "measured"], rows)
    if named:
        several = len(contents.sites) > 1
        shown = named if label else named[:_NAMES]
        show_table(
            ["latent", "makes", "effect", "confidence"],
            [
                [f"{site}:{i}" if several else str(i), n["name"], f"{n['effect']:.2f}", f"{n['confidence']:.2f}"]
                for site, i, n in shown
            ],
        )
        if len(shown) < len(named):
            say_aside(f"These are the surest of {len(named)} names; --label finds others.")
    if contents.presets:
        say(f"presets: {', '.join(contents.presets)}")


@app.command()
def report(
    dictionary: Annotated[
        str | None, typer.Argument(help="Folder or Hub id of the dictionary; the world's by default.")
    ] = None,
    world: Bundled = "shapes",
    prompts: Annotated[
        Path | None, typer.Option(help="Text file of prompts, one a line, to show features on.")
    ] = None,
    steer_prompts: Annotated[list[str] | None, typer.Option("--steer", help="Prompt to steer; repeatable.")] = None,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    count: Annotated[
        int, typer.Option(min=0, help="Latents to show of each site, those active most often first.")
    ] = 512,
    steered: Annotated[int, typer.Option(min=0, help="Features to steer, labels first.")] = 32,
    full: Annotated[bool, typer.Option(help="Show 2,048 latents, and steer 128 features.")] = False,
    steps: Steps = 25,
    guidance: Guidance = 3.0,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    pipeline: Pipeline = None,
) -> None:
    """Explain a dictionary on one HTML page: its metrics, where each feature is active, and what it does.

    Example: diffusers-rtsae report --world people --steered 8 --out people.html
    """
    check_output(out, (".html", ".htm"))
    check_prompts(steer_prompts or [], "--steer")
    most, is_own = None, prompts is not None
    if not is_own:
        if pipeline is not None:
            raise ValueError("A report on another pipeline needs --prompts, a text file with one prompt a line.")
        prompts, most = bundled(world.prompts), None if full else 64
        steer_prompts = steer_prompts or [scenes[0][0] for scenes in world.scenes.values()][: None if full else 1]
    from ..files import read_lines

    texts = read_lines(prompts)[:most]
    count, steered = (2048, 128) if full else (count, steered)
    contents, folder = read_dictionary(dictionary, world=world)
    if not is_own:
        texts += unnamed(contents.labels, texts, world)
    pipe = load_pipeline(pipeline, folder, world)
    from ..analysis.report import write_report

    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_report(pipe, out, texts, steer_prompts or (), count, steered, batch_size=batch_size, seed=seed, **call)
    say(f"{out}, {out.stat().st_size / 2**20:.1f} MiB: open it in a browser")
