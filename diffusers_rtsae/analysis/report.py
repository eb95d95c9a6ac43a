"""A report of a dictionary on one page: figures, a table of its features, and for each its pictures and its effect."""

from __future__ import annotations

import base64
import functools
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..dictionary import Dictionary
from ..files import write_text
from ..models import FeatureTimes
from ..pairs import has_phrase
from ..pipeline import get_dictionary, own_size
from .features import labels_of
from .record import record

STRENGTHS = (-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
_PAGE = Path(__file__).with_name("report.html")
_SHOWN_STEPS = 5
_MAP_SIDES = (16, 12, 8, 6, 4)  # sides that maps are averaged down to; the first is used with which
_MAP_BYTES = 5_000_000  # is enough for all maps
_NAMED = 1e6  # added to the rank of a picture whose prompt names the label, so that it comes first


@dataclass
class _Activity:
    """
    The activity of a site's features in the pictures in which they are most present, the strongest first.

    Args:
        image (`torch.Tensor`): indices of the pictures, `(features, top)`.
        peak (`torch.Tensor`): the largest presence of a step, `(features, top)`.
        rank (`torch.Tensor`): what the pictures are sorted by, `(features, top)`: `peak`, plus `_NAMED` if the prompt
            names the feature.
        curve (`torch.Tensor`): the presence at each of the sampler's steps, `(features, top, steps)`.
        maps (`torch.Tensor`): the activation at the shown steps, `(features, top, shown, height, width)`.
    """

    image: torch.Tensor
    peak: torch.Tensor
    rank: torch.Tensor
    curve: torch.Tensor
    maps: torch.Tensor


def _best(activities: Sequence[_Activity], top: int) -> _Activity:
    """The `top` strongest pictures of each feature among several activities."""
    fields = {name: torch.cat([getattr(a, name) for a in activities], 1) for name in _Activity.__annotations__}
    order = fields["rank"].topk(min(top, fields["rank"].shape[1]), dim=1).indices
    return _Activity(**{name: torch.take_along_dim(v, _like(order, v), 1) for name, v in fields.items()})


def _like(index: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """`index` `(a, b)`, reshaped to as many dimensions as `tensor` has."""
    return index.reshape(*index.shape, *[1] * (tensor.ndim - 2))


def _shown(steps: int) -> list[int]:
    """Evenly spaced steps, first and last included."""
    count = min(_SHOWN_STEPS, steps)
    return [round(i * (steps - 1) / max(count - 1, 1)) for i in range(count)]


def _map_side(features: int, top: int) -> int:
    """The largest side with which the maps of all features fit into `_MAP_BYTES`."""
    return next((s for s in _MAP_SIDES if features * top * _SHOWN_STEPS * s * s <= _MAP_BYTES), _MAP_SIDES[-1])


def _activity(recording, site: str, columns: list[list[int]], named: torch.Tensor, first: int, side: int) -> _Activity:
    """The activity of features in a recording. Each of `columns` is a feature: a list of latents whose activations are
    summed. `named`, `(features, images)`, says whether the prompt of an image names the feature."""
    height, width = recording.sizes[site]
    size = (min(height, side), min(width, side))
    rows = sorted({row for column in columns for row in column})
    place, shown = {row: i for i, row in enumerate(rows)}, _shown(len(recording.timesteps))
    curves, maps = [], []
    for step, latents in enumerate(recording.latents(site, rows)):
        features = torch.stack([latents[..., [place[row] for row in column]].sum(-1) for column in columns], 0).cpu()
        curves.append(features.mean(2))
        if step in shown:
            maps.append(torch.nn.functional.adaptive_avg_pool2d(features.unflatten(2, (height, width)), size))
    curve = torch.stack(curves, 2)
    image = torch.arange(first, first + len(recording.images)).expand(len(columns), -1)
    peak = curve.amax(2)
    return _Activity(image, peak, peak + _NAMED * named, curve, torch.stack(maps, 2))


def _picture(image: Image.Image, side: int) -> str:
    """A picture as a `data:` address, at most `side` pixels high and wide."""
    image = image.convert("RGB")
    image.thumbnail((side * image.width // image.height, side))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=72, method=6)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _bytes(tensor: torch.Tensor) -> str:
    """A tensor of numbers in [0, 1] as base64, one byte per number."""
    return base64.b64encode((tensor.clamp(0, 1) * 255).round().to(torch.uint8).numpy().tobytes()).decode()


def _strips(
    pipe, keys: Sequence, prompts: Sequence[str], seed: int, batch_size: int, side: int, adapter_name, call: dict,
    drawn: Callable[[int], None],
) -> Iterator[tuple[list[str], float]]:  # fmt: skip
    """
    For each feature, yield one strip per prompt, with the prompt at all `STRENGTHS` side by side, and the change that
    strength 1 makes: root mean square over the pixels, 0 to 1.

    Args:
        drawn (`Callable`): called with the number of pictures after each batch.
    """

    def generate(texts: list[str]) -> list[Image.Image]:
        generators = [torch.Generator().manual_seed(seed) for _ in texts]
        images = pipe(texts, generator=generators, **own_size(pipe) | call).images
        drawn(len(texts))
        return images

    plain = [generate([prompt])[0] for prompt in prompts]
    jobs = [(key, prompt, strength) for key in keys for prompt in prompts for strength in STRENGTHS if strength]
    done: list[Image.Image] = []
    each = len(prompts) * (len(STRENGTHS) - 1)
    for start in range(0, len(jobs), batch_size):
        part = jobs[start : start + batch_size]
        steered = dict.fromkeys(key for key, _, _ in part)
        strengths = {name: [s if key == name else 0.0 for key, _, s in part] for name in steered}
        with pipe.rtsae_steering(strengths, adapter_name):
            done += generate([prompt for _, prompt, _ in part])
        while len(done) >= each:
            images, done = iter(done[:each]), done[each:]
            strips, changes = [], []
            for unsteered in plain:
                strip = Image.new("RGB", (unsteered.width * len(STRENGTHS), unsteered.height))
                for x, strength in enumerate(STRENGTHS):
                    image = next(images) if strength else unsteered
                    strip.paste(image, (x * unsteered.width, 0))
                    if strength == 1:
                        pixels = [np.asarray(one.convert("RGB"), dtype=float) / 255 for one in (image, unsteered)]
                        changes.append(float(np.square(pixels[0] - pixels[1]).mean() ** 0.5))
                strips.append(_picture(strip, side))
            yield strips, round(sum(changes) / len(changes), 4)


def _choose(dictionary: Dictionary, count: int) -> list[str | tuple[str, int]]:
    """The labels, and for each site the `count` latents that are active most often, without dead ones."""
    chosen: list[str | tuple[str, int]] = []
    for name, label in dictionary.labels.items():
        if any(entry["site"] in dictionary.sites for entry in label["features"]):
            chosen.append(name)
    for site, sae in dictionary.sites.items():
        known = int((sae.density > 0).sum()) or len(sae.density)  # a dictionary may have no statistics
        chosen += [(site, index) for index in sae.density.argsort(descending=True)[: min(count, known)].tolist()]
    return chosen


def _places(dictionary: Dictionary, key: str | tuple[str, int]) -> dict[str, list[int]]:
    """For each site, the latents that a feature's activation is read from; without sites that have none."""
    places: dict[str, list[int]] = {}
    for entry in dictionary.seen(key):
        if entry["latents"]:
            places.setdefault(entry["site"], []).extend(entry["latents"])
    return {site: list(dict.fromkeys(latents)) for site, latents in places.items()}


def _names(dictionary: Dictionary, key: str | tuple[str, int], prompt: str) -> bool:
    """Whether a prompt names a label, or the value that it stands for."""
    if not isinstance(key, str):
        return False
    return any(has_phrase(prompt, str(name)) for name in (key, dictionary.labels[key].get("value", key)))


def _facts(dictionary: Dictionary, key: str | tuple[str, int], path: torch.Tensor) -> dict:
    """What the dictionary itself knows about a feature with the trajectory `path`."""
    entry = dictionary.seen(key)[0]
    sae = dictionary.sites[entry["site"]]
    times = FeatureTimes.of((path / sae.spread.cpu()[:, None]).norm(dim=1)[None])
    facts = {
        "name": key if isinstance(key, str) else str(key[1]),
        "site": list(dictionary.sites).index(entry["site"]),
        "latents": entry["latents"],
        "density": max(sae.density[entry["latents"]].tolist()),
        "length": [round(v, 4) for v in (times.length[0] / sae.config.in_channels**0.5).tolist()],
        "peak": int(times.peak),
        "onset": int(times.onset),
        "lifetime": int(times.lifetime),
    }
    if isinstance(key, str):
        label = dictionary.labels[key]
        return facts | {
            "label": True,
            "factor": label.get("factor"),
            "value": label.get("value"),
            "measured": label.get("measured", {}),
            "options": label.get("edit", {}),
        }
    return facts | {"labels": labels_of(dictionary, *key), "makes": dictionary.name_of(*key)}


def _similar(dictionary: Dictionary, keys: list, paths: list[torch.Tensor], count: int = 4) -> list[list[list]]:
    """For each feature, the others at its site with the most similar trajectories, each as `[position, cosine]`."""
    similar: list[list[list]] = [[] for _ in keys]
    sites = [dictionary.seen(key)[0]["site"] for key in keys]
    for site, sae in dictionary.sites.items():
        at_site = [i for i, of in enumerate(sites) if of == site]
        if len(at_site) < 2:
            continue
        scaled = torch.stack([paths[i] for i in at_site]) / sae.spread.cpu()[:, None]
        directions = torch.nn.functional.normalize(scaled.flatten(1), dim=1)
        for part in torch.arange(len(at_site)).split(1024):
            cosines = directions[part] @ directions.T
            cosines[torch.arange(len(part)), part] = -2
            values, others = cosines.topk(min(count, len(at_site) - 1), dim=1)
            for i, near, value in zip(part.tolist(), others.tolist(), values.tolist(), strict=True):
                similar[at_site[i]] = [[at_site[j], round(v, 2)] for j, v in zip(near, value, strict=True)]
    return similar


def _json(data) -> str:
    """JSON that can be embedded in a page: without tags, and with `null` instead of NaN and infinity."""

    def clean(value):
        if isinstance(value, dict):
            return {key: clean(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(clean(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def write_report(
    pipeline,
    out: str | Path,
    prompts: Sequence[str],
    steer_prompts: Sequence[str] = (),
    count: int = 512,
    steered: int = 32,
    top: int = 4,
    batch_size: int = 16,
    seed: int = 0,
    side: int = 96,
    adapter_name: str | None = None,
    **call,
) -> None:
    """
    Write a report of a loaded dictionary as one self-contained HTML file. It has figures and a table of features to
    search, sort and filter. Each feature has its strongest pictures with heat maps over denoising time, a curve of its
    presence, and pictures steered by it.

    Args:
        pipeline (`DiffusionPipeline`): with a dictionary loaded. Nothing has to be set on it.
        out (`str` or `Path`): the file to write.
        prompts (`Sequence[str]`): one picture is generated for each, and features are looked for in it.
        steer_prompts (`Sequence[str]`): prompts to steer features on; the first of `prompts` by default.
        count (`int`): for each site, the number of latents, those that are active most often. All labels are shown.
        steered (`int`): the number of features to steer, labels first; seven pictures per feature and prompt. Labels
            whose operation is not `add` are left out.
        top (`int`): pictures shown for each feature.
        batch_size (`int`): pictures generated at once; their activations are in memory together.
        seed (`int`): of the noise.
        side (`int`): height of a picture in the file, in pixels.
        adapter_name (`str`, *optional*): of the dictionary.
        call: passed to the pipeline.

    Raises:
        `ValueError`: there are no prompts, or there is no feature to report.
    """
    if not prompts:
        raise ValueError("Expected prompts to look for features in, got none.")
    dictionary = get_dictionary(pipeline, adapter_name)
    sites, keys = list(dictionary.sites), _choose(dictionary, count)
    if not keys:
        raise ValueError("Expected features to report, got none: the dictionary has no labels, and `count` is 0.")
    places = [_places(dictionary, key) for key in keys]
    at = {site: [i for i, place in enumerate(places) if site in place] for site in sites}
    at = {site: features for site, features in at.items() if features}
    columns = {site: [places[i][site] for i in features] for site, features in at.items()}

    pictures: list[str] = []
    activities: dict[str, _Activity] = {}
    timesteps: list[float] = []
    activations = {dictionary.sites[site].config.activation for site in at}
    side_of_maps = _map_side(sum(map(len, places)), top)
    steer_prompts = list(steer_prompts) or list(prompts[:1])
    adding = [i for i, key in enumerate(keys) if dictionary.features(key)[1].get("operation", "add") == "add"]
    adding = adding[:steered]
    recorded, each = len(prompts) * len(activations), len(steer_prompts) * (len(STRENGTHS) - 1)
    total = recorded + (len(steer_prompts) + len(adding) * each if adding else 0)
    shown = TextColumn("pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*shown) as bar:
        drawn = functools.partial(bar.advance, bar.add_task("pictures", total=total))
        for first in range(0, len(prompts), batch_size):
            part = list(prompts[first : first + batch_size])
            for activation in activations:  # a recording reads one activation
                same = [site for site in at if dictionary.sites[site].config.activation == activation]
                generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
                recording = record(pipeline, part, adapter_name, same, generator=generators, **call)
                for site in same:
                    named = torch.tensor([[_names(dictionary, keys[i], prompt) for prompt in part] for i in at[site]])
                    new = _activity(recording, site, columns[site], named, first, side_of_maps)
                    activities[site] = _best([activities[site], new] if site in activities else [new], top)
                drawn(len(part))
            timesteps, aspect = recording.timesteps, recording.images[0].width / recording.images[0].height
            pictures += [_picture(image, side) for image in recording.images]

        paths = [dictionary.trajectory(key) for key in keys]
        facts = [_facts(dictionary, key, path) for key, path in zip(keys, paths, strict=True)]
        for feature, similar in zip(facts, _similar(dictionary, keys, paths), strict=True):
            feature["similar"] = similar
        for site, features in at.items():
            activity = activities[site]
            for row, i in enumerate(features):
                highest = max(activity.maps[row].max().item(), 1e-6)
                is_named = activity.rank[row] >= _NAMED  # these pictures have what steering by the label makes
                shown = is_named if is_named.any() else activity.peak[row] > 0
                place = {
                    "site": sites.index(site),
                    "latents": places[i][site],
                    "named": bool(is_named.any()),
                    "top": [
                        [image, round(peak, 3)]
                        for image, peak in zip(
                            activity.image[row][shown].tolist(), activity.peak[row][shown].tolist(), strict=True
                        )
                    ],
                    "maps": _bytes(activity.maps[row][shown] / highest),
                    "highest": round(highest, 3),
                    "curve": [round(v, 4) for v in activity.curve[row][shown].mean(0).tolist()] if shown.any() else [],
                }
                facts[i].setdefault("places", []).append(place)
        for feature in facts:
            feature |= next(place for place in feature["places"] if place["site"] == feature["site"])
        strips = _strips(
            pipeline, [keys[i] for i in adding], steer_prompts, seed, batch_size, side, adapter_name, call, drawn
        )
        for i, (strip, change) in zip(adding, strips, strict=True):
            facts[i] |= {"strips": strip, "change": change}

    metrics = dictionary.config.get("metrics") or {}
    data = {
        "base_model": dictionary.config.get("base_model"),
        "sites": [
            {
                "name": site, "channels": r.config.in_channels, "latents": r.config.num_latents, "k": r.config.k,
                "anchors": list(r.config.anchors), "metrics": metrics.get(site) or {},
                "map": list(activities[site].maps.shape[-2:]) if site in activities else [0, 0],
            }
            for site, r in dictionary.sites.items()
        ],
        "timesteps": timesteps, "shown": _shown(len(timesteps)), "strengths": STRENGTHS, "prompts": list(prompts),
        "steer_prompts": steer_prompts,
        "images": pictures, "aspect": aspect, "features": facts,
    }  # fmt: skip
    write_text(Path(out), _PAGE.read_text(encoding="utf-8").replace("/*DATA*/", _json(data), 1))
