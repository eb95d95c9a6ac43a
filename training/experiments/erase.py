"""Erasing what the dictionary sees, beside other ways of taking a concept out of a picture.

    python -m training.experiments.erase --scorer examples/shapes-judge --out training/results/erase.json

Each picture has a concept of its own: the shape of the first of two objects, the shape of a single object, or, in a
world of people, the role. It is erased where the label's latents see it, or under a mask that knows where the object
is. Tokens become the mean of the others at their mean length, or else the mere mean, the nearest, or one drawn at
random. Or the concept is taken away as until now: by the label at strength −1, by ablating the latents that the label
is seen by, or by scaling the latents that are more present when prompts name it, as SAeUron (2501.18052) does.
Pictures that do not show what their prompt names without any edit are left out.

*Artefacts* are the share of the activations of edited tokens, after the edit, that are outside the middle 99 % of all
activations without it at the same step: in length, and in single dimensions. Rows are added to the JSON as they are
measured; the same command continues where it was stopped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from diffusers_rtsae import Dictionary, load_dictionary
from diffusers_rtsae.analysis.find import find_features
from diffusers_rtsae.analysis.record import Recorder
from diffusers_rtsae.steering.fold import Erasure, Seen

from ..worlds import Scene, World
from ..worlds.pictures import add_models, calling, generate, load_models, new_parser, parse
from .results import Results, table
from .unlearn import entries

FIGURES = {
    "one of two": {
        "gone": "nothing in its place",
        "unlike": "not that shape there",
        "kept": "other's shape and colour",
        "same": "all that is read of the other",
        "valid": "valid",
    },
    "one object": {
        "gone": "not that shape",
        "nothing": "no object read",
        "background": "background read as it was",
        "empty": "not a trace left",
        "valid": "valid, or not a trace",
    },
    "people": {"gone": "not that role", "who": "who", "tone": "tone", "style": "style", "valid": "valid"},
}
ARTEFACTS = {"edited": "tokens edited", "length": "artefacts: length", "dimensions": "dimensions"}


def markdown(rows: list[dict]) -> str:
    """A table for each kind of picture."""
    text = []
    for what, figures in FIGURES.items():
        own = [row for row in rows if row["what"] == what]
        heads = {**figures, **ARTEFACTS}
        lines = [[row["edit"], *("–" if row[h] is None else f"{row[h]:.2f}" for h in heads)] for row in own]
        if own:
            text.append(f"{what.capitalize()} ({own[0]['n']} pictures):\n\n{table(['edit', *heads.values()], lines)}")
    return "\n".join(text)


def mean(self: Erasure, tokens: torch.Tensor, seen: Seen) -> torch.Tensor:
    """Exchange tokens for the mean of all free ones, as short as it is."""
    return seen.share * ((tokens * seen.free).sum(1, keepdim=True) / seen.free.sum(1, keepdim=True) - tokens)


def nearest(self: Erasure, tokens: torch.Tensor, seen: Seen) -> torch.Tensor:
    """Exchange tokens of a square grid for the free one that is nearest."""
    side = int(tokens.shape[1] ** 0.5)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).float()
    return _taking(tokens, seen, -torch.cdist(places, places))


def drawn(self: Erasure, tokens: torch.Tensor, seen: Seen) -> torch.Tensor:
    """Exchange each token for a free one that is drawn at random, the same at each step."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(1, tokens.shape[1], tokens.shape[1], generator=generator)
    return _taking(tokens, seen, numbers)


def _taking(tokens: torch.Tensor, seen: Seen, order: torch.Tensor) -> torch.Tensor:
    """Exchange each token for the free one with the greatest number in `order`, `(…, tokens, tokens)`."""
    chosen = (order - 1e9 * (1 - seen.free.mT)).argmax(2)[..., None]
    return seen.share * (tokens.gather(1, chosen.expand(tokens.shape)) - tokens)


class Artefacts:
    """Activations without an edit, and how many of those that an edit changes are unlike them."""

    def __init__(self, plain: dict[str, torch.Tensor]):
        self.ranges = {  # of all tokens of all pictures, at each step
            site: [_middle(h.flatten(0, 1)) for h in (_length(values), values)] for site, values in plain.items()
        }

    def figures(self, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, float | None]:
        """`edited`, the share of the tokens that were changed, and the shares of these that are outside the range by
        `length`, and in their `dimensions`. Activations are `(pictures, tokens, steps, d)`."""
        edited, length, dimensions, all_tokens = 0, 0.0, 0.0, 0
        for site, (of_length, of_dimension) in self.ranges.items():
            changed = (before[site] != after[site]).any(-1)
            outside = [
                (values < low) | (values > high)
                for values, (low, high) in ((_length(after[site]), of_length), (after[site], of_dimension))
            ]
            edited, all_tokens = edited + int(changed.sum()), all_tokens + changed.numel()
            length += float(outside[0][..., 0][changed].sum())
            dimensions += float(outside[1].float().mean(-1)[changed].sum())
        shares = {"length": length / edited, "dimensions": dimensions / edited} if edited else {}
        return {"length": None, "dimensions": None} | shares | {"edited": edited / all_tokens}


