"""The words of the pages of measurements, which `page.py` writes: what each measurement asks, and what was done."""

from __future__ import annotations

from typing import NamedTuple


class Section(NamedTuple):
    """
    experiment (`str`): the module whose `markdown` shows the rows, and whose command writes them.
    title (`str`): what the measurement asks.
    text (`str`): what was done; names in braces are settings.
    """

    experiment: str
    title: str
    text: str


INTRODUCTION = """# Measurements

Written by `python -m training.experiments.page` from the JSON files in this folder, the newest first. To change it,
change those, or the texts in `training/experiments/texts.py`. Each command continues a file that was begun.

The bundled pipeline draws scenes whose factors are known, and a scorer reads them back from the picture. Prompts are
of combinations that none of the models was trained on. **Open** prompts name every factor but the one that is
steered; **contradicted** ones name another value of it.

- **Success**: the share of pictures that are valid scenes and show the value that was steered to.
- **Leakage**: the share in which any other factor (shape, colour, size, place, style, background) reads differently
  than without steering; **mean leakage**, where it says so, the share of the other factors that do.
- **Valid**: the share that are scenes of this world at all.
- **Edited prompt**: instead of steering, the prompt names the value.

Time and memory are measured in [tests/benchmarks](../../tests/benchmarks). The same measurements on pictures whose
factors were not made easy to read: [the world of people](people/README.md).
"""

