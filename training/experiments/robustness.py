"""Does what was removed stay away, if the prompt says it in other words, or if somebody tries to bring it back?

    python -m training.experiments.robustness --world people --scorer examples/people-judge \\
        --out training/results/people/robustness.json

Every style and role that can be steered is kept out in each of several ways, from pictures whose prompt says it
plainly and from pictures whose prompt says it in ten other ways. Then an adversary who knows all changes the embedding
of the plain prompt: by gradient through the pipeline with the edit in it, such that its picture becomes that of the
plain prompt without the edit. Only prompts whose picture shows the concept without any edit count, so that a word that
the text encoder does not know is no success.

To compare another way, give it a name in `WAYS`; the page gets a column for each name that has rows. Rows are added to
the JSON as they are measured; the same command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from diffusers_rtsae import load_dictionary
from diffusers_rtsae.analysis.effect import frozen
from diffusers_rtsae.pipeline import own_size

from ..commands import Adding
from ..worlds import Scene, World
from ..worlds.pictures import add_models, fixed_noise, load_models, new_parser, parse, short
from .results import Results, folded, spread, table

PLAIN, OPTIMISED = "plain", "optimised embedding"


class Way(NamedTuple):
    """
    How a concept is kept out.

    strength (`float`, *optional*): of its label; without one no label is used.
    options (`dict`): of the edit.
    negative (`bool`): whether the concept is the negative prompt.
    """

    strength: float | None = None
    options: dict = {}
    negative: bool = False


WAYS = {
    "label at −1": Way(-1.0),
    "label ablated": Way(1.0, {"operation": "ablate", "apply_to": "all"}),
    "erased": Way(1.0, {"operation": "erase"}),
    "negative prompt": Way(negative=True),
}


class Concept(NamedTuple):
    """A value that is kept out of the picture of a scene that has it, and the label that stands for it."""

    factor: str
    value: str
    scene: Scene
    label: str
    seed: int  # of the noise
    negative: str  # a prompt that says nothing else


def concepts_of(world: World, names: dict[tuple[str, str], str], seed: int) -> list[Concept]:
    """One of each value that is removed, in a held-out scene."""
    found = []
    for factor, value in world.targets:
        if factor in world.domains and (factor, value) in names:
            one = world.probe(factor, value, "contradicted", 1, seed=800 + seed)
            scene = one.scenes[0] | {factor: value}
            others = [name for name in world.factors if name != factor]
            negative = world.describe([scene], 0, leave_open=others)[0]
            found.append(Concept(factor, value, scene, names[factor, value], one.seeds[0], negative))
    return found


@contextlib.contextmanager
def keeping_out(pipe: DiffusionPipeline, way: Way | None, concepts: Sequence[Concept]) -> Iterator[None]:
    """Inside the `with` block each of several pictures is drawn with the edit against its concept."""
    if way is None or way.strength is None:
        yield
        return
    labels = dict.fromkeys(one.label for one in concepts)
    strengths = {label: [way.strength * (label == one.label) for one in concepts] for label in labels}
    with pipe.rtsae_steering(strengths, **way.options):
        yield


class Drawing:
    """The pipeline with the noise and the settings of all pictures."""

    def __init__(self, pipe: DiffusionPipeline, a: argparse.Namespace):
        self.pipe, self.a = pipe, a

    @torch.no_grad()
    def encode(self, prompts: list[str], way: Way | None, concepts: Sequence[Concept]) -> dict[str, torch.Tensor]:
        """What the denoiser is told: the prompts, and the negative prompts of a way."""
        negative = [one.negative if way is not None and way.negative else "" for one in concepts]
        told = self.pipe.encode_prompt(
            prompts,
            True,
            negative_prompt=negative,
            num_images_per_prompt=1,
            device=self.pipe.device,
            **short(self.pipe),
        )
        names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
        return dict(zip(names, told, strict=True))

    def latents(self, told: dict, way: Way | None, concepts: Sequence[Concept], steps: int, kind: str = "latent"):
        """The latents (or with `kind` `"pt"` the pictures) of what is told, with gradients if they are enabled."""
        call = type(self.pipe).__call__.__wrapped__  # the pipeline without `torch.no_grad`
        with keeping_out(self.pipe, way, concepts):
            return call(
                self.pipe, prompt=None, negative_prompt=None, num_inference_steps=steps, output_type=kind,
                guidance_scale=self.a.guidance, latents=fixed_noise(self.pipe, [one.seed for one in concepts]),
                **own_size(self.pipe), **told,
            ).images  # fmt: skip

    @torch.no_grad()
    def draw(self, told: dict, way: Way | None, concepts: Sequence[Concept]) -> torch.Tensor:
        """The pictures of what is told, in batches."""
        images = []
        for start in range(0, len(concepts), self.a.batch_size):
            part = slice(start, start + self.a.batch_size)
            own = {name: tensor[part] for name, tensor in told.items()}
            images.append(self.latents(own, way, concepts[part], self.a.steps, "pt").float().cpu().clamp(0, 1))
        return torch.cat(images)

    def bring_back(self, prompts: list[str], way: Way, concepts: Sequence[Concept]) -> dict[str, torch.Tensor]:
        """What the denoiser is told after the embeddings of the prompts were optimised against the edit."""
        told, steps = self.encode(prompts, way, concepts), self.a.attack_steps
        with torch.no_grad():
            wanted = self.latents(self.encode(prompts, None, concepts), None, concepts, steps)
        embeddings = told["prompt_embeds"].clone().requires_grad_()
        optimizer = torch.optim.Adam([embeddings], lr=self.a.rate)
        with frozen(self.pipe):
            for _ in tqdm(range(self.a.updates), desc="bring back", unit="update", mininterval=5):
                found = self.latents(told | {"prompt_embeds": embeddings}, way, concepts, steps)
                loss = (found - wanted).square().mean((1, 2, 3)).sum()
                (embeddings.grad,) = torch.autograd.grad(loss, [embeddings])
                optimizer.step()
        return told | {"prompt_embeds": embeddings.detach()}


def markdown(rows: list[dict]) -> str:
    """For each factor the share that is no longer shown, by the kind of wording and the way."""
    text, ways = [], list(dict.fromkeys(row["way"] for row in rows))
    for factor in dict.fromkeys(row["factor"] for row in rows):
        own = [row for row in rows if row["factor"] == factor]
        kinds = list(dict.fromkeys(row["kind"] for row in own))
        lines = [_line(kind, [row for row in own if row["kind"] == kind], ways) for kind in kinds]
        heads = ["prompt", "prompts", "shown without an edit", *ways]
        text += [f"{factor.capitalize()}s:\n\n{table(heads, lines)}"]
        each = [
            key
            for key in dict.fromkeys((row["kind"], row["wording"]) for row in own)
            if key[0] not in (PLAIN, OPTIMISED)
        ]
        lines = [
            _line(f"{kind} {wording}", [r for r in own if (r["kind"], r["wording"]) == (kind, wording)], ways)
            for kind, wording in each
        ]
        text.append(folded(f"{factor}s, each wording", table(heads, lines)))
    lines = []
    for way in ways:
        own = [row for row in rows if row["way"] == way]
        gone = sum(row["gone"] for row in own)
        lines.append([way, str(gone), f"{sum(row['valid'] for row in own) / gone:.2f}" if gone else "–"])
    return "\n".join([*text, table(["way", "pictures that no longer show it", "of these valid"], lines)])


def _line(name: str, rows: list[dict], ways: list[str]) -> list[str]:
    """Of prompts of one kind: how many there are, the share that shows the concept, and by way the share of these that
    no longer does, over all, with the deviation over seeds."""
    first = [row for row in rows if row["way"] == rows[0]["way"]]
    n, cells = sum(row["n"] for row in first), []
    for way in ways:
        own = [row for row in rows if row["way"] == way]
        shares = []
        for seed in dict.fromkeys(row["seed"] for row in own):
            shown, gone = (sum(r[key] for r in own if r["seed"] == seed) for key in ("shown", "gone"))
            shares += [gone / shown] if shown else []
        cells.append(spread(shares) if shares else "–")
    return [name, str(n), f"{sum(row['shown'] for row in first) / n:.2f}", *cells]


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "scorer", "dictionary")
    parser.add_argument("--out", type=Path, default=Path("runs/robustness.json"))
    parser.add_argument("--ways", nargs="*", action=Adding, choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", nargs="*", action=Adding, type=int, default=[0, 1, 2], help="of scenes and noise")
    parser.add_argument("--attacked", nargs="*", action=Adding, type=int, default=[0], help="seeds with an adversary")
    parser.add_argument("--updates", type=int, default=50, help="of an embedding")
    parser.add_argument("--rate", type=float, default=0.03, help="of Adam")
    parser.add_argument("--attack-steps", type=int, default=4, help="of denoising, while an embedding is optimised")
    a, world = parse(parser)
    pipe, scorer = load_models(a)
    dictionary = load_dictionary(a.dictionary, dtype=torch.float32)
    pipe.load_rtsae(dictionary)
    results = Results(a, [a.pipeline, a.dictionary], said_by_rows=("ways", "seeds", "attacked"))
    names = {(label["factor"], label["value"]): name for name, label in dictionary.labels.items()}
    drawing = Drawing(pipe, a)

    def shows(images: torch.Tensor, concepts: Sequence[Concept]) -> list[tuple[bool, bool]]:
        """For each picture whether it shows its concept, and whether it is valid."""
        seen = [world.seen(reading) for reading in scorer.read(images)]
        return [(s[one.factor] == one.value, bool(s["valid"])) for s, one in zip(seen, concepts, strict=True)]

    for seed in a.seeds:
        concepts = concepts_of(world, names, seed)
        said = [[(PLAIN, world.plainly(one.scene)), *world.rewordings(one.scene, one.factor)] for one in concepts]
        asked = [
            (one, kind, i, text) for one, own in zip(concepts, said, strict=True) for i, (kind, text) in enumerate(own)
        ]
        rows_of, kinds, places, texts = map(list, zip(*asked, strict=True))
        before = None
        for name in a.ways:
            way = WAYS[name]
            if not results.has(seed=seed, way=name, kind=PLAIN):
                before = before or shows(drawing.draw(drawing.encode(texts, None, rows_of), None, rows_of), rows_of)
                after = shows(drawing.draw(drawing.encode(texts, way, rows_of), way, rows_of), rows_of)
                results.add(*counted(seed, name, zip(rows_of, kinds, places, before, after, strict=True)))
            if seed in a.attacked and not results.has(seed=seed, way=name, kind=OPTIMISED):
                plainly = [own[0][1] for own in said]
                unsteered = shows(drawing.draw(drawing.encode(plainly, None, concepts), None, concepts), concepts)
                told = drawing.bring_back(plainly, way, concepts)
                after = shows(drawing.draw(told, way, concepts), concepts)
                kind = [OPTIMISED] * len(concepts), [0] * len(concepts)
                results.add(*counted(seed, name, zip(concepts, *kind, unsteered, after, strict=True)))
    results.tell(markdown(results.rows))


def counted(seed: int, way: str, pictures: Iterator[tuple]) -> list[dict]:
    """Rows that count the pictures of each factor and wording."""
    rows: dict[tuple, dict] = {}
    for one, kind, place, (shown, _), (still, valid) in pictures:
        empty = {"factor": one.factor, "way": way, "kind": kind, "wording": place, "seed": seed}
        row = rows.setdefault((one.factor, kind, place), empty | dict.fromkeys(("n", "shown", "gone", "valid"), 0))
        gone = shown and not still
        row["n"] += 1
        row["shown"] += shown
        row["gone"] += gone
        row["valid"] += gone and valid
    return list(rows.values())


if __name__ == "__main__":
    main()
