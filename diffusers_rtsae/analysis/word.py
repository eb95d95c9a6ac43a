"""What a word of the prompt does at each step of a picture, and what is left of it when latents are changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tqdm.auto import tqdm

from ..denoiser import TimeGrid, get_denoisers, noise_schedule
from ..dictionary import Dictionary
from ..models import Memory, SparseDictionary, Step
from ..pipeline import get_dictionary, resting
from ..steering import Edit, Fold, fold_edits, total
from .calls import CallRecorder, call_with, draw
from .effect import frozen, gradient
from .exchanged import Latent
from .replay import ReplayableCall, SharedPrefix
from .states import AddingTap, Changes, check_prompts, finite
from .stored import Codes

_POINTS = (1, 2, 4, 8)  # of the line between two activations, at which gradients are taken
_CLOSE = 0.01  # of what the word does at a step: an error that needs no more points


@dataclass
class WordState:
    """
    A step of a picture, with what the word does there.

    Args:
        call (`ReplayableCall`): the call of the denoiser.
        prediction, change (`torch.Tensor`): v(x, prompt), and u, its difference to v(x, without), `(1, ...)`.
        size (`float`): ⟨u, u⟩.
        through (`float`): ⟨u, v(x, prompt) − v(x, prompt; all sites as without the word)⟩.
        whole (`dict[str, torch.Tensor]`): what the word adds to the activation of each site, `(rows, N, d)`.
        differences (`dict[str, Codes]`): the same in latents, per unit of their directions.
        codes (`dict[str, Codes]`): the active latents with the prompt.
        gains (`dict[str, torch.Tensor]`): for kinds that have one, the gain with the prompt, `(rows, N, 1)`.
    """

    call: ReplayableCall
    prediction: torch.Tensor
    change: torch.Tensor
    size: float
    through: float
    whole: dict[str, torch.Tensor]
    differences: dict[str, Codes]
    codes: dict[str, Codes]
    gains: dict[str, torch.Tensor]


@dataclass
class _Run:
    """A prediction, and the activations of each site: what its dictionary reads, and what its latents move, both
    `(rows, N, d)`."""

    prediction: torch.Tensor
    read: dict[str, torch.Tensor]
    moved: dict[str, torch.Tensor]


class _Reading:
    """The latents of a site along the steps of one run."""

    def __init__(self, sae: SparseDictionary, device: torch.device):
        self.reader = sae.reader(list(range(sae.config.num_latents)), device)
        self.memory: Memory = self.reader.begin()

    def read(self, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        latents = self.reader.read(self.memory, tokens, step)
        self.memory.continue_with(tokens)
        return latents


class WordStates:
    """
    The noisy latents of one picture, unsteered, with what a word of its prompt does to the prediction for each: the
    module `explain` says how that passes sites and latents.

    Args:
        pipeline (`DiffusionPipeline`): with a dictionary loaded.
        prompt, without (`str`): the prompt, and the prompt without the word.
        adapter_name (`str`, *optional*): of the dictionary.
        seed (`int`): of the noise.
        steps (`int`): the most steps of the generation to make states of.
        batch_size (`int`): the most gradients to take at once.
        progress (`bool`): show a bar.
        call: passed to the pipeline.

    Raises:
        `ValueError`: the pipeline takes no prompt, its tokenizer cuts one off or makes the same tokens of both, or its
            denoiser gives NaN or inf; or the two get the same predictions.
    """

    @torch.no_grad()
    def __init__(
        self, pipeline, prompt: str, without: str, adapter_name: str | None = None, seed: int = 0, steps: int = 13,
        batch_size: int = 8, progress: bool = False, **call,
    ):  # fmt: skip
        check_prompts(pipeline, [prompt, without])
        _check_tokens(pipeline, prompt, without)
        self.pipeline, self.batch_size, self.seed = pipeline, batch_size, seed
        self.dictionary: Dictionary = get_dictionary(pipeline, adapter_name)
        kinds = {site: sae.config.activation for site, sae in self.dictionary.sites.items()}
        self._inputs = {site: kind for site, kind in kinds.items() if kind == "input"}
        self._activations, self._moved = kinds, kinds | dict.fromkeys(self._inputs, "output")
        denoisers = get_denoisers(pipeline)
        recorder = CallRecorder(denoisers, self._moved)
        self._readings: dict[tuple[str, str], _Reading] = {}
        self.states: list[WordState] = []
        with resting(pipeline):
            self.image = draw(pipeline, [prompt], [seed], recorder, **{"output_type": "pil"} | call)[0]
            self.text = call_with(pipeline, [without], denoisers, **call)
            calls = [one for one, _ in recorder.calls]
            self.sizes, self.guidance = recorder.sizes, recorder.call.guidance
            alphas = noise_schedule(pipeline.scheduler)
            self.grids = {site: TimeGrid(sae.config.anchors, alphas) for site, sae in self.dictionary.sites.items()}
            sampled = set(range(0, len(calls), -(-len(calls) // steps)))
            for i, one in enumerate(tqdm(calls, desc="steps", unit="step", leave=False, disable=not progress)):
                self._look(one, i in sampled)
        self._readings.clear()
        self.size = sum(state.size for state in self.states)
        if not self.size:
            raise ValueError(
                f"{prompt!r} and {without!r} get the same predictions, so there is nothing to explain: expected a "
                "word that the model knows."
            )

    def step(self, site: str, call: ReplayableCall) -> Step:
        """The denoising step of a call, as the dictionary of a site takes it."""
        return self.grids[site].step(call.timestep, self.sizes.get(site), self.guidance)

    def _look(self, call: ReplayableCall, is_sampled: bool) -> None:
        """Make a state of a step, or only read it where later steps need that."""
        if not is_sampled and not any(sae.reads_past for sae in self.dictionary.sites.values()):
            return
        own, other = self._run(call), self._run(call, said=self.text)
        needed = is_sampled or len(self._moved) > 1  # nothing comes before the first site
        exchanged = self._run(call, become=other.moved) if needed else own
        whole, differences, codes, gains = {}, {}, {}, {}
        for site, sae in self.dictionary.sites.items():
            step = self.step(site, call)
            codes[site] = _sparse(self._read("own", site, own, step))
            added = self._amounts("exchanged", site, exchanged, step) - self._amounts("other", site, other, step)
            differences[site] = _sparse(added)
            whole[site] = exchanged.moved[site] - other.moved[site]
            if (gain := sae.gain(own.read[site])) is not None:
                gains[site] = gain
        if is_sampled:
            change = finite(own.prediction - other.prediction)
            through = float((change * (own.prediction - exchanged.prediction)).sum())
            size = float(change.square().sum())
            self.states.append(
                WordState(call, own.prediction, change, size, through, whole, differences, codes, gains)
            )

    def _run(
        self, call: ReplayableCall, said: ReplayableCall | None = None, become: dict[str, torch.Tensor] | None = None
    ) -> _Run:
        """
        Run the denoiser on a step's noisy latents.

        Args:
            said (`ReplayableCall`, *optional*): with the text of this call.
            become (`dict[str, torch.Tensor]`, *optional*): set what latents move to these activations. What a site
                would have had is kept.
        """
        moved, inputs = {}, {}

        def change(site: str, tokens: torch.Tensor) -> torch.Tensor:
            moved[site] = tokens.float()
            return torch.zeros_like(moved[site]) if become is None else become[site] - moved[site]

        keep = lambda _, site, tokens: inputs.update({site: tokens.float()})  # noqa: E731
        reading = CallRecorder({"": call.denoiser}, self._inputs, keep) if self._inputs else nullcontext()
        with reading:
            prediction = self._predict(call, {site: partial(change, site) for site in self._moved}, said=said)
        return _Run(prediction, moved | inputs, moved)

    def _predict(
        self, call: ReplayableCall, changes: Changes, rows: int = 1, said: ReplayableCall | None = None,
        of: dict[str, str] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """v of a step's noisy latents, with changes added to what latents move; `rows` times, for changes that differ.
        Changes that are functions get what latents move, or the activations that `of` names."""
        adding = AddingTap(self._moved if of is None else of)
        adding.changes = changes
        with adding.tap.watching({"": call.denoiser}, self._moved):
            return call.replay([0] * rows, [0] * rows, said).float()

    def _read(self, name: str, site: str, run: _Run, step: Step) -> torch.Tensor:
        """The latents of a site in the run of this name, `(rows, N, m)`; each name has a past of its own."""
        if (name, site) not in self._readings:
            self._readings[name, site] = _Reading(self.dictionary.sites[site], run.read[site].device)
        return self._readings[name, site].read(run.read[site], step)

    def _amounts(self, name: str, site: str, run: _Run, step: Step) -> torch.Tensor:
        """The same per unit of the latents' directions: times the gain, for kinds that have one."""
        latents, gain = self._read(name, site, run, step), self.dictionary.sites[site].gain(run.read[site])
        return latents if gain is None else latents * gain

    # ---- gradients

    def slopes(self, state: WordState) -> tuple[dict[str, torch.Tensor], int, float]:
        """
        The mean gradient of ⟨u, v⟩ along the line on which the word is taken out of all sites.

        Returns:
            the gradient at each site, `(rows, N, d)`; the number of its points; and what its products with the
            differences miss of what goes `through` the sites.

        Raises:
            `ValueError`: the denoiser gives no gradient at a site.
        """
        with resting(self.pipeline), frozen(self.pipeline):
            for points in _POINTS:
                slopes = self._mean_gradient(state, points)
                said = sum(float((slopes[site] * whole).sum()) for site, whole in state.whole.items())
                if abs(state.through - said) <= _CLOSE * state.size:
                    break
        return slopes, points, state.through - said

    def _mean_gradient(self, state: WordState, points: int) -> dict[str, torch.Tensor]:
        """With Gauss and Legendre's rule of so many points."""
        places, weights = (torch.tensor(values) / 2 for values in np.polynomial.legendre.leggauss(points))
        sums = {site: torch.zeros_like(whole) for site, whole in state.whole.items()}
        for some, shares in zip((places + 0.5).split(self.batch_size), weights.split(self.batch_size), strict=True):
            leaves = {
                site: (-some.to(whole)[:, None, None, None] * whole).flatten(0, 1).requires_grad_()
                for site, whole in state.whole.items()
            }
            along = (self._predict(state.call, leaves, len(some)) * state.change).flatten(1).sum(1)
            for site, slope in gradient((along * shares.to(along)).sum(), leaves).items():
                sums[site] += slope.unflatten(0, (len(some), -1)).sum(0)
        return sums

    # ---- taking latents away

    def undone(self, sets: Sequence[Sequence[Latent]]) -> list[float]:
        """For each set of latents, the share of the word that goes if they are set, all at once, to what they are
        without the word."""
        return self._taken(lambda state: [self._undoing(state, latents) for latents in sets])

    def ablated(self, sets: Sequence[Sequence[Latent]]) -> list[float]:
        """For each set of latents, the share of the word that goes if they are ablated, all at once, wherever they
        are active."""
        device = self.states[0].change.device
        folds = []
        for latents in sets:
            own = {}
            for site, indices in _by_site(latents).items():
                ones = (1.0,) * len(indices)
                edit = Edit(latents=indices, weights=ones, strength=1.0, operation="ablate", clip=False)
                own[site] = fold_edits([edit], self.dictionary.sites[site], list(indices), device)
            folds.append(own)
        return self._taken(lambda state: [self._ablating(state, own) for own in folds])

    @torch.no_grad()
    def _taken(self, changing: Callable[[WordState], list[Changes]]) -> list[float]:
        gone: list[float] = []
        with resting(self.pipeline):
            for state in self.states:
                edits = changing(state)
                gone = gone or [0.0] * len(edits)
                for i, prediction in enumerate(self._changed(state, edits)):
                    gone[i] += float((state.change * (state.prediction - prediction)).sum())
        return [one / self.size for one in gone]

    def _changed(self, state: WordState, edits: Sequence[Changes]) -> Iterator[torch.Tensor]:
        """The predictions with each of several changes."""
        with SharedPrefix(state.call.denoiser, self._moved if len(edits) > 1 else ()) as prefix:
            for changes in edits:
                with prefix.reused():
                    yield self._predict(state.call, changes, of=self._activations)

    def _undoing(self, state: WordState, latents: Sequence[Latent]) -> Changes:
        changes: Changes = {}
        for site, indices in _by_site(latents).items():
            vectors = self.vectors(site, state, indices)
            changes[site] = -state.differences[site].dense(indices) @ vectors
        return changes

    def _ablating(self, state: WordState, folds: dict[str, list[Fold]]) -> Changes:
        def change(site: str, tokens: torch.Tensor) -> torch.Tensor:
            step = self.step(site, state.call)
            own = [(fold, state.codes[site].dense(fold.options.latents)) for fold in folds[site]]
            return total([fold.change(tokens, latents, step) for fold, latents in own], tokens)

        return {site: partial(change, site) for site in folds}

    def vectors(self, site: str, state: WordState, latents: Sequence[int]) -> torch.Tensor:
        """The directions of latents at a step, `(latents, d)`."""
        directions = self.dictionary.sites[site].directions(list(latents)).to(state.change.device)
        return directions.at(self.step(site, state.call))


def _check_tokens(pipeline, prompt: str, without: str) -> None:
    """Raise `ValueError` if the pipeline's tokenizers see no difference."""
    if prompt == without:
        raise ValueError(f"Expected another prompt to compare {prompt!r} with, one without the word, got the same.")
    tokenizers = [getattr(pipeline, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")]
    known = [tokenizer for tokenizer in tokenizers if tokenizer is not None]
    if known and all(one(prompt).input_ids == one(without).input_ids for one in known):
        raise ValueError(
            f"The tokenizer makes the same tokens of {prompt!r} and {without!r}: expected a word that it does not "
            "drop."
        )


def _by_site(latents: Sequence[Latent]) -> dict[str, tuple[int, ...]]:
    sites = dict.fromkeys(site for site, _ in latents)
    return {site: tuple(index for own, index in latents if own == site) for site in sites}


def _sparse(values: torch.Tensor) -> Codes:
    """What is not zero of `(rows, N, m)`."""
    rows, tokens, count = values.shape
    row, token, latent = where = values.nonzero(as_tuple=True)
    return Codes.of(rows, tokens, count, [(row * tokens + token, latent, values[where])])
