"""Write the pages of measurements, one for each world, from the rows beside them: `training/results/README.md` and
`training/results/people/README.md`.

    python -m training.experiments.page

The texts here say what was done. Every figure comes from a JSON file, through the `markdown` function of the
experiment that wrote the file. A test fails if a committed page differs from what this command writes.
"""

from __future__ import annotations

import ast
import functools
import json
import textwrap
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from .results import contents, table

ROOT = Path(__file__).parents[2]
APART = ("pipeline", "scorer", "dictionary", "dictionaries", "contents", "elsewhere")  # settings not listed as such

INTRODUCTION = """# Measurements

Written by `python -m training.experiments.page` from the JSON files in this folder, the newest first; change those, or
the texts in `training/experiments/page.py`, not this page. Each command continues a file that was begun.

The bundled pipeline draws scenes whose factors are known, and a scorer reads them back from the picture. Prompts are
of combinations that none of the models was trained on. **Open** prompts name every factor but the one that is
steered; **contradicted** ones name another value of it.

- **Success**: the share of pictures that are valid scenes and show the value that was steered to.
- **Leakage**: the share in which any other factor (shape, colour, size, place, style, background) reads differently
  than without steering; **mean leakage**, where it says so, the share of the other factors that do.
- **Valid**: the share that are scenes of this world at all.
- **Edited prompt**: what naming the value in the prompt does, instead of steering.

How quick it is, and how much memory it takes: [tests/benchmarks](../../tests/benchmarks). The same on pictures that
nobody made easy: [the world of people](people/README.md).
"""
DRAWN = """## What these figures stand on

The pipeline, asked for scenes of held-out combinations (`python -m training.worlds.shapes.evaluate --guidance 2.5
--out examples/shapes-sd/metrics.json`; {prompts} prompts, {steps} steps of {sampler}, guidance {guidance_scale:g}):
the share of named factors that are right. *binding*: both objects have their shapes and colours, each in its place.
Valid scenes are {valid:.2f} of all pictures. How well the dictionary describes activations is on its
[card](../../examples/shapes-rtsae/README.md#measured-on-held-out-trajectories).
"""
STALE = "**Measured with labels or weights that are no longer the bundled ones.**"


class Section(NamedTuple):
    """
    experiment (`str`): the module whose `markdown` shows the rows, and whose command writes them.
    title (`str`): what the measurement asks.
    text (`str`): what was done; names in braces are settings.
    """

    experiment: str
    title: str
    text: str


