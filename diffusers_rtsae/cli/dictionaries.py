"""Commands that move dictionaries: `convert`, `list` and `push`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, Guidance, Steps, app, read_dictionary, say, show_entry


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder or Hub id of what was published.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the dictionary to.")],
    site: Annotated[
        list[str] | None,
        typer.Option(help="Site to convert, repeatable; or the site that a single autoencoder is of."),
    ] = None,
    subfolder: Annotated[str | None, typer.Option(help="Subfolder of the folder or repository.")] = None,
    pipeline: Annotated[
        str | None, typer.Option(help="Pipeline of its model, to measure how active latents are.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file of prompts, one a line, to measure on.")] = None,
    steps: Steps = 25,
    guidance: Guidance = 7.5,
    as_json: AsJson = False,
) -> None:
    """Convert what others published: SDLens, Concept Steerers, sparsify, SAELens, dictionary_learning, DifFRACT, and
    overcomplete.

    Of pickles only tensors are read. With --pipeline and --prompts the statistics of latents are measured; without,
    they are those of the files, if these have any.

    Example: diffusers-rtsae convert Artalmaz31/DifFRACT flux-saes --subfolder temporal-aware-saes
    """
    from ..dictionary import convertible
    from ..files import read_lines

    if (pipeline is None) != (prompts is None):
        raise ValueError("Expected both --pipeline and --prompts, or neither.")
    dictionary, measured = convertible(source, site, subfolder=subfolder), "as the files say, or left at 1"
    if pipeline:
        import torch
        from diffusers import DiffusionPipeline

        from ..analysis.statistics import measure

        on_gpu = torch.cuda.is_available()
        pipe = DiffusionPipeline.from_pretrained(pipeline, dtype=torch.float16 if on_gpu else torch.float32)
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
        say(f"{out} has {', '.join(dictionary.sites)}; statistics: {measured}")


@app.command("list")
def list_(
    refresh: Annotated[bool, typer.Option(help="Ask the Hub as well.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the dictionaries that are known to exist.

    Example: diffusers-rtsae list --refresh
    """
    from ..dictionary import list_pretrained

    known = list_pretrained(refresh)
    if as_json:
        print(json.dumps(known))
    else:
        for entry in known:
            sites = entry["sites"]
            sites = ", ".join(sites) if isinstance(sites, list) else sites
            whose = "ours" if entry["ours"] else "by others"
            show_entry(
                entry["id"],
                f"for {entry['base_model'] or 'a model that is not known'}, {whose}, licence "
                f"{entry['license'] or 'not known'}",
                f"{sites or 'sites not known'}; {entry['size'] or 'size not known'}",
                entry["description"] or "",
            )


@app.command()
def push(
    dictionary: Annotated[str, typer.Argument(help="Folder of the dictionary.")],
    repo_id: Annotated[str, typer.Argument(help="Repository on the Hub: user/name.")],
    private: Annotated[bool, typer.Option(help="Create the repository as a private one.")] = False,
) -> None:
    """Upload a dictionary and its model card to the Hub. Log in first: hf auth login.

    Example: diffusers-rtsae push runs/sd15 you/sd15-rtsae
    """
    read_dictionary(dictionary)
    from ..dictionary import load_dictionary

    say(load_dictionary(dictionary).push_to_hub(repo_id, private=private or None))
