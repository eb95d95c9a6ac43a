"""Do latents that are named after a look, such as "darker" or "cooler colours", do that to pictures?

    python -m training.experiments.looks --out training/results/looks.json

`name_features` says so from predictions, to first order. Here such latents, the first by index, are added at strength
1 while pictures are drawn whole, of other prompts and other noise, and the pictures are measured. Beside it, what the
names would be worth if they were exchanged among the latents.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from diffusers_rtsae import load_dictionary
from diffusers_rtsae.analysis.looks import LOOKS, measure_looks
from diffusers_rtsae.analysis.names import name_features
from diffusers_rtsae.files import read_lines
from diffusers_rtsae.worlds import WORLDS, bundled

from ..worlds.pictures import add_models, calling, generate, load_models, new_parser, parse
from .results import Results, table

SEED = 29_000_000
LEAST = 2.0  # standard errors by which a look has changed
ALL = "all latents"


def direction(name: str) -> tuple[str, int]:
    """The look that a name says, and 1 if it rises, -1 if it falls."""
    return next((look, 1 - 2 * names.index(name)) for look, names in LOOKS.items() if name in names)


def right(changed: dict[str, list[float]], name: str) -> tuple[bool, bool]:
    """Whether a latent changed pictures as a name says; and whether it changed nothing more than that."""
    look, sign = direction(name)
    mean, error = changed[look]
    moves = mean * sign > LEAST * error
    return moves, moves and abs(mean) == max(abs(one) for one, _ in changed.values())


def markdown(rows: list[dict]) -> str:
    """How many names are right, and each latent."""
    lines = []
    for look in [ALL, *LOOKS]:
        own = rows if look == ALL else [row for row in rows if direction(row["name"])[0] == look]
        if own:
            said = [right(row["changed"], row["name"]) for row in own]
            others = [right(a["changed"], b["name"]) for a in own for b in rows if b is not a] or [(False, False)]
            shares = [
                f"{statistics.mean(one[i] for one in answers):.2f}" for i in (0, 1) for answers in (said, others)
            ]
            lines.append([look, str(len(own)), *shares])
    heads = ["", "latents", "moves as said", "names exchanged", "moves nothing more", "names exchanged"]
    each = []
    for row in rows:
        look, _ = direction(row["name"])
        most = max(row["changed"], key=lambda one: abs(row["changed"][one][0]))
        mean, error = row["changed"][look]
        each.append(
            [str(row["latent"]), row["name"], f"{row['effect']:.2f}", f"{mean:+.2f} ± {error:.2f}", most,
             f"{row['changed'][most][0]:+.2f}", f"{row['valid']:.2f}"]
        )  # fmt: skip
    whole = "<details><summary>each latent</summary>\n\n"
    whole += table(["latent", "name", "said", "changed it by", "changed most", "by", "valid"], each)
    return table(heads, lines) + "\n" + whole + "\n</details>\n"


def main() -> None:
    parser = new_parser(__doc__)
    add_models(parser, "pipeline", "scorer", "dictionary")
    parser.add_argument("--out", type=Path, default=Path("runs/looks.json"))
    parser.add_argument("--count", type=int, default=48, help="latents to look at")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--picture-steps", type=int, default=10, help="of denoising, of these pictures")
    a, world = parse(parser)
    pipe, scorer = load_models(a)
    pipe.load_rtsae(load_dictionary(a.dictionary, dtype=torch.float32))
    results = Results(a, [a.pipeline, a.dictionary])
    call = calling(pipe, a) | {"batch_size": 16}
    names = name_features(pipe, read_lines(bundled(WORLDS[a.world].prompts)), **call)
    names = sorted((one for one in names if one.by == "look"), key=lambda one: (one.site, one.index))[: a.count]
    scenes = world.sample(a.pictures, seed=SEED, held_out=True)
    prompts, seeds = world.describe(scenes, SEED), list(range(SEED, SEED + a.pictures))

    def draw(count: int, strengths: dict) -> tuple[torch.Tensor, list[bool]]:
        """The looks of pictures, and whether each is valid."""
        with pipe.rtsae_steering(strengths):
            images = generate(pipe, prompts * count, seeds * count, a.picture_steps, a.guidance)
        return measure_looks(images), [bool(world.seen(one)["valid"]) for one in scorer.read(images)]

    plain, _ = draw(1, {})
    unit = plain.std(0).clamp(min=0.01)
    for start in tqdm(range(0, len(names), 2), unit="pair of latents"):
        pair = names[start : start + 2]
        if all(results.has(site=one.site, latent=one.index) for one in pair):
            continue
        keys = [(one.site, one.index) for one in pair]
        found, valid = draw(len(pair), {key: [float(key == own) for own in keys for _ in scenes] for key in keys})
        changes = (found.view(len(pair), a.pictures, -1) - plain) / unit
        for i, one in enumerate(pair):
            mean, error = changes[i].mean(0).tolist(), (changes[i].std(0) / a.pictures**0.5).tolist()
            own = valid[i * a.pictures : (i + 1) * a.pictures]
            changed = {look: [round(mean[j], 4), round(error[j], 4)] for j, look in enumerate(LOOKS)}
            results.add(
                {"site": one.site, "latent": one.index, "name": one.name, "confidence": one.confidence,
                 "effect": one.effect, "changed": changed,
                 "valid": round(statistics.mean(own), 3)}
            )  # fmt: skip
    results.tell(markdown(results.rows))


if __name__ == "__main__":
    main()
