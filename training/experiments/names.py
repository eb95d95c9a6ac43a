"""Are the names of latents right? Each is compared with what the latent makes, as a scorer sees it that names nothing.

    python -m training.experiments.names --out training/results/names.json

Latents are chosen without their names: those whose slope towards a value of the world stands out most, on prompts that
leave its factor open. Each is added at strength 1 to pictures of prompts that leave one factor open. A latent *makes*
the values whose share among these pictures rises by at least half. A name is right if it says one of them. Beside it
two other ways to name a latent: the value whose prompts show it most (presence), and the value of the label whose
direction is most like its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from diffusers_rtsae import Dictionary, load_dictionary
from diffusers_rtsae.analysis.exchanged import ExchangedStates
from diffusers_rtsae.analysis.names import Names, name_features
from diffusers_rtsae.analysis.record import record
from diffusers_rtsae.analysis.vocabulary import Exchange, Exchanges
from diffusers_rtsae.files import read_lines
from diffusers_rtsae.pairs import has_phrase
from diffusers_rtsae.pipeline import get_dictionary
from diffusers_rtsae.worlds import WORLDS, bundled

from ..worlds import World
from ..worlds.pictures import add_models, calling, generate, load_models, new_parser, parse
from .results import Results, table

RISE = 0.5  # of a value's share of pictures, for a latent to make it
SURE = (0.9, 0.7)  # least confidences of the table's rows
WAYS = {"named": "name", "presence": "by presence", "label": "most similar label"}


def open_pairs(world: World, pictures: int, seed: int) -> Exchanges:
    """For each steered factor some prompts that leave it open, each with all its values."""
    prompts, changed = [], []
    for factor in world.steered:
        for i, scene in enumerate(world.sample(pictures, seed=seed, held_out=False)):
            prompts.append(world.describe([scene], seed + i, leave_open=(factor,))[0])
            values = [value for f, value in world.targets if f == factor]
            said = [world.describe([scene | {factor: value}], seed + i)[0] for value in values]
            changed += [Exchange(len(prompts) - 1, f"{factor}: {v}", p) for v, p in zip(values, said, strict=True)]
    return Exchanges(prompts, changed)


def population(pipe, world: World, count: int, call: dict) -> list[tuple[str, int]]:
    """The latents whose slope towards a value stands out most among the slopes of all latents."""
    slopes = ExchangedStates(pipe, open_pairs(world, 4, seed=13_000_000), seed=13_000_000, **call).slopes(lambda: None)
    found = []
    for site, added in slopes.added.items():
        highest = ((added - added.mean(1, keepdim=True)) / added.std(1, keepdim=True)).amax(0)
        found += [(float(highest[i]), site, i) for i in highest.topk(min(count, len(highest))).indices.tolist()]
    return [(site, index) for _, site, index in sorted(found, reverse=True)[:count]]


def values_of_words(world: World, words: list[str]) -> dict[str, str]:
    """The value that each word says, `factor: value`: in the world's descriptions it stands with no other value."""
    scenes = world.sample(3000, seed=14_000_000, held_out=False)
    prompts = world.describe(scenes, 0)
    said = {}
    for word in words:
        holders = [scene for scene, prompt in zip(scenes, prompts, strict=True) if has_phrase(prompt, word)]
        for factor in world.steered:
            values = Counter(scene[factor] for scene in holders)
            if len(values) == 1 and len(holders) >= 5 and (factor, next(iter(values))) in world.targets:
                said[word] = f"{factor}: {next(iter(values))}"
    return said


def by_presence(pipe, world: World, latents: list[tuple[str, int]], call: dict) -> list[str]:
    """For each latent the value whose prompts show it most, in standard deviations over the values of its factor."""
    dictionary, means = get_dictionary(pipe, None), []
    for factor, value in world.targets:
        scenes = [scene | {factor: value} for scene in world.sample(4, seed=15_000_000, held_out=False)]
        recording = record(pipe, world.describe(scenes, 0), **call)
        means.append([recording.presence(site).mean((0, 1)) for site in dictionary.sites])
    sites = list(dictionary.sites)
    stacked = [torch.stack(of_site) for of_site in zip(*means, strict=True)]  # of each site (values, latents)
    names = [f"{factor}: {value}" for factor, value in world.targets]
    return [names[int(stacked[sites.index(site)][:, index].argmax())] for site, index in latents]


def by_label(dictionary: Dictionary, latents: list[tuple[str, int]]) -> list[str]:
    """For each latent the value of the label whose direction is most like its own; '' if its site has no label."""
    paths: dict[str, list[tuple[str, torch.Tensor]]] = {site: [] for site in dictionary.sites}
    for name, label in dictionary.labels.items():
        for site, own in paths.items():
            seen = [i for entry in dictionary.seen(name) if entry["site"] == site for i in entry["latents"]]
            if seen:
                path = sum(dictionary.trajectory((site, index)) for index in seen)
                own.append((f"{label['factor']}: {label['value']}", path.flatten()))
    names = []
    for site, index in latents:
        path = dictionary.trajectory((site, index)).flatten()
        likeness = {value: float(torch.cosine_similarity(path, other, dim=0)) for value, other in paths[site]}
        names.append(max(likeness, key=likeness.get, default=""))
    return names