SECTIONS = {  # by the name of the file
    "judged": Section(
        "table",
        "Does a label do what it says?",
        """
        Every label of the bundled dictionary on {prompts} prompts of its own for each seed, which had no part in
        any choice, read by a judge that had none either: a second scorer of another architecture and training
        (`examples/shapes-judge`). A cell is success / leakage / valid at strength 1. Labels are linear maps fitted
        to what changing the prompt does, without a scorer (`python -m training.experiments.label`, 24 pairs of
        prompts and rank 8, of styles 16). Weaker ones, by their effect on held-out pairs or by an earlier table of
        the same kind, were fitted again on 48 pairs: all shapes, striped, outline, gradient, navy, yellow, cyan,
        small and large. Black, brown, green and pink were too, without gain, and keep their first fit.
        The rivals (`python -m training.experiments.rivals --every 6`) are fitted to five of the values from the
        same pairs: `direction`, their mean change at each anchor (which is the difference of their means); `free
        direction`, that with most effect, by gradient; `latents`, sixteen of the dictionary, chosen by their effect;
        `random latents`, as many at random.
        """,
    ),
    "ranking": Section(
        "ranking",
        "Does ranking by effect find the latent that does most?",
        """
        For each value `find_features` ranks all latents on {pairs} pairs of prompts, by effect (all to first order,
        the best thirty as measured) and by presence; the first ten of each are then added at strength 1 on {others}
        other pairs and other noise. *Place* is where a ranking puts the latent that does most there.
        """,
    ),
    "dose": Section(
        "dose",
        "How does it depend on the strength?",
        """
        Each label at each strength on {prompts} prompts that leave its factor open: the share that shows it, and
        how steadily that and its margin rise (Spearman's rank correlation; the margin is how far the scorer's logit
        of the value is above that of any other). Last, prompts that name the value, at strength −1: the share of
        those that showed it and no longer do.
        """,
    ),
    "together": Section(
        "together",
        "Two labels at once, and painted ones",
        """
        Two labels of different factors on prompts that name another value of both, {prompts} of each pair,
        beside prompts that name both. Then a label painted on a disc around the first of two objects: is it
        reached, and is all that is read of the other object as without steering?
        """,
    ),
    "samplers": Section(
        "samplers",
        "Does it hold with other samplers?",
        """
        All labels at strength 1 on {prompts} open prompts each. The dictionary was trained on DDIM with 25
        steps. A cell is success / mean leakage. With very few steps some samplers draw no valid pictures even
        without steering.
        """,
    ),
    "hard": Section(
        "hard",
        "Prompts that name another value: which edit insists?",
        """
        In both halves of guidance until the end; `swap` adds the target and subtracts the value that the prompt
        names, `falling` does so from twice the strength to none, `local` only where one of the two is active. A
        cell is success / leakage / valid at the best strength, chosen on these prompts ({prompts} a label).
        """,
    ),
    "even": Section(
        "even",
        "What is drawn by default, and can it be evened out?",
        """
        {prompts} prompts for each shape that name it and nothing else: as they are, and with each picture steered at
        strength 1 to one value of another factor, all values as often as each other and without looking at the
        picture. The prompts stay as they are. Shares are of valid pictures.
        """,
    ),
    "unlearn": Section(
        "unlearn",
        "Can a concept be removed?",
        """
        UnlearnCanvas' protocol on shapes and styles, {prompts} prompts that name each concept and as many that
        do not, unseen when the latents were chosen. Every edit acts on all of them. Either the bundled label of the
        concept at strength −1; or erasing what the label sees, which leaves an empty picture where there was one
        object, and the scorer knows none; or the latents that are most present when prompts name it, multiplied
        wherever they are active, in both halves of guidance: by 0, which sets them to zero, or below, as SAeUron does.
        """,
    ),
    "erase": Section(
        "erase",
        "Can a thing be erased?",
        """
        Erasing replaces the tokens on which a feature is seen by the mean of the picture's other tokens, at their mean
        length, at all steps and in all branches of guidance. {prompts} prompts of each kind, and of these the pictures
        that show what their prompt names without any edit; each loses its own shape. The true mask knows where the
        object is; all other ways know what the dictionary sees. No choice was made on these prompts. The pipeline and
        the judge know no empty pictures: whether not a trace is left of a single object is told by the colours of its
        background. *Artefacts* are activations of edited tokens outside the middle 99 % of those without an edit, in
        length and in single dimensions; 2606.31699 has 57 % for SAeUron and 16 % with replacement, of other
        dictionaries and with another measure.
        """,
    ),
    "arms": Section(
        "arms",
        "The paper's comparison: which kind of dictionary?",
        """
        Dictionaries of one size, trained alike on one pass over the same trajectories (`python -m training.train
        training/recipes/arms.yaml --out runs/arms`). Steering moves {features} latents, chosen from {pairs} pairs of
        prompts for each value by what is active or, where it says so, by effect, on other prompts that name another
        value; each kind is shown at its most efficient strength, and *elsewhere* is with a sampler and a number of
        steps that no dictionary was trained on: {elsewhere}. *Gain* is the added share that shows the target,
        *distance* how far pictures moved relative to the edited prompt's, *efficiency* gain over distance; the paper
        has efficiencies of .691 for the method (`method`), .449 for `per-step`, .447 for `raw` and .206 for
        `matryoshka` on Stable Diffusion 1.5, of other pictures and another judge. Mean ± standard deviation over
        seeds. Here the method is not ahead: by activation it is behind the others, by effect the kinds are within each
        other's spread. This world's factors were made linearly readable at the steered site, which may be why any
        dictionary steers it.
        """,
    ),
    "kinds": Section(
        "kinds",
        "Which kind of dictionary?",
        """
        All kinds, trained alike on one pass over the same trajectories (`python -m training.train
        training/recipes/kinds.yaml --out runs/kinds`) and asked alike. `rtsae` and `per-step` have one code for a
        whole trajectory, of as many active latents as the others have at each of its five steps; `plain` is as large
        as `mixture`, and `large` ten times that, which had 300 of the 1,000 steps. *Recovered* is the share of a mean
        replacement's error in the noise prediction; for *factors read alike* and *distance* {replaced} pictures are
        drawn with the site's activation replaced by its reconstruction at all anchors. *Absorption* (after SAEBench,
        2503.09532) is the share of a value's tokens on which the latents that stand for it are silent while another
        one, special and along the value's direction, is active instead; the paper of `atm` has .0068 for it, .0114
        for JumpReLU and .140 for TopK, of a language model. *Effect* is that of the 16 latents with most first-order
        effect on {pairs} pairs of prompts, at the best of five strengths there, on as many other pairs (1: what
        changing the prompt does); so they then steer {prompts} held-out prompts of each kind, for one in {every} of
        the values of factors with more than two. Probes are ridge regressions of the mean code of a picture, mean
        over all factors, on {judged} held-out pictures: *here* those of the sampler that was trained on, *elsewhere*
        those of another; *untold* without place and guidance for the router. Mean ± standard deviation over seeds.
        What of the papers' claims holds here: *the method's*, that few latents of a trajectory steer more: yes, by
        effect, and on open prompts by success, where `rtsae` does most with sixteen latents and leaks less than the
        kinds of single steps. It is also the one that reconstructs least, as one code must do for five steps; and
        each of its latents has a direction of its own at each of them. Those of `per-step` act at one anchor each: at
        every strength that was tried they overshoot there, so that their effect is below nothing, and still steer
        open prompts, without leaking. Against prompts that name another value no sixteen constants hold, of any kind,
        which is why the bundled labels are maps. *TIDE's*, against the static `topk` that it extends: no, cosine,
        FVU, pictures and effect are the same within the spread. *ATM's*, least absorption: it has no more than TopK
        and BatchTopK, and JumpReLU has most of the kinds of single steps; all are small, and the two formulas of its
        importance are alike. *Experts* with few labels: they are read better than a plain dictionary of their size up
        to a hundred labels, and worse beyond; better than one ten times as large, which was trained for less, up to
        three hundred; and much as a plain one of a quarter of their latents. No kind is read as well as the raw
        activation, which this pipeline's training made easy to read. Most latents of a mixture are never active on
        whole activations: they learned from hidden parts. What the router is told helps a little. The code of a
        trajectory is read less well elsewhere, where its anchors are not met.
        """,
    ),
    "anchors": Section(
        "arms",
        "How many anchors?",
        """
        Three short trainings on the bundled pipeline, measured as above ({pairs} pairs, {features} latents):
        `python -m training.train training/recipes/shapes.yaml --out runs/anchors/anchors3-0 --work runs/anchors3
        --set anchors=3 collect.count=512 dtype=bfloat16 train.steps=1000 train.precision=bf16`, and the same
        with 5 and 9. Trained before gradients were normalised. The bundled dictionary has three.
        """,
    ),
    "capacity": Section(
        "capacity",
        "Where can this pipeline be steered at all?",
        """
        Difference-of-means directions of {samples} pictures at every attention block, no dictionary; {images}
        prompts a value. A cell is success / mean leakage at the best of all settings, chosen on these same
        pictures. The site of the bundled dictionary is the one that the pipeline's training aligned.
        """,
    ),
}


