"""
States: the noisy latents that a denoiser meets while it draws pairs of prompts, and its predictions for them.

A state is small. It keeps the noisy latents, the texts, the predictions with both prompts, and the few latents of the
dictionary that are active. The activations themselves lie on disk while a batch of pictures is drawn; then they are
summed up and deleted. Whoever needs one later computes it again from the noisy latents.

`States` is long because drawing states and asking them share all that it keeps; their parts are in `state.py`,
`stored.py`, `replay.py` and `calls.py`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from ..denoiser import Arguments, Block, Call, Tap, TimeGrid, get_denoiser, get_denoisers, noise_schedule
from ..dictionary import Dictionary
from ..models import Step
from ..pipeline import get_dictionary, resting
from .calls import CallRecorder, draw
from .maps import Moments
from .replay import ReplayableCall, SharedPrefix
from .state import State
from .stored import Codes, Shelf

Pair = tuple[str, str]
Change = torch.Tensor | Callable[[torch.Tensor], torch.Tensor]
# What to add to the tokens of each site, (rows, N or 1, d), or a function that computes it from the tokens.
Changes = dict[str, Change]
CHUNK = 4096  # latents that are processed together
ROWS = 8  # states in one gradient, at most
_READ = 2**22  # numbers in memory at once while latents are read, unless one picture alone has more


def check_prompts(pipeline, prompts: Sequence[str]) -> None:
    """Raise `ValueError` unless the pipeline takes prompts and its tokenizer cuts none of these off."""
    if "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(f"An effect compares prompts, but {type(pipeline).__name__} takes no `prompt`.")
    tokenizer = getattr(pipeline, "tokenizer", None)
    for prompt in prompts if tokenizer is not None else ():
        count = len(tokenizer(prompt).input_ids)
        if count > tokenizer.model_max_length:
            raise ValueError(
                f"A prompt of {count} tokens is cut off at {tokenizer.model_max_length}, perhaps before the concept: "
                f"{prompt[:60]!r}…"
            )


def finite(values: torch.Tensor) -> torch.Tensor:
    """Return the values; raise `ValueError` if one of them is NaN or inf."""
    if not values.isfinite().all():
        raise ValueError("Expected finite numbers from the denoiser, got NaN or inf; float32 or bfloat16 may help.")
    return values


@dataclass
class _Run:
    """The states of one generation, and for each site the tokens that the two prompts change, `(states, N)`."""

    states: list[State]
    differing: dict[str, torch.Tensor]

    def reversed(self) -> _Run:
        """With the prompts exchanged."""
        return _Run([state.reversed() for state in self.states], self.differing)


@dataclass
class _Drawn:
    """
    The activations of one batch of pictures.

    Args:
        shelf (`Shelf`): holds the activation of each site at each step, `(rows, N, d)`, under `("own", site, step)`;
            and at sampled steps, for the rows in `differ`, the activation with the other prompt of their pair, under
            `("other", site, step)`.
        timesteps (`list[float]`): of all steps.
        sampled (`list[int]`): the steps that states are made of.
        towards (`list[bool]`): whether each row is drawn with the "to" prompt.
        differ (`list[int]`): the rows whose two prompts differ.
    """

    shelf: Shelf
    timesteps: list[float]
    sampled: list[int]
    towards: list[bool]
    differ: list[int]

    def sides(self, site: str, step: int, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The activation of a row at a step with the "from" and with the "to" prompt, `(N, d)`."""
        own = self.shelf.get(("own", site, step), row, row + 1)[0]
        if row not in self.differ:
            return own, own
        place = self.differ.index(row)
        other = self.shelf.get(("other", site, step), place, place + 1)[0]
        return (other, own) if self.towards[row] else (own, other)


@dataclass
class Measured:
    """
    What an edit does to predictions.

    Args:
        gains (`dict[float, torch.Tensor]`): by timestep, how much that step adds to the effect on each pair,
            `(pairs,)`.
        moved (`torch.Tensor`): the squared distance that the edit moves the predictions of each pair, as a share of
            the squared distance between the two prompts' predictions, `(pairs,)`.
    """

    gains: dict[float, torch.Tensor]
    moved: torch.Tensor

    @property
    def effects(self) -> torch.Tensor:
        """E for each pair, `(pairs,)`."""
        return sum(self.gains.values())