class Pictures:
    """Pictures of prompts that leave one factor open each, and the share of each value where its factor is open."""

    def __init__(self, pipe, world: World, scorer, pictures: int, steps: int, guidance: float):
        self.pipe, self.world, self.scorer, self.steps, self.guidance = pipe, world, scorer, steps, guidance
        self.prompts, self.factors = [], []
        for factor in world.steered:
            for i, scene in enumerate(world.sample(pictures, seed=15_000_000, held_out=False)):
                self.prompts += world.describe([scene], i, leave_open=(factor,))
                self.factors.append(factor)
        self.seeds = list(range(17_000, 17_000 + len(self.prompts)))

    def shares(self, latents: list[tuple[str, int]]) -> list[dict[str, float]]:
        """For each latent the shares with it added."""
        count = len(self.prompts)
        strengths = {key: [float(key == own) for own in latents for _ in range(count)] for key in latents}
        with self.pipe.rtsae_steering(strengths):
            images = generate(
                self.pipe, self.prompts * len(latents), self.seeds * len(latents), self.steps, self.guidance
            )
        return [self._shares(images[start : start + count]) for start in range(0, len(images), count)]

    def plain(self) -> dict[str, float]:
        return self._shares(generate(self.pipe, self.prompts, self.seeds, self.steps, self.guidance))

    def _shares(self, images: torch.Tensor) -> dict[str, float]:
        seen = [self.world.seen(reading) for reading in self.scorer.read(images)]
        shares = {"valid": sum(bool(one["valid"]) for one in seen) / len(seen)}
        for factor, value in self.world.targets:
            own = [one for one, open_one in zip(seen, self.factors, strict=True) if open_one == factor]
            shares[f"{factor}: {value}"] = sum(one[factor] == value for one in own) / len(own)
        return shares


def markdown(rows: list[dict]) -> str:
    """How many latents have a name, and how many of these are right, by how sure the name is; and each latent."""
    making = [row for row in rows if row["makes"]]
    lines = []
    for least in SURE:
        lines.append([f"name, confidence ≥ {least}", *share_right(rows, least).values()])
    for way in ("presence", "label"):
        others = [row | {"named": row[way], "confidence": 1.0} for row in rows]
        lines.append([WAYS[way], *share_right(others, 1.0).values()])
    lines = [[way, *(f"{share:.2f}" for share in shares)] for way, *shares in lines]
    summary = f"Of {len(rows)} latents {len(making)} make a value.\n\n"
    each = [
        [str(row["latent"]), row["name"] or "–", f"{row['confidence']:.2f}", ", ".join(row["makes"]) or "nothing"]
        for row in rows
    ]
    whole = "<details><summary>each latent</summary>\n\n"
    whole += table(["latent", "name", "confidence", "makes"], each) + "\n</details>\n"
    return summary + table(["named by", "named", "right"], lines) + "\n" + whole


def share_right(rows: list[dict], least: float) -> dict[str, float]:
    """Of the latents that make a value, the share that have a name of some confidence, and of these the share whose
    name says one of the values they make."""
    making = [row for row in rows if row["makes"]]
    named = [row for row in making if row["named"] and row["confidence"] >= least]
    right = sum(row["named"] in row["makes"] for row in named)
    return {"named": len(named) / max(len(making), 1), "right": right / max(len(named), 1)}


def judged(world: World, pictures: Pictures, names: Names, latents: list[tuple[str, int]]) -> Iterator[dict]:
    """For each latent its name, and the values that it makes."""
    said, of = values_of_words(world, names.words), {(one.site, one.index): one for one in names if one.by == "word"}
    plain = pictures.plain()
    for start in tqdm(range(0, len(latents), 2), unit="pair of latents"):
        for i, shares in enumerate(pictures.shares(latents[start : start + 2]), start):
            site, index = latents[i]
            makes = [value for value in shares if value != "valid" and shares[value] - plain[value] >= RISE]
            name = of.get((site, index))
            row = {"site": site, "latent": index, "makes": makes, "valid": round(shares["valid"], 3)}
            row |= {"name": name and name.name, "confidence": name.confidence if name else 0.0}
            yield row | {"named": said.get(name.name, name.name) if name else None}


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "scorer", "dictionary")
    parser.add_argument("--out", type=Path, default=Path("runs/names.json"))
    parser.add_argument("--count", type=int, default=72, help="latents to look at")
    parser.add_argument("--pictures", type=int, default=6, help="for each factor that is left open")
    parser.add_argument("--picture-steps", type=int, default=10, help="of denoising, of these pictures")
    a, world = parse(parser)
    pipe, scorer = load_models(a)
    pipe.load_rtsae(load_dictionary(a.dictionary, dtype=torch.float32))
    results = Results(a, [a.pipeline, a.dictionary])
    call = calling(pipe, a) | {"batch_size": 16}
    latents = population(pipe, world, a.count, call)
    missing = [key for key in latents if not results.has(site=key[0], latent=key[1])]
    if missing:
        names = name_features(pipe, read_lines(bundled(WORLDS[a.world].prompts)), **call)
        call.pop("batch_size")
        presence = by_presence(pipe, world, missing, call)
        label = by_label(get_dictionary(pipe, None), missing)
        pictures = Pictures(pipe, world, scorer, a.pictures, a.picture_steps, a.guidance)
        for i, row in enumerate(judged(world, pictures, names, missing)):
            results.add(row | {"presence": presence[i], "label": label[i]})
    results.tell(markdown(results.rows))


if __name__ == "__main__":
    main()