PEOPLE_INTRODUCTION = """# Measurements on the world of people

Written by `python -m training.experiments.page` from the JSON files in this folder, the newest first. Each command
continues a file that was begun.

Emoji of one person each by three foundries, drawn by a transformer that was trained without any probe: what holds for
[rendered shapes](../README.md) is tested here. Factors are the style (which foundry), the skin tone, who is drawn
(woman, man, person) and the role. Prompts are of combinations that none of the models was trained on; **open** prompts
name every factor but the one that is steered, **contradicted** ones name another value of it. Success, leakage and
validity are as there.
"""
PEOPLE_SECTIONS = {
    "judged": Section(
        "table",
        "Does a label do what it says?",
        """
        Every label of the bundled dictionary on {prompts} prompts of its own, which had no part in any choice, read by
        a judge that had none either: a second scorer of another architecture and training (`examples/people-judge`).
        A cell is success / leakage / valid at strength 1. Labels are linear maps of what the six cross-attentions add,
        fitted to what changing the prompt does and stretched until they move as far, without a scorer (`python -m
        training.experiments.label --world people --steps 4 --pairs 280 --rank 6 --batch-size 32`). `difference of
        means` is at those same sites; `random map` reads what the label's map reads and moves as far, in random
        directions. Style transfer is the contradicted prompts of styles: what else changes with it is said below the
        table. The edited prompt is what the pipeline makes of being told, which is the most that can be hoped for.
        """,
    ),
    "ceiling": Section(
        "ceiling",
        "Where can this pipeline be steered?",
        """
        On held-out pairs of prompts, for the first value of each factor ({pairs} pairs, a quarter of them held
        out): the effect of a linear map of rank {rank} fitted there, and the ceiling, which is the effect of putting
        the other prompt's activation itself there. A cell is map / ceiling; 1 is what changing the prompt does. A
        block whose ceiling is high need not have a map that is nearly as good, unlike the site of the shapes, which
        was made linearly readable: what stands in the residual stream there depends on everything else. What the
        cross-attentions add is nearer to what the prompt says, and is the same at every step. So the bundled labels
        act there, at all of them at once. Measured before maps were stretched.
        """,
    ),
    "even": Section(
        "even",
        "Who gets drawn?",
        """
        {prompts} prompts for each of twelve roles that name it and nothing else: as they are, and with each picture
        steered at strength 1 to one value of another factor, all values as often as each other and without looking at
        the picture. The prompts stay as they are. Shares are of valid pictures. What is drawn by default is what the
        pictures of the three foundries show, and no norm.
        """,
    ),
    "dose": Section(
        "dose",
        "How does it depend on the strength?",
        """
        Each label at each strength on {prompts} prompts that leave its factor open: the share that shows it, and how
        steadily that and its margin rise (Spearman's rank correlation). Last, prompts that name the value, at
        strength −1: the share of those that showed it and no longer do. *Jump*: of the way that a picture goes from
        strength 0 to 1, the most that it goes between two neighbouring strengths, the median of those that turn; a
        quarter would be even, and all of it a switch.
        """,
    ),
    "together": Section(
        "together",
        "Two labels at once, and half of a picture painted",
        """
        Two labels of different factors on prompts that name another value of both, {prompts} of each pair, beside
        prompts that name both. Then a label painted on the left half, for there is one person to a picture: how far
        the pixels of that half move and those of the other one, in units of how far the label moves them unpainted.
        """,
    ),
    "samplers": Section(
        "samplers",
        "Does it hold with other samplers?",
        """
        All labels at strength 1 on {prompts} open prompts each. The dictionary was trained on DPM++ 2M with 20 steps;
        all of these draw with rectified flow. A cell is success / mean leakage.
        """,
    ),
    "unlearn": Section(
        "unlearn",
        "Can a concept be removed?",
        """
        UnlearnCanvas' protocol on styles and roles, {prompts} prompts that name each concept and as many that do not.
        Every edit acts on all of them: the bundled label of the concept at strength −1, or the latents that are most
        present when prompts name it, multiplied wherever they are active, in both halves of guidance.
        """,
    ),
    "erase": Section(
        "erase",
        "Can a role be erased?",
        """
        As for shapes, at all cross-attentions at once, {prompts} prompts that each name a role; *who*, *tone* and
        *style* are read as without the edit. Erasing is no way to change a role: nothing in the picture shows what is
        below a helmet, every token attends to the word for it, and the few latents of a block that know a role know
        faces too. It is for things that stand beside others.
        """,
    ),
    "arms": Section(
        "arms",
        "The paper's comparison: which kind of dictionary?",
        """
        As for shapes, but of block 3 of this transformer: dictionaries of one size, trained alike on one pass over the
        same trajectories (`python -m training.train training/recipes/people-kinds.yaml --out runs/people-kinds`).
        {features} latents, chosen from {pairs} pairs of prompts for each value by what is active or by effect, steer
        other prompts that name another value; each kind is shown at its most efficient strength, *elsewhere* with
        {elsewhere}. Mean ± standard deviation over seeds. The method and its like without a code for the whole
        trajectory recover the prediction with what came before and hardly any of it rolled out; by effect they steer
        alike, by activation the raw one is ahead, each within the others' spread. None of them is of use here: most of
        what does show the value is broken or changed elsewhere, as [a few constants](#which-kind-of-dictionary) steer
        this block little, whichever dictionary they are of.
        """,
    ),
    "kinds": Section(
        "kinds",
        "Which kind of dictionary?",
        """
        The paper's kinds, TIDE, and the static one that it extends, of block 3, trained alike on one pass over the
        same trajectories (`python -m training.train training/recipes/people-kinds.yaml --out runs/people-kinds`) and
        asked as those of shapes are: {replaced} pictures with reconstructed activations, {pairs} pairs that choose the
        16 latents of most effect and as many that judge, {prompts} prompts of each kind, for one in {every} of the
        values. Mean ± standard deviation over seeds. What holds: a linear predictor explains each anchor better than
        the paper's does on larger models, so that little is left for a code of the whole trajectory to explain, and
        that code reconstructs least, as on shapes. TIDE and the static one that it extends are the same within the
        spread, as there. And no sixteen constants of any kind steer this block: what is to be added depends on what is
        there, which is why labels are maps. The trainings were short, and the differences between kinds are of these.
        """,
    ),
}