def _middle(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ends of the middle 99 % of `(tokens, steps, n)`: two tensors `(steps, n)`."""
    ordered, outside = values.sort(0).values, round(0.005 * len(values))
    return ordered[outside], ordered[-1 - outside]


def _length(values: torch.Tensor) -> torch.Tensor:
    return values.norm(dim=-1, keepdim=True)


class Pictures:
    """
    Pictures with a concept each, drawn with an edit or without.

    Args:
        what (`str`): of the kinds in `FIGURES`.
        scenes (`list[tuple[Scene, ...]]`): the objects of each picture, that with the concept first.
        factor (`str`): of the concept.
    """

    def __init__(
        self, world: World, pipe: DiffusionPipeline, scorer, a, what: str, scenes: list[tuple[Scene, ...]],
        prompts: list[str], factor: str, seed: int,
    ):  # fmt: skip
        self.world, self.pipe, self.scorer, self.a, self.what, self.factor = world, pipe, scorer, a, what, factor
        self.scenes, self.prompts, self.seeds = scenes, prompts, range(seed, seed + len(prompts))
        self.plain, activations, _ = self.draw(None)
        self.artefacts = Artefacts(activations)
        self.read = scorer.read(self.plain)
        self.counted = [i for i in range(len(scenes)) if self.shows(i, self.read[i])]

    @property
    def values(self) -> list[str]:
        return [objects[0][self.factor] for objects in self.scenes]

    def draw(
        self, edit: tuple[Dictionary, dict, dict] | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The pictures, and the activations of the bundled dictionary's sites before and after an edit."""
        sites = list(load_dictionary(self.a.dictionary).sites)
        with contextlib.ExitStack() as stack:
            before = stack.enter_context(Recorder(self.pipe, sites))
            if edit is not None:
                dictionary, features, options = edit
                self.pipe.load_rtsae(dictionary)
                stack.callback(self.pipe.unload_rtsae)
                stack.enter_context(self.pipe.rtsae_steering(features, **options))
            after = stack.enter_context(Recorder(self.pipe, sites))
            images = generate(self.pipe, self.prompts, self.seeds, self.a.steps, self.a.guidance)
        return images, *({site: one.trajectories(site) for site in sites} for one in (before, after))

    def shows(self, i: int, reading: dict) -> bool:
        """Whether a reading is of what the prompt names."""
        world, objects = self.world, self.scenes[i]
        if self.what == "one of two":
            there = _by_place(world, reading)
            return reading["valid"] == "yes" and all(
                there.get(o["place"], {}).get("shape") == o["shape"] for o in objects
            )
        seen = world.seen(reading)
        return bool(seen["valid"]) and seen[self.factor] == objects[0][self.factor]

    def figures(self, images: torch.Tensor) -> dict[str, float]:
        """What became of the pictures that count."""
        readings, found = self.scorer.read(images), dict.fromkeys(FIGURES[self.what], 0)
        for i in self.counted:
            for name, holds in self._judge(i, images[i], readings[i]).items():
                found[name] += bool(holds)
        return {name: round(count / len(self.counted), 4) for name, count in found.items()}

    def _judge(self, i: int, image: torch.Tensor, reading: dict) -> dict[str, bool]:
        world, scenes, was = self.world, self.scenes[i], self.read[i]
        if self.what == "one of two":
            before, after = _by_place(world, was), _by_place(world, reading)
            first, second = (scene["place"] for scene in scenes)
            other, then = after.get(second, {}), before[second]
            return {
                "gone": first not in after,
                "unlike": after.get(first, {}).get("shape") != scenes[0]["shape"],
                "kept": all(other.get(name) == then[name] for name in ("shape", "colour")),
                "same": other == then,
                "valid": reading["valid"] == "yes",
            }
        seen, then = world.seen(reading), world.seen(was)
        gone = seen[self.factor] != scenes[0][self.factor]
        if self.what == "people":
            return {"gone": gone, **{f: seen[f] == then[f] for f in ("who", "tone", "style")}, "valid": seen["valid"]}
        is_empty = world.is_empty(image, scenes[0], self.plain[i])
        return {
            "gone": gone,
            "nothing": not world.objects(reading),
            "background": seen["background"] == then["background"],
            "empty": is_empty,
            "valid": is_empty or seen["valid"],
        }


def _by_place(world: World, reading: dict) -> dict[str, Scene]:
    return {scene["place"]: scene for scene in world.objects(reading)}


@contextlib.contextmanager
def exchanging(way: Callable) -> Iterator[None]:
    """Inside the `with` block tokens are exchanged in another way."""
    with mock.patch.object(Erasure, "exchange", way):
        yield


def pictures_of(world: World, pipe: DiffusionPipeline, scorer, a) -> Iterator[Pictures]:
    """The kinds of pictures that a world has."""
    common = (world, pipe, scorer, a)
    pairs, prompts = world.two(8 * a.prompts, 73_000)
    if pairs:
        unlike = [i for i, (one, other) in enumerate(pairs) if one["shape"] != other["shape"]][: a.prompts]
        scenes = [pairs[i] for i in unlike]
        yield Pictures(*common, "one of two", scenes, [prompts[i] for i in unlike], "shape", 730_000)
    what, factor = ("one object", "shape") if pairs else ("people", "role")
    values = [value for name, value in world.targets if name == factor]
    probes = [world.probe(factor, v, "contradicted", -(-a.prompts // len(values)), seed=730) for v in values]
    single = [(scene | {factor: one.value},) for one in probes for scene in one.scenes]
    yield Pictures(*common, what, single, [text for one in probes for text in one.prompted], factor, 740_000)


def most_present(world: World, pipe: DiffusionPipeline, dictionary: Dictionary, factor: str, a) -> Dictionary:
    """A label for each value of a factor, made of the latents that are more present when prompts name it."""
    labels = {}
    pipe.load_rtsae(dictionary)
    for value in tqdm([v for f, v in world.targets if f == factor], desc="features", unit="concept"):
        choose = world.probe(factor, value, "contradicted", 8, seed=601)
        found = find_features(
            pipe, choose.prompted, choose.prompts, a.features, seeds=1, by="presence", **calling(pipe, a)
        )
        labels[value] = {"features": entries(found)}
    pipe.unload_rtsae()
    return Dictionary(dictionary.sites, labels, dictionary.config)


class Way(NamedTuple):
    """
    How a concept is taken away.

    strength, neutral (`float`): of its feature, and that of the features of other pictures.
    few (`bool`): by the latents that are more present when prompts name it, instead of by its label.
    exchange (`Callable`): in which way tokens are exchanged.
    options (`dict`): of the edit.
    """

    strength: float = 1.0
    neutral: float = 0.0
    few: bool = False
    exchange: Callable = Erasure.exchange
    options: dict = {"operation": "erase"}


def ways_of(pictures: Pictures, features: int) -> dict[str, Way | None]:
    """The ways to compare on some pictures, by what their rows call them."""
    ways: dict[str, Way | None] = {"no edit": None, "erased where the label is seen": Way()}
    if pictures.world.local:
        objects = pictures.world.masks([scene[0] for scene in pictures.scenes], pictures.world.image_size)
        painted = {"operation": "erase", "where": "everywhere", "mask": objects}
        ways["erased under the true mask"] = Way(options=painted)
    ways["label at −1"] = Way(-1.0, options={})
    ways["label ablated"] = Way(options={"operation": "ablate", "apply_to": "all"})
    if pictures.what == "one of two":
        for branches in ("cond", "contrast"):
            options = {"operation": "erase", "apply_to": branches}
            ways[f"erased, apply_to={branches!r}"] = Way(options=options)
        for exchange, taken in ((mean, "the mere mean"), (nearest, "the nearest"), (drawn, "drawn ones")):
            ways[f"erased, for {taken}"] = Way(exchange=exchange)
    scaled = {"operation": "scale", "apply_to": "all", "clip": False}
    ways[f"{features} latents × 0"] = Way(0.0, neutral=1.0, few=True, options=scaled)
    ways[f"erased where {features} latents see it"] = Way(few=True)
    return ways


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "scorer", "dictionary")
    parser.add_argument("--out", type=Path, default=Path("runs/erase.json"))
    parser.add_argument("--prompts", type=int, default=36, help="of each kind of picture")
    parser.add_argument("--features", type=int, default=8, help="latents of a concept, beside its label")
    a, world = parse(parser)
    pipe, scorer = load_models(a)
    dictionary: Dictionary = load_dictionary(a.dictionary)
    results = Results(a, [a.pipeline, a.dictionary])
    names = {(label["factor"], label["value"]): name for name, label in dictionary.labels.items()}
    few: Dictionary | None = None
    kinds = [(pictures, ways_of(pictures, a.features)) for pictures in pictures_of(world, pipe, scorer, a)]
    todo = [(place, pictures, *one) for pictures, ways in kinds for place, one in enumerate(ways.items())]
    for _, pictures, edit, way in tqdm(sorted(todo, key=lambda one: one[0]), desc="ways", unit="way"):
        row = {"what": pictures.what, "edit": edit, "n": len(pictures.counted)}
        if results.has(what=pictures.what, edit=edit):
            continue
        if way is None:
            results.add(row | pictures.figures(pictures.plain) | {"length": None, "dimensions": None, "edited": 0.0})
            continue
        if way.few and few is None:
            few = most_present(world, pipe, dictionary, pictures.factor, a)
        strengths = {
            value if way.few else names[pictures.factor, value]: [
                way.strength if value == own else way.neutral for own in pictures.values
            ]
            for value in dict.fromkeys(pictures.values)
        }
        with exchanging(way.exchange):
            images, before, after = pictures.draw((few if way.few else dictionary, strengths, way.options))
        artefacts = pictures.artefacts.figures(before, after)
        artefacts = {name: share if share is None else round(share, 4) for name, share in artefacts.items()}
        results.add(row | pictures.figures(images) | artefacts)
    results.tell(markdown(results.rows))


if __name__ == "__main__":
    main()