class States:
    """
    The noisy latents that a denoiser meets while it draws both pictures of each pair of prompts, unsteered.

    Args:
        pipeline (`DiffusionPipeline`): with a dictionary loaded.
        pairs (`Sequence[tuple[str, str]]`): (from, to). The two may be equal: such a pair measures what must not
            change.
        adapter_name (`str`, *optional*): of the dictionary.
        seed (`int`): of the noise. Both prompts of a pair start from the same noise, each pair from another.
        batch_size (`int`): prompts in one denoiser call; memory grows with it.
        progress (`bool`): show a bar.
        codes (`bool`): read all latents. An [`Intervention`] whose edits read latents needs them.
        moments (`bool`): collect the sums that linear maps are fitted to, in `moments`.
        steps (`int`): the most steps of a generation to make states of.
        drawn (*optional*): called after each batch of pictures with the share of all pictures that it drew.
        call: passed to the pipeline.

    Raises:
        `ValueError`: the pipeline takes no prompt, its tokenizer cuts one off, or its denoiser gives NaN or inf.
    """

    @torch.no_grad()
    def __init__(
        self, pipeline, pairs: Sequence[Pair], adapter_name: str | None = None, seed: int = 0, batch_size: int = 16,
        progress: bool = False, codes: bool = True, moments: bool = False, steps: int = 13,
        drawn: Callable[[float], None] | None = None, **call,
    ):  # fmt: skip
        self.pipeline, self.denoiser = pipeline, get_denoiser(pipeline)
        self.dictionary: Dictionary = get_dictionary(pipeline, adapter_name)
        self.pairs, self._seed, self._call, self.batch_size = list(pairs), seed, call, batch_size
        self._codes, self._steps = codes, steps
        self.moments: dict[str, Moments] | None = {} if moments else None
        check_prompts(pipeline, sorted({prompt for pair in self.pairs for prompt in pair}))
        self.activations = {site: sae.config.activation for site, sae in self.dictionary.sites.items()}
        self.grids = {
            site: TimeGrid(sae.config.anchors, noise_schedule(pipeline.scheduler))
            for site, sae in self.dictionary.sites.items()
        }
        per_run, self._runs = max(1, batch_size // 2), []
        starts = range(0, len(self.pairs), per_run)
        if progress:  # an app shows a disabled bar too
            starts = tqdm(starts, desc="pictures", unit="batch", leave=False)
        with resting(pipeline):
            for start in starts:
                batch = self.pairs[start : start + per_run]
                self._runs.append(self._capture(start, batch))
                if drawn is not None:
                    drawn(len(batch) / len(self.pairs))
        total, count = torch.zeros(len(self.pairs)), torch.zeros(len(self.pairs))
        for state in self.all():
            total.index_add_(0, torch.tensor(state.pairs), state.distance)
            count.index_add_(0, torch.tensor(state.pairs), torch.ones(len(state)))
        self.differs = torch.tensor([pair[0] != pair[1] for pair in self.pairs])
        self.scale = total / count  # mean squared distance of the two predictions over the states of each pair
        self.scale[~self.differs] = self.scale[self.differs].median() if self.differs.any() else 1.0

    def _capture(self, first: int, pairs: list[Pair]) -> _Run:
        """Draw both pictures of some pairs, and make states of their sampled steps."""
        order = [*range(len(pairs)), *(i for i, pair in enumerate(pairs) if pair[0] != pair[1])]
        row_of = {i: row for row, i in enumerate(order[len(pairs) :], start=len(pairs))}
        prompts = [pairs[i][int(row >= len(pairs))] for row, i in enumerate(order)]
        target_texts = [row_of.get(i, i) for i in order]
        keeps, denoisers = self._codes or self.moments is not None, get_denoisers(self.pipeline)
        with Shelf() as shelf:
            calls = self._draw(prompts, [self._seed + first + i for i in order], denoisers, shelf if keeps else None)
            towards = [row >= len(pairs) for row in range(len(order))]
            differ = [row for row, i in enumerate(order) if i in row_of]
            sampled = [*range(0, len(calls), -(-len(calls) // self._steps))]
            drawn = _Drawn(shelf, [call.timestep for call, _ in calls], sampled, towards, differ)
            others = [order[row] if towards[row] else target_texts[row] for row in differ]
            states = []
            for step in drawn.sampled:
                replayable, own = calls[step]
                prediction, target = own, own
                if differ:
                    other = own.clone()
                    other[differ] = self._replay(replayable, differ, others, step, shelf if keeps else None)
                    to = torch.tensor(towards, device=own.device).view(-1, *(1 for _ in own.shape[1:]))
                    prediction, target = torch.where(to, other, own), torch.where(to, own, other)
                distance = finite((prediction.float() - target.float()).square().flatten(1).sum(1)).cpu()
                numbers = list(range(len(order))), order, target_texts, [first + i for i in order]
                states.append(State(replayable, *numbers, prediction, target, distance, self.activations))
            run = _Run(states, {})
            for site in self.dictionary.sites if keeps else ():
                self._take(site, drawn, run)
        return run

    def _draw(
        self, prompts: list[str], seeds: list[int], denoisers: dict[str, nn.Module], shelf: Shelf | None
    ) -> list[tuple[ReplayableCall, torch.Tensor]]:
        """The calls of the denoiser while the pipeline drew these prompts, each with its prediction."""
        keep = None if shelf is None else lambda step, site, tokens: shelf.put(("own", site, step), tokens)
        recorder = CallRecorder(denoisers, self.activations, keep)
        draw(self.pipeline, prompts, seeds, recorder, **self._call)
        self.sizes, self.guidance = recorder.sizes, recorder.call.guidance
        return recorder.calls

    def _replay(
        self, replayable: ReplayableCall, rows: list[int], texts: list[int], step: int, shelf: Shelf | None
    ) -> torch.Tensor:
        """The prediction for some rows with other prompts; their activations go to the shelf."""
        if shelf is None:
            return replayable.replay(rows, texts)
        keep = lambda _, site, tokens: shelf.put(("other", site, step), tokens)  # noqa: E731
        with CallRecorder({"": replayable.denoiser}, self.activations, keep):
            return replayable.replay(rows, texts)

    def _take(self, site: str, drawn: _Drawn, run: _Run) -> None:
        """Sum up the activations of a site, row by row, as they may be large."""
        sae, rows = self.dictionary.sites[site], range(len(drawn.towards))
        tokens = len(drawn.sides(site, 0, 0)[0])
        if self.moments is not None and site not in self.moments:
            self.moments[site] = Moments(sae, tokens, self.sizes[site])
        change = torch.zeros(len(rows), tokens)
        for state, step in zip(run.states, drawn.sampled, strict=True):
            changes = torch.zeros(len(rows), tokens)
            for row in rows:
                present, goal = drawn.sides(site, step, row)
                changes[row] = (present.float() - goal.float()).norm(dim=-1).cpu()
            change, state.tokens[site] = change + changes, tokens
            if self.moments is not None and drawn.differ:
                at = self.grids[site].coordinate(state.timestep)
                weight = self.moments[site].weight(at, changes[drawn.differ])
                for row in rows:
                    self.moments[site].add(at, weight, *drawn.sides(site, step, row))
        run.differing[site] = change > 0.3 * change.amax(1, keepdim=True)
        if self._codes:
            for state, codes in zip(run.states, self._read(site, drawn, tokens), strict=True):
                state.codes[site], state.goal_codes[site] = codes

    def _read(self, site: str, drawn: _Drawn, tokens: int) -> Iterator[tuple[Codes, Codes]]:
        """The latents of each state of a run, with the "from" and with the "to" prompt. Both read the same past: the
        steps before, with the prompt that the picture was drawn with."""
        sae, rows = self.dictionary.sites[site], len(drawn.towards)
        count, device = sae.config.num_latents, drawn.sides(site, 0, 0)[0].device
        together = min(CHUNK, max(1024, _READ // (len(sae.config.anchors) * sae.config.in_channels)))
        results, start = [([], []) for _ in drawn.sampled], 0
        while start < count:
            stop = min(start + together, count)
            reader = sae.reader(list(range(start, stop)), device)
            if reader.computes is not None and stop - start < count:  # a reader that computes all latents anyway
                start, stop = 0, count
                reader = sae.reader(list(range(count)), device)
            size = max(1, _READ // (tokens * max(sae.config.in_channels, stop - start)))
            for first in range(0, rows, size):
                some = range(first, min(first + size, rows))
                memory = reader.begin()
                for step, timestep in enumerate(drawn.timesteps):
                    at = self.grids[site].step(timestep, self.sizes[site], self.guidance)
                    own, sides = drawn.shelf.get(("own", site, step), some.start, some.stop), ()
                    if step in drawn.sampled:
                        sides = zip(*(drawn.sides(site, step, row) for row in some), strict=True)
                    for side, activation in enumerate(sides):
                        codes = reader.read(memory.copy(), torch.stack(activation), at)
                        row, token, latent = where = codes.nonzero(as_tuple=True)
                        active = (row + first) * tokens + token, latent + start, codes[where]
                        results[drawn.sampled.index(step)][side].append(active)
                    reader.read(memory, own, at)
                    memory.continue_with(own)
            start = stop
        for sides in results:
            yield tuple(Codes.of(rows, tokens, count, side) for side in sides)

    def reversed(self) -> States:
        """These states with the "from" and the "to" prompts exchanged."""
        other = copy.copy(self)
        other.pairs = [pair[::-1] for pair in self.pairs]
        other._runs = [run.reversed() for run in self._runs]
        other.moments = self.moments and {site: moments.reversed() for site, moments in self.moments.items()}
        return other

    def all(self) -> Iterator[State]:
        """The states of all runs and steps."""
        return (state for run in self._runs for state in run.states)

    @property
    def device(self) -> torch.device:
        """The device of the activations."""
        return next(self.all()).device

    def step(self, site: str, state: State) -> Step:
        """The denoising step of a state, as the dictionary of a site takes it."""
        return self.grids[site].step(state.timestep, self.sizes.get(site), self.guidance)

    def presence(self, site: str) -> tuple[list[float], torch.Tensor, torch.Tensor]:
        """
        How present each latent is at each sampled step: its mean activation over tokens, in units of its typical
        activation. Returns the timesteps, and `(steps, num_latents)` for the pictures of the "to" prompts and for
        those of the "from" prompts.
        """
        sae = self.dictionary.sites[site]
        timesteps = [state.timestep for state in self._runs[0].states]
        sums = torch.zeros(2, len(timesteps), sae.config.num_latents)
        for run in self._runs:
            for step, state in enumerate(run.states):
                plain = state.drawn_with_from[:, None]
                sums[0, step] += state.goal_codes[site].sums(~plain) / state.tokens[site]
                sums[1, step] += state.codes[site].sums(plain) / state.tokens[site]
        means = sums / (len(self.pairs) * sae.typical_activation.cpu())
        return timesteps, means[0], means[1]

    def differing_tokens(self, site: str) -> Iterator[torch.Tensor]:
        """For each state, the tokens whose activation the two prompts change, `(states, N)`."""
        for run in self._runs:
            yield from (run.differing[site] for _ in run.states)

    def predict(self, state: State, rows: Sequence[int], changes: Changes) -> torch.Tensor:
        """v(x, from) of some of a state's rows, with `changes` added at the sites; differentiable in the changes."""
        adding = AddingTap(self.activations)
        with adding.tap.watching({"": state.call.denoiser}, changes):
            return adding.predict(state, rows, changes)

    def errors(self, state: State, rows: Sequence[int], changes: Changes) -> torch.Tensor:
        """‖v(x, from; changes) − v(x, to)‖² of some of a state's rows, `(rows,)`, divided by the mean of
        ‖v(x, from) − v(x, to)‖² over the states of the row's pair. Its average over these states is 1 − E."""
        return self.squared_distance(state, rows, self.predict(state, rows, changes), state.target)

    def squared_distance(
        self, state: State, rows: Sequence[int], prediction: torch.Tensor, reference: torch.Tensor
    ) -> torch.Tensor:
        """The squared distance, `(rows,)`, in the unit of `errors`, between predictions of some of a state's rows and
        the same rows of `reference`, which has all rows."""
        scale = self.scale[[state.pairs[row] for row in rows]].to(prediction.device)
        return (prediction - reference[list(rows)].float()).square().flatten(1).sum(1) / scale

    def distances(self, state: State, rows: Sequence[int]) -> torch.Tensor:
        """‖v(x, from) − v(x, to)‖² of some rows, `(rows,)`, in the unit of `errors`, on the CPU."""
        return state.distance[list(rows)] / self.scale[[state.pairs[row] for row in rows]]

    def effects(self, changes: Callable[[State, Sequence[int]], Changes]) -> torch.Tensor:
        """
        E of an edit on each pair, `(pairs,)`. Where both prompts are the same: minus the squared change, in units of
        the median squared distance of the pairs that differ.

        Args:
            changes: the edit: computes the changes for a state and some of its rows.
        """
        return self.measure([changes])[0].effects

    @torch.no_grad()
    def measure(self, edits: Sequence[Callable[[State, Sequence[int]], Changes]]) -> list[Measured]:
        """What each of several edits does. The blocks before the first site run once for all of them, so that several
        edits at late sites cost little more than one."""
        pairs = len(self.pairs)
        gains, moved, count = [{} for _ in edits], torch.zeros(len(edits), pairs), torch.zeros(pairs)
        for state in self.all():
            for start in range(0, len(state), self.batch_size):
                rows = range(len(state))[start : start + self.batch_size]
                at, distances = torch.tensor([state.pairs[row] for row in rows]), self.distances(state, rows)
                count.index_add_(0, at, torch.ones(len(rows)))
                for i, prediction in enumerate(self.predictions(state, rows, edits)):
                    gain = gains[i].setdefault(state.timestep, torch.zeros(pairs))
                    missing = self.squared_distance(state, rows, prediction, state.target).cpu()
                    gain.index_add_(0, at, distances - missing)
                    moved[i].index_add_(0, at, self.squared_distance(state, rows, prediction, state.prediction).cpu())
        count = count.clamp(min=1)
        return [
            Measured({timestep: gain / count for timestep, gain in gains[i].items()}, moved[i] / count)
            for i in range(len(edits))
        ]

    def predictions(
        self, state: State, rows: Sequence[int], edits: Sequence[Callable[[State, Sequence[int]], Changes]]
    ) -> Iterator[torch.Tensor]:
        """`predict` for each of several edits."""
        denoiser, adding = state.call.denoiser, AddingTap(self.activations)
        with (
            SharedPrefix(denoiser, self.activations if len(edits) > 1 else ()) as prefix,
            adding.tap.watching({"": denoiser}, self.activations),
        ):
            for edit in edits:
                changes = edit(state, rows)
                with prefix.reused():
                    yield adding.predict(state, rows, changes) if changes else state.prediction[list(rows)].float()

    def draw(self, count: int, generator: torch.Generator) -> Iterator[tuple[State, list[int], float]]:
        """Random rows of random states. States whose two predictions are far apart are drawn more often; the weight
        that comes with each makes the weighted average an average over all states."""
        states, rows = list(self.all()), min(ROWS, self.batch_size)
        size = torch.stack([(state.distance / self.scale[state.pairs]).mean() for state in states])
        if not size.any():
            size += 1
        chance = 0.8 * size / size.sum() + 0.2 / len(states)
        places = (torch.arange(count) + torch.rand(1, generator=generator)) / count  # evenly, to vary less
        picks = torch.bucketize(places, chance.cumsum(0)).clamp(max=len(states) - 1)
        for pick in picks[torch.randperm(count, generator=generator)].tolist():
            chosen = torch.randperm(len(states[pick]), generator=generator)[:rows].tolist()
            yield states[pick], chosen, 1 / (len(states) * float(chance[pick]))


class AddingTap:
    """Adds changes to the activations of the sites that its tap watches."""

    def __init__(self, activations: dict[str, str]):
        self.changes: Changes = {}
        self.activations, self.tap = activations, Tap(self)

    def predict(self, state: State, rows: Sequence[int], changes: Changes) -> torch.Tensor:
        """v(x, from) of some of a state's rows, with these changes."""
        self.changes = changes
        return state.call.replay([state.samples[row] for row in rows], [state.texts[row] for row in rows]).float()

    def begin(self, call: Call, arguments: Arguments) -> None:
        """Called before the denoiser runs."""

    def site(
        self, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor | None:
        """The block's hidden states with the change added; `None` if nothing changes at this site."""
        change = self.changes.get(name)
        if change is None:
            return None
        if callable(change):
            change = change(block.activation(self.activations[name], block_input, hidden_states))
        return hidden_states + block.from_tokens(change.to(hidden_states.device), hidden_states)