DRAWN_PEOPLE = """## What these figures stand on

The pipeline, asked for people of held-out combinations with every factor named (`python -m
training.worlds.people.evaluate --out examples/people-dit/metrics.json`; {prompts} prompts, {steps} steps, guidance
{guidance_scale:g}): the share of pictures that show each as told, read by the scorer. Below, what the scorer and the
judge read right in the foundries' own pictures of held-out combinations.
"""
SHEET = """
64 held-out prompts that nobody chose: on the left of each pair what the pipeline draws, on the right the foundry's own
picture (Noto Emoji © Google, Apache-2.0; Twemoji © Twitter, Inc. and other contributors, CC BY 4.0; Fluent Emoji ©
Microsoft, MIT).

![Pairs of pictures](drawn.webp)
"""


def drawn_people() -> str:
    """What the pipeline of people draws of what it is told, and what is read of real ones."""
    found = json.loads((ROOT / "examples" / "people-dit" / "metrics.json").read_text())
    heads, lines = list(found["right"]), [["drawn", *(f"{share:.2f}" for share in found["right"].values())]]
    for reader in ("scorer", "judge"):
        own = json.loads((ROOT / "examples" / f"people-{reader}" / "metrics.json").read_text())["accuracy"]
        lines.append([f"real, as the {reader} reads", *(f"{own[head]:.2f}" if head in own else "–" for head in heads)])
    return DRAWN_PEOPLE.format(**found) + "\n" + table(["", *heads], lines) + SHEET


