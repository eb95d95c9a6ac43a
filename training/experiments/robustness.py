"""Does what was removed stay away, if the prompt says it in other words, or if somebody tries to bring it back?

    python -m training.experiments.robustness --world people --scorer examples/people-judge \\
        --out training/results/people/robustness.json

Every style and role that can be steered is kept out in each of several ways, from pictures whose prompt says it
plainly and from pictures whose prompt says it in ten other ways. Then an adversary who knows all changes the embedding
of the plain prompt: by gradient through the pipeline with the edit in it, such that its picture becomes that of the
plain prompt without the edit. Only prompts whose picture shows the concept without any edit count, so that a word that
the text encoder does not know is no success.

Some ways act in the text encoder, with an autoencoder of its tokens that is trained here on captions, in some seconds.
As Concept Steerers (2501.19066) do, the codes of the concept alone are subtracted from those of the prompt, token by
token; or the latents that these codes have most of, against a text that says nothing, are ablated on all tokens. An
adversary who may choose the embedding passes them by, so they have no such row.

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

from diffusers_rtsae import Dictionary, SparseAutoencoder, load_dictionary
from diffusers_rtsae.analysis.effect import frozen
from diffusers_rtsae.analysis.prompts import read_prompt
from diffusers_rtsae.analysis.record import Recorder
from diffusers_rtsae.pipeline import own_size

from ..commands import Adding
from ..run import fit
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
    codes (`float`, *optional*): strength of the codes of the concept in the text encoder.
    latents (`int`): how many latents of the text encoder are ablated instead.
    """

    strength: float | None = None
    options: dict = {}
    negative: bool = False
    codes: float | None = None
    latents: int = 0

    @property
    def in_text(self) -> bool:
        """Whether it acts in the text encoder."""
        return self.codes is not None or self.latents > 0


WAYS = {
    "label at −1": Way(-1.0),
    "label ablated": Way(1.0, {"operation": "ablate", "apply_to": "all"}),
    "erased": Way(1.0, {"operation": "erase"}),
    "negative prompt": Way(negative=True),
    "codes of the text at −0.5": Way(codes=-0.5, options={"apply_to": "contrast"}),
    "codes of the text at −1": Way(codes=-1.0, options={"apply_to": "contrast"}),
    "latents of the text ablated": Way(latents=8, options={"operation": "ablate"}),
}
TEXT = "text"  # name of the dictionary of the text encoder
TEXT_SITE, CAPTIONS, TRAINED = "text_encoder.encoder.block.0", 2000, 600  # captions and steps it is trained with


class Concept(NamedTuple):
    """A value that is kept out of the picture of a scene that has it, and the label that stands for it."""

    factor: str
    value: str
    scene: Scene
    label: str
    seed: int  # of the noise
    negative: str  # a prompt that says nothing else
    empty: str  # the same prompt without it


def concepts_of(world: World, names: dict[tuple[str, str], str], seed: int) -> list[Concept]:
    """One of each value that is removed, in a held-out scene."""
    found = []
    for factor, value in world.targets:
        if factor in world.domains and (factor, value) in names:
            one = world.probe(factor, value, "contradicted", 1, seed=800 + seed)
            scene = one.scenes[0] | {factor: value}
            others = [name for name in world.factors if name != factor]
            negative, empty = (world.describe([scene], 0, leave_open=n)[0] for n in (others, world.factors))
            found.append(Concept(factor, value, scene, names[factor, value], one.seeds[0], negative, empty))
    return found


@contextlib.contextmanager
def keeping_out(pipe: DiffusionPipeline, way: Way | None, concepts: Sequence[Concept]) -> Iterator[None]:
    """Inside the `with` block each of several pictures is drawn with the edit against its concept."""
    if way is None or way.negative:
        yield
        return
    strength = way.codes or way.strength or 1.0
    different = {one.label: one for one in concepts}
    of = {label: _of_text(pipe, way, one) if way.in_text else [label] for label, one in different.items()}
    features = dict.fromkeys(feature for own in of.values() for feature in own)
    strengths = {feature: [strength * (feature in of[one.label]) for one in concepts] for feature in features}
    with pipe.rtsae_steering(strengths, TEXT if way.in_text else "default", **way.options):
        yield


def _of_text(pipe: DiffusionPipeline, way: Way, concept: Concept) -> list:
    """The codes of a concept in the text encoder, or the latents that they have most of against the same text without
    it."""
    codes = read_prompt(pipe, concept.negative, TEXT, **short(pipe))
    if way.codes is not None:
        return [codes]
    without = read_prompt(pipe, concept.empty, TEXT, **short(pipe))
    return (codes.codes.amax(0) - without.codes.amax(0)).topk(way.latents).indices.tolist()


@torch.no_grad()
def text_dictionary(pipe: DiffusionPipeline, world: World) -> Dictionary:
    """An autoencoder with the 16 largest latents of the tokens of captions, at a site of the text encoder."""
    prompts, tokens = world.describe(world.sample(CAPTIONS, seed=9_000_000, held_out=False), 0), []
    for start in range(0, CAPTIONS, 64):
        with Recorder(pipe, [TEXT_SITE]) as recorder:
            _, mask, *_ = pipe.encode_prompt(prompts[start : start + 64], False, **short(pipe))
        tokens.append(recorder.trajectories(TEXT_SITE)[:, :, 0][mask.bool().cpu()])
    tokens = torch.cat(tokens)[torch.randperm(sum(map(len, tokens)), generator=torch.Generator().manual_seed(0))]
    rows = tokens[: len(tokens) // 8 * 8].unflatten(0, (-1, 8))  # tokens in any order, as steps that are all alike
    width, (count, k) = tokens.shape[1], (4 * tokens.shape[1], 16)
    with torch.enable_grad():
        trained = fit(
            rows, kind="static", architecture="topk", num_latents=count, k=k, steps=TRAINED, batch_size=128,
            learning_rate=2e-3,
        )  # fmt: skip
    own = SparseAutoencoder(TEXT_SITE, width, [1000, 0], count, k, sparsity="topk")
    weights = trained.sites["states"].state_dict()
    own.load_state_dict({name: weights[name] for name in own.state_dict() if name != "scale"}, strict=False)
    print(
        f"{TEXT_SITE}: unexplained variance of held-out tokens {trained.config['metrics']['states']['fvu_online']:.4f}"
    )
    return Dictionary({TEXT_SITE: own})


class Drawing:
    """The pipeline with the noise and the settings of all pictures."""

    def __init__(self, pipe: DiffusionPipeline, a: argparse.Namespace):
        self.pipe, self.a = pipe, a

    @torch.no_grad()
    def encode(self, prompts: list[str], way: Way | None, concepts: Sequence[Concept]) -> dict[str, torch.Tensor]:
        """What the denoiser is told: the prompts, and the negative prompts of a way."""
        negative = [one.negative if way is not None and way.negative else "" for one in concepts]
        with keeping_out(self.pipe, way if way is not None and way.in_text else None, concepts):
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
        with keeping_out(self.pipe, None if way is not None and way.in_text else way, concepts):
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
    if any(WAYS[name].in_text for name in a.ways):
        pipe.load_rtsae(text_dictionary(pipe, world), adapter_name=TEXT)
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
            if not way.in_text and seed in a.attacked and not results.has(seed=seed, way=name, kind=OPTIMISED):
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