SECTIONS = {  # by the name of the file
    "judged": Section(
        "table",
        "Does a label do what it says?",
        """
        Every label of the bundled dictionary is steered at strength 1 on {prompts} prompts of its own for each seed,
        and read by a judge: a second scorer of another architecture and training (`examples/shapes-judge`). Neither
        prompts nor judge had a part in any choice. A cell is success / leakage / valid.

        Labels are linear maps fitted to what changing the prompt does, without a scorer (`python -m
        training.experiments.label`, with 24 pairs of prompts and rank 8, or 16 for styles). Those that were weak, by
        their effect on held-out pairs or in an earlier table of this kind, were fitted again to 48 pairs: all shapes,
        striped, outline, gradient, navy, yellow, cyan, small and large. Black, brown, green and pink were as well,
        gained nothing, and keep their first fit.

        The rivals (`python -m training.experiments.rivals --every 6`) are fitted to the same pairs, for five of the
        values. `direction` is their mean change at each anchor, which is the difference of their means; `free
        direction` the one of most effect, found by gradient; `latents` sixteen latents of the dictionary, chosen by
        their effect; `random latents` as many at random.
        """,
    ),
    "ranking": Section(
        "ranking",
        "Does ranking by effect find the latent that does most?",
        """
        For each value `find_features` ranks all latents on {pairs} pairs of prompts: by effect (to first order for all
        latents, measured for the best thirty), and by presence. The first ten of each ranking are then added at
        strength 1 on {others} other pairs and other noise. *Place* is where a ranking puts the latent that does most
        there.
        """,
    ),
    "names": Section(
        "names",
        "Are the names of latents right?",
        """
        `diffusers-rtsae name` names latents from prompts alone; the scorer names nothing. The {count} latents here
        were chosen without names: those whose slope towards a value stands out most. Each is added at strength 1 to
        {pictures} pictures for each factor that their prompts leave open ({picture_steps} steps each). It *makes* the
        values whose share of these pictures rises by at least half; a value that is often there anyway cannot rise so
        far, so that a right name may count as a wrong one. *Named*: the share of the latents that make a value which
        have a name. *Right*: the share of these whose name says one of the values they make. Beside names by effect:
        the value whose prompts show a latent most, and the value of the label whose direction is most like its own.
        The way to name latents was chosen on shapes, on other prompts and seeds, where names of confidence ≥ 0.9 were
        right for 0.94 and those of ≥ 0.7 for 0.92; most of the latents of shapes are the same.
        """,
    ),
    "looks": Section(
        "looks",
        "Do latents do to pictures what their look says?",
        """
        Latents that are like no word are named after what they do to the look of pictures, as predictions say to first
        order. The first of them by index, {count} at most, are added at strength 1 to {pictures} pictures of prompts
        and noise that had no part in it ({picture_steps} steps each), and the pictures are measured: brightness,
        contrast and so on, in standard deviations among the pictures without it. *Moves as said*: the named look
        changes in the direction that the name says, by more than two standard errors. *Moves nothing more*: no other
        look changes more than it. *Exchanged*: the same if each latent had the name of another.

        Two looks were given up after such a measurement: "less of the prompt", as pictures showed as much of it with
        eight of nine such latents as without (on other prompts); and "smaller", which was right for one latent of four
        on these prompts. Without both, names were given anew, and measured on the same prompts.
        """,
    ),
    "explain": Section(
        "explain",
        "Does a ledger say what is measured?",
        """
        `explain` splits what naming a value does to a picture's predictions over features of the dictionary. Each of
        {seeds} seeds takes another value of each factor, the first values first, and prompts of combinations that no
        model was trained on; each is compared with a prompt that leaves the factor open, and with one that names
        another value. Latents are *undone*, set to what they are without the word, which is what shares are about; or
        *ablated*, set to 0, for which a ledger has a figure of its own. *Said* is the sum of a set's figures,
        *measured* the part of the word's change that goes when the whole set is taken away at once. Sets are the first
        of the ledger, those that it says lose most by ablation, the most active of the picture, and active ones at
        random. The last row of the first table measures them in another picture, with other noise. The spread is that
        of the seeds, or of ledgers.

        A share is no forecast of ablation: a latent that the word makes inactive has a share and cannot be ablated,
        and one that is active without the word loses more than its share. That is why a ledger has the second figure,
        which is a first guess: it extends the gradients beyond the line that they were taken on. This was seen on the
        prompts of the first seed of shapes; the other seeds, and people, had no part in how a ledger counts.
        """,
    ),
    "dose": Section(
        "dose",
        "How does it depend on the strength?",
        """
        Each label at each strength on {prompts} prompts that leave its factor open: the share of pictures that show
        its value, and how steadily that share and the margin rise with the strength (Spearman's rank correlation). The
        margin is how far the scorer's logit of the value is above that of any other value. Last, prompts that name the
        value, at strength −1: of the pictures that showed it, the share that no longer do.
        """,
    ),
    "together": Section(
        "together",
        "Several labels at once, and painted ones",
        """
        Two or three labels of different factors at strength 1, {each} prompts of each kind for each set: prompts that
        leave these factors open, that name the shape (or, if it is steered, another factor) and nothing else, and that
        name other values of them; *named* are prompts that name all values instead. Labels are fitted one at a time.
        The rows are ways to add their maps up: the package's, the simple sum of what each map reads in the activation
        as it is, and one in which each reads the activation as the others move it. Then a label painted on a disc
        around the first of two objects: does that object show it, and is all that is read of the other object as
        without steering?
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
        All edits act in both branches of guidance until the end. `swap` adds the target and subtracts the value that
        the prompt names; `falling` does the same with a strength that falls from twice the value to zero; `local` acts
        only where one of the two is active. A cell is success / leakage / valid at the best strength, which was chosen
        on these same prompts ({prompts} for each label).
        """,
    ),
    "even": Section(
        "even",
        "What is drawn by default, and can it be evened out?",
        """
        {prompts} prompts for each shape, which name it and nothing else, are drawn twice: without steering, and with
        each picture steered at strength 1 to one value of another factor. All values are used equally often, whatever
        the picture shows, and the prompts are not changed. Shares are of valid pictures.
        """,
    ),
    "unlearn": Section(
        "unlearn",
        "Can a concept be removed?",
        """
        UnlearnCanvas' protocol on shapes and styles: {prompts} prompts that name each concept and as many that do not,
        none of which was used to choose latents. Every edit acts on all of these prompts. It is either the bundled
        label of the concept at strength −1; or what the label sees is erased, which leaves an empty picture where
        there was one object, and the scorer knows none; or the latents that are most present when prompts name the
        concept are multiplied wherever they are active, in both branches of guidance, by 0 or, as SAeUron does, by
        less than 0.
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
        training/recipes/arms.yaml --out runs/arms`). For each value, {features} latents are chosen from {pairs} pairs
        of prompts, by how active they are or, where it says so, by effect. They are steered on other prompts, which
        name another value. Each kind is shown at its most efficient strength. *Elsewhere* is a sampler and a number of
        steps that no dictionary was trained on: {elsewhere}.

        *Gain* is the added share of pictures that show the target; *distance* is how far pictures moved, relative to
        how far the edited prompt moves them; *efficiency* is gain over distance. Mean ± standard deviation over seeds.
        The paper has efficiencies of .691 for the method (`method`), .449 for `per-step`, .447 for `raw` and .206 for
        `matryoshka`, on Stable Diffusion 1.5, with other pictures and another judge.

        Here the method is not ahead. By activation it is behind the others, and by effect the kinds are within each
        other's spread. This world's factors were made linearly readable at the steered site, which may be why any
        dictionary steers it.
        """,
    ),
    "kinds": Section(
        "kinds",
        "Which kind of dictionary?",
        """
        All kinds, trained alike on one pass over the same trajectories (`python -m training.train
        training/recipes/kinds.yaml --out runs/kinds`) and measured alike. `rtsae` and `per-step` have one code for a
        whole trajectory, with as many active latents as the others have at each of its five steps. `plain` is as large
        as `mixture`; `large` is ten times that, and had 300 of the 1,000 training steps. Mean ± standard deviation
        over seeds.

        *Recovered* is the share that a reconstruction recovers of the error that the mean activation makes in the
        noise prediction. For *factors read alike* and *distance* {replaced} pictures are drawn with the site's
        activation replaced by its reconstruction at all anchors. *Absorption* (after SAEBench, 2503.09532) is the
        share of a value's tokens on which the latents that stand for it are silent while another latent, a special one
        along the value's direction, is active instead; the paper of `atm` has .0068 for it, .0114 for JumpReLU and
        .140 for TopK, of a language model.

        *Names*: of {named} latents, chosen by their slopes as those of the bundled dictionary, how many make a value
        by themselves, how many of these have a name, and how many names are right, see
        [above](#are-the-names-of-latents-right). Three kinds were named, of seed 0, in dictionaries that were trained
        again by the same recipe (2026-11-30; FVU .203, .076 and .076).

        *Effect* is that of the 16 latents of most first-order effect on {pairs} pairs of prompts, at the best of five
        strengths there, on as many other pairs (1: what changing the prompt does). The same latents then steer
        {prompts} held-out prompts of each kind, for one in {every} of the values of factors with more than two. Probes
        are ridge regressions of the mean code of a picture, averaged over all factors, on {judged} held-out pictures:
        *here* with the sampler that was trained on, *elsewhere* with another one, and *untold* without place and
        guidance for the router.

        Which of the papers' claims hold here?

        - *The method's*, that few latents of a trajectory steer more: yes, by effect, and on open prompts by success.
          There `rtsae` does most with sixteen latents, and leaks less than the kinds of single steps. It also
          reconstructs least, as one code must serve five steps, at each of which a latent has a direction of its own.
          The latents of `per-step` act at one anchor each. At every strength that was tried they overshoot there, so
          that their effect is below zero; still they steer open prompts, without leaking. On prompts that name another
          value, no sixteen constants of any kind succeed, which is why the bundled labels are maps.
        - *TIDE's*, against the static `topk` that it extends: no. Cosine, FVU, pictures and effect are the same within
          the spread.
        - *ATM's*, least absorption: no. It has no less than TopK and BatchTopK, and JumpReLU has most of the kinds of
          single steps. All are small, and the two formulas of its importance are alike.
        - *Experts* with few labels: up to a hundred labels they are read better than a plain dictionary of their size,
          and beyond that worse; up to three hundred they are read better than one ten times as large, which was
          trained for less; and they are read much as a plain one of a quarter of their latents. What the router is
          told helps a little. Most latents of a mixture are never active on whole activations: they learned from
          masked ones.

        No kind is read as well as the raw activation, which this pipeline's training made easy to read. The code of a
        trajectory is read less well elsewhere, where its anchors are not met.
        """,
    ),
    "sequences": Section(
        "sequences",
        "Does the method hold for another process than denoising?",
        """
        The paper: the framework generalises to any sequential process with learnable linear dynamics. Two small
        language models of the docstrings of Python's standard library ({python}) were trained for {network_steps}
        steps. *Recurrent*: the states of a GRU over eight neighbouring characters. *Layered*: the residual stream of a
        character through a transformer of six layers, after the embedding and after each layer. Trajectories are 64
        wide. Dictionaries of {latents} latents were trained for {training_steps} steps, all on the same batches
        (`training.fit` does one such training), and are measured on modules that neither the networks nor the
        dictionaries were trained on.

        `rtsae` and `per-step` explain the residuals of the linear dynamics, `raw` the states themselves; these three
        have one code for a trajectory (of `per-step` each latent reads and writes one step). The others have a code
        for each step, with its share of the active latents, so that all have as many in a trajectory. If they are to
        have as many at each step instead, `rtsae` of the first table stands against the others of the second. Of
        dictionaries with as many latents, those with one code have more parameters: a direction for each step.
        `differences` is an autoencoder of x_t − x_(t−1), whose reconstructions are summed
        up.

        *FVU*: the whole trajectory from its code. *As it goes on*: each step from the code of what was known until
        then, which has as many active latents as that of the whole. *Each step from the true one before*: what is
        missed when the step before is known, as `differences` and the dynamics know it too. *Next character
        recovered*: the share of what the mean state costs in cross-entropy that the reconstruction brings back, as it
        goes on; a whole code would know the characters that follow. Mean ± standard deviation over seeds.

        What comes out depends on the dynamics. Over the layers, where they explain nearly everything, one code for a
        trajectory leaves less unexplained than as few latents spread over the steps; of many latents that is true of
        `raw` alone. Where the true step before is known, the residuals (`rtsae`, `per-step`) leave least of all. But
        without it `raw`, the same without dynamics, is ahead of `rtsae`, since errors are carried on. The layers
        differ in size too, which one scale for all steps, as the kinds of single steps have, serves less well. Over
        characters, where the dynamics explain less, a static TopK is ahead of all that have one code, by every
        measure. And with as many latents at each step instead of in the trajectory, a static kind leaves less
        unexplained on both. Trainings were short.
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
        Difference-of-means directions of {samples} pictures at every attention block, without a dictionary, on
        {images} prompts for each value. A cell is success / mean leakage at the best of all settings, which was chosen
        on these same pictures. The site of the bundled dictionary is the one that the alignment probe was trained at.
        """,
    ),
}