class Page(NamedTuple):
    """
    folder (`Path`): where the rows lie, and the page.
    options (`str`): what a command is told to measure this world.
    dictionary (`str`): the bundled one.
    introduction (`str`): the beginning of the page.
    sections (`dict[str, Section]`): by the name of the file of rows.
    drawn (`Callable[[], str]`): writes what the pipeline draws of what it is told.
    """

    folder: Path
    options: str
    dictionary: str
    introduction: str
    sections: dict[str, Section]
    drawn: Callable[[], str]


@functools.cache
def _contents(*folders: str) -> str:
    return contents(*(ROOT / folder for folder in folders))


def is_bundled(page: Page, settings: dict, rows: list[dict]) -> bool:
    """Whether what was measured is what is bundled now; dictionaries of a measurement's own are not looked for."""
    named = [settings[name] for name in ("pipeline", "dictionary") if name in settings]
    if "dictionaries" not in settings and settings["contents"] != _contents(*named):
        return False
    digests = {row["dictionary"] for row in rows if row.get("method") == "feature" and "dictionary" in row}
    return digests <= {_contents(page.dictionary)}


def wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 119, break_long_words=False, break_on_hyphens=False)


def section(page: Page, path: Path) -> tuple[str, str]:
    """The day of a measurement, and its section of the page."""
    stored = json.loads(path.read_text())
    settings, rows = stored["settings"], stored["rows"]
    experiment, title, text = page.sections[path.stem]
    if "elsewhere" in settings:
        settings["elsewhere"] = "{} with {} steps".format(*ast.literal_eval(settings["elsewhere"]))
    listed = {name: value for name, value in settings.items() if name not in APART and value != "None"}
    how = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in listed.items())
    out = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    command = f"`python -m training.experiments.{experiment} {page.options}--out {out}`"
    facts = f"{stored['measured']}, {command}: {how}"
    facts += f"; read by `{Path(settings['scorer']).name}`." if "scorer" in settings else "."
    parts = [f"## {title}", wrapped(facts), wrapped(text.format(**settings))]
    parts += [] if is_bundled(page, settings, rows) else [STALE]
    shown = import_module(f"training.experiments.{experiment}").markdown(rows)
    return stored["measured"], "\n\n".join([*parts, shown.strip()]) + "\n"