NOTES = """## What was learned on the way

Notes from making what is bundled. Their figures were measured once, on the way, and have no rows in this folder.

- With `beta_end` 0.012 the last timestep still shows background and style through the noise: the signal-to-noise ratio
  is 0.005 over 1,024 latents. So the denoiser ignored what captions say of style and place: both were at chance after
  2,000 steps with two levels, and after 1,000 steps with three. With 0.024 they followed.
- A texture of random phase averages to nothing at high noise and teaches nothing there. A nearly fixed phase does.
- Without a level of 4×4, place stayed at chance. That was under the old schedule; the two changes were not separated.
- Shapes come last. After 3,900 steps of the denoising loss alone they were at chance (0.09). The alignment probe
  changed that: a linear classifier on one site, trained with the denoiser, reads from each token which shape, colour,
  size, background and style it will show, so that the text reaches the picture's tokens at once. After 2,500 more
  steps shapes were right at 0.77, pairs of objects at 0.88. The probe also makes factors *linearly* readable at that
  site by construction. That is good for a world whose truth should be known, and a reason for care when a result from
  there is carried over to models that were not trained so.
- On a CPU, the backward pass of fused attention takes a third of a training step. Plain matrix products do not.
- When an edit contradicts the prompt's colour, the picture does not fade from one colour to the other: the pipeline
  knows eight colours and nothing between. An edit at full strength that starts later gives mixtures, such as a blue
  heart that turns red through purple. But it does so in a narrow part of denoising, which is another one for every two
  colours, so that pictures jump more and not less. An edit at full strength that ends earlier breaks shapes.
- All 26 labels were fitted once more by the fit of today, which draws as many pictures and looks at seven of their
  steps (24 pairs, rank 8, of styles 16). The judge read both sets on the same prompts, 32 for each label and kind. For
  the twelve whose bundled fit had as many pairs: open prompts success .995 and leakage .102, against .995 and .096 of
  the bundled labels; contradicted ones .958 and .185, against .917 and .201; effect on nine new pairs .928 against
  .924. For the fourteen whose bundled fit had twice as many: .960 and .074 against .962 and .085, .873 and .132
  against .877 and .098, effect .85 against .92. The bundled ones stay.
"""
DRAWN = """## What these figures stand on

The pipeline, asked for scenes of held-out combinations (`python -m training.worlds.shapes.evaluate --guidance 2.5
--out examples/shapes-sd/metrics.json`; {prompts} prompts, {steps} steps of {sampler}, guidance {guidance_scale:g}):
the share of named factors that are right. *binding*: both objects have their own shape and colour, in their own place.
Valid scenes are {valid:.2f} of all pictures. How well the dictionary describes activations is on its
[card](../../examples/shapes-rtsae/README.md#measured-on-held-out-trajectories).
"""

PEOPLE_INTRODUCTION = """# Measurements on the world of people

Written by `python -m training.experiments.page` from the JSON files in this folder, the newest first. Each command
continues a file that was begun.

Emoji of one person each, in the styles of three foundries, drawn by a transformer that was trained without any probe.
This page tests whether what holds for [rendered shapes](../README.md) holds here. Factors are the style (which
foundry), the skin tone, who is drawn (woman, man, person) and the role. Prompts are of combinations that none of the
models was trained on; **open** prompts name every factor but the one that is steered, **contradicted** ones name
another value of it. Success, leakage and validity are as there.
"""
PEOPLE_SECTIONS = {
    "names": SECTIONS["names"],
    "explain": SECTIONS["explain"],
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
    "judged": Section(
        "table",
        "Does a label do what it says?",
        """
        Every label of the bundled dictionary is steered at strength 1 on {prompts} prompts of its own, and read by a
        judge: a second scorer of another architecture and training (`examples/people-judge`). Neither prompts nor
        judge had a part in any choice. A cell is success / leakage / valid.

        Labels are linear maps of what the six cross-attentions add. They are fitted to what changing the prompt does,
        and stretched until they move predictions as far, without a scorer (`python -m training.experiments.label
        --world people --steps 4 --pairs 280 --rank 6 --batch-size 32`). `difference of means` acts at the same sites.
        `random map` reads what the label's map reads and moves as far, in random directions. Style transfer is the
        contradicted prompts of styles; the lines below the table say what else changes with it. The edited prompt
        shows what the pipeline draws when the prompt names the value, which is the most that steering can reach.
        """,
    ),
    "ceiling": Section(
        "ceiling",
        "Where can this pipeline be steered?",
        """
        For the first value of each factor, on held-out pairs of prompts (a quarter of {pairs}): the effect of a linear
        map of rank {rank} that was fitted at a block, and the block's ceiling, which is the effect of putting the
        other prompt's activation there. A cell is map / ceiling; 1 is what changing the prompt does. Measured before
        maps were stretched.

        A block with a high ceiling need not have a map that is nearly as good. At the site of the shapes, which was
        made linearly readable, it has; here, what a block's output holds depends on everything else. What the
        cross-attentions add is closer to what the prompt says, and is the same at every step. So the bundled labels
        act there, at all of them at once.
        """,
    ),
    "even": Section(
        "even",
        "Who gets drawn?",
        """
        {prompts} prompts for each of twelve roles, which name it and nothing else, are drawn twice: without steering,
        and with each picture steered at strength 1 to one value of another factor. All values are used equally often,
        whatever the picture shows, and the prompts are not changed. Shares are of valid pictures. What is drawn by
        default follows the pictures of the three foundries, and is no norm.
        """,
    ),
    "dose": Section(
        "dose",
        "How does it depend on the strength?",
        """
        Each label at each strength on {prompts} prompts that leave its factor open: the share of pictures that show
        its value, and how steadily that share and the margin rise with the strength (Spearman's rank correlation).
        Last, prompts that name the value, at strength −1: of the pictures that showed it, the share that no longer do.
        *Jump* is the largest part of a picture's change from strength 0 to 1 that lies between two neighbouring
        strengths, as the median over the pictures that turn: a quarter if the change is even, 1 if it is a switch.
        """,
    ),
    "together": Section(
        "together",
        "Several labels at once, and half of a picture painted",
        """
        As for shapes, {each} prompts of each kind for each set of labels; terse prompts name the role (or, if it is
        steered, another factor). The ways to add maps up: *what is there*, the package's, the sum of what each map
        reads in the activation as it is; *what the others move*, in which each reads it as the others move it; *in
        turn*, as those before it moved it, so that the order matters; *again*, the sum and half of what the maps read
        after it; *shortened*, the sum with no more than the length that changes at right angles would have. None is
        ahead by more than its pictures can tell. Then a label painted on the left half, as there is one person in a
        picture: how far the pixels of each half move, relative to how far the label moves them when it is not painted.
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
        UnlearnCanvas' protocol on styles and roles: {prompts} prompts that name each concept and as many that do not.
        Every edit acts on all of these prompts. It is either the bundled label of the concept at strength −1; or the
        latents that are most present when prompts name the concept are multiplied wherever they are active, in both
        branches of guidance.
        """,
    ),
    "robustness": Section(
        "robustness",
        "Does what was removed stay away?",
        """
        Each style and role that has a label is kept out of pictures whose prompt says it: *plain*, or in ten other
        ways, each of other tokens: known words in another order or another sentence, misspelt, or by a synonym and a
        word of another language (`worlds/people/rewordings.py`). The text encoder was trained on its own captions
        alone; so most of the misspelt and other words say nothing to it, which the share *shown without an edit*
        tells. A cell is, of the pictures that show the concept without an edit, the share that no longer does: mean
        ± standard deviation over seeds, each with another scene and other noise for every concept.

        *Optimised embedding*: an adversary changes the embedding of the plain prompt in {updates} updates (Adam,
        {rate}), by the gradient through the pipeline with the edit in it ({attack_steps} steps of denoising), towards
        the picture of the plain prompt without the edit. *Negative prompt*: the concept alone, as the negative
        prompt. Every picture has some style, so that a prompt that says nothing of it shows the one in question now
        and then. Three ways act in the text encoder, by an autoencoder of its tokens that is trained on captions: the
        codes of the concept alone, subtracted token by token as Concept Steerers do (2501.19066); or, on all tokens,
        the eight latents ablated that these codes have most of. The adversary, whose embedding the text encoder does
        not make, passes these by.

        At strength −1 a role stays away in nearly all words that say it, far more surely than by a negative prompt,
        which is up against a prompt that asks for it. But it is not gone: the adversary brings nearly all of it back.
        Ablating latents of the text encoder does as much, with words. Subtracting codes does next to nothing here:
        they are those of another prompt's places, and this encoder (T5) keeps a word at its place and masks what
        fills up, where CLIP spreads it. None of these is a safety filter.
        """,
    ),
    "arms": Section(
        "arms",
        "The paper's comparison: which kind of dictionary?",
        """
        As for shapes, but at block 3 of this transformer: dictionaries of one size, trained alike on one pass over the
        same trajectories (`python -m training.train training/recipes/people-kinds.yaml --out runs/people-kinds`). For
        each value, {features} latents are chosen from {pairs} pairs of prompts, by how active they are or by effect.
        They are steered on other prompts, which name another value. Each kind is shown at its most efficient strength;
        *elsewhere* is {elsewhere}. Mean ± standard deviation over seeds.

        The method, and the same without a code for the whole trajectory, recover the prediction when each step starts
        from the true one before, and hardly any of it rolled out. By effect they steer alike, by activation the raw
        one is ahead; all are within each other's spread. None of them is of use here: most pictures that do show the
        value are broken or changed elsewhere, as [a few constants](#which-kind-of-dictionary) of any dictionary steer
        this block little.
        """,
    ),
    "kinds": Section(
        "kinds",
        "Which kind of dictionary?",
        """
        The paper's kinds, TIDE, and the static kind that it extends, at block 3, trained alike on one pass over the
        same trajectories (`python -m training.train training/recipes/people-kinds.yaml --out runs/people-kinds`). They
        are measured as those of shapes are: {replaced} pictures with reconstructed activations, {pairs} pairs that
        choose the 16 latents of most effect and as many that judge them, {prompts} prompts of each kind, for one in
        {every} of the values. Mean ± standard deviation over seeds.

        The linear predictor explains each anchor better than the paper's does on larger models, which leaves little
        for a code of the whole trajectory to explain; and that code reconstructs least, as on shapes. TIDE and the
        static kind that it extends are the same within the spread, as there. No sixteen constants of any kind steer
        this block: what has to be added depends on what is there, which is why labels are maps. The trainings were
        short, and these differences between kinds are theirs.
        """,
    ),
}