def drawn() -> str:
    """How much of what prompts name the bundled pipeline draws."""
    found = json.loads((ROOT / "examples" / "shapes-sd" / "metrics.json").read_text())
    rows = {name: found[name] for name in ("1 object", "2 objects")}
    factors = list(dict.fromkeys(factor for row in rows.values() for factor in row))
    lines = [[name, *(f"{row[f]:.2f}" if f in row else "–" for f in factors)] for name, row in rows.items()]
    return DRAWN.format(**found) + "\n" + table(["scenes of", *factors], lines)


PAGES = {
    "shapes": Page(ROOT / "training" / "results", "", "examples/shapes-rtsae", INTRODUCTION, SECTIONS, drawn),
    "people": Page(
        ROOT / "training" / "results" / "people",
        "--world people ",
        "examples/people-rtsae",
        PEOPLE_INTRODUCTION,
        PEOPLE_SECTIONS,
        drawn_people,
    ),
}


def written(page: Page) -> str:
    """The whole page."""
    unknown = sorted({path.stem for path in page.folder.glob("*.json")} - page.sections.keys())
    if unknown:
        raise ValueError(f"Expected a section in {Path(__file__).name} for each of {unknown}.")
    order = [path for stem in page.sections if (path := page.folder / f"{stem}.json").exists()]
    sections = sorted((section(page, path) for path in order), key=lambda one: one[0], reverse=True)
    return "\n".join([page.introduction, *(text for _, text in sections), page.drawn()])


if __name__ == "__main__":
    for one in PAGES.values():
        (one.folder / "README.md").write_text(written(one))
        print(one.folder / "README.md")