PEOPLE_NOTES = """## What was learned on the way

Notes from making what is bundled. Their figures were measured once, on the way, and have no rows in this folder.

- At a block, a map of each token reaches a third of what the other prompt's activation does there, at any block and
  with any rank. At what the six cross-attentions add it reaches two thirds, because what is added there is what the
  prompt says. Maps at three blocks at once overshoot, as each is fitted to the whole change; maps at attentions add
  up.
- It takes many pairs. The held-out effect of `woman` was −.14 with 18 pairs and rank 16, .53 with 100 pairs, .61 with
  200 and .65 with 300; with maps that also read the place of a token it was .57, .67 and .73. A larger ridge helps
  with few pairs and a smaller one with many, so the held-out pairs choose the ridge.
- Two labels at once both succeed about as often as two independent ones would. Letting the second map read what the
  first has left, instead of adding both to what was there, is no better: .33 against .38, with five pairs of labels in
  both orders and ten prompts each.
- Least squares moves less far than the prompt, by all that it cannot predict: at the six cross-attentions, .6 to .8 of
  the length. Stretched by what is missing, labels succeed on prompts that contradict them as often as unstretched ones
  did on prompts that leave the factor open (`judge` .08 to .83 of twelve pictures, `vampire` .33 to .83, `woman` .67
  to .92, `person` .58 to .83), and the effect on the prediction is about as large. Past that, pictures break. At a
  single block, whose map is far below its ceiling, stretching costs effect, so it ends where a tenth is lost.
- Styles need less strength. Of thirty pictures at strength .6, .7, .8 and 1 the judge reads the style in .70, .87, .93
  and .93, the role as before in .93, .93, .90 and .67, and tone and who as before in about two thirds each. With the
  edited prompt it is .90, .93 and two thirds.
- Maps away from a concept are not stretched. Where they were, strength −1 removed roles as surely, but broke one
  picture in six. Styles, of which there are only three, it removed from all pictures instead of from .72.
- Fitted once more, to pictures that the label itself had steered, `judge` and `vampire` gained .01 and .02 of effect
  and no success. Steering both branches of guidance undoes a label: guidance is what turns part of the way into all of
  it.
- Rank matters less (.64, .66 and .66 with rank 4, 8 and 16). More than two anchors, at which maps may differ, hardly
  matter.
- All 24 labels were fitted once more by the fit of today, to as many pairs, and the judge read both sets on the same
  twelve prompts for each label and kind. Open prompts: success .885 and leakage .465, against .882 and .469 of the
  bundled labels, all pictures valid. Contradicted ones: .771, .576 and valid .948, against .785, .559 and .965; the
  differences over the labels are −.014 ± .017, .017 ± .009 and −.017 ± .011 (standard errors). The largest is that of
  `twemoji`, .50 against .83; all but that and `medium-dark` differ by a picture at most. The bundled ones stay.
"""
DRAWN_PEOPLE = """## What these figures stand on

The pipeline, asked for people of held-out combinations with every factor named (`python -m
training.worlds.people.evaluate --out examples/people-dit/metrics.json`; {prompts} prompts, {steps} steps, guidance
{guidance_scale:g}): the share of pictures that show each as the prompt says, read by the scorer. Below, what the
scorer and the judge read right in the foundries' own pictures of held-out combinations.
"""
SHEET = """
64 held-out prompts that nobody chose: on the left of each pair what the pipeline draws, on the right the foundry's own
picture (Noto Emoji © Google, Apache-2.0; Twemoji © Twitter, Inc. and other contributors, CC BY 4.0; Fluent Emoji ©
Microsoft, MIT).

![Pairs of pictures](drawn.webp)
"""
