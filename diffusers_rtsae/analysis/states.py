"""
States: the noisy latents that a denoiser meets on the way to pictures of pairs of prompts, and what it answers.

What is kept of them is small: the noisy latents, the texts, the predictions with both prompts, and of the activations
the few latents that are active. Activations themselves are on disk while a batch of pictures is drawn, and are then
summed up and forgotten; where one is wanted later, it is made again from the noisy latents.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from tqdm.auto import tqdm

from ..denoiser import Arguments, Block, Call, Tap, TimeGrid, get_denoiser, get_denoisers, noise_schedule, token_grid
from ..dictionary import Dictionary
from ..models import Step, TokenGrid
from ..pipeline import get_dictionary, own_size, resting
from .maps import Moments
from .replay import Asked, Beginning, Texts, prediction_of

Pair = tuple[str, str]
Change = torch.Tensor | Callable[[torch.Tensor], torch.Tensor]
# What to add to the tokens of each site, (rows, N or 1, d), or how that follows from these.
Changes = dict[str, Change]
TOKENS = Block("")  # of activations that are laid out as tokens
CHUNK = 4096  # latents looked at together
_ROWS = 8  # states of one gradient, at most
_READ = 2**22  # numbers that are read or computed at once where latents are read, or those of one picture


def check_prompts(pipeline, prompts: Sequence[str]) -> None:
    """Raise `ValueError` unless a pipeline draws prompts, and reads these to their end."""
    if "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise ValueError(f"An effect is that of a prompt, and {type(pipeline).__name__} takes none.")
    tokenizer = getattr(pipeline, "tokenizer", None)
    for prompt in prompts if tokenizer is not None else ():
        count = len(tokenizer(prompt).input_ids)
        if count > tokenizer.model_max_length:
            raise ValueError(
                f"A prompt of {count} tokens is cut off at {tokenizer.model_max_length}, perhaps before the concept: "
                f"{prompt[:60]!r}…"
            )


def finite(values: torch.Tensor) -> torch.Tensor:
    """The same values; raises `ValueError` if some are none."""
    if not values.isfinite().all():
        raise ValueError("The denoiser, or its gradient, is NaN or inf here; float32 or bfloat16 may help.")
    return values


class _Shelf:
    """Tensors on disk, of which some rows at a time are read; gone when it is closed."""

    def __init__(self):
        self._file, self._kept = tempfile.TemporaryFile(), {}

    def __enter__(self) -> _Shelf:
        return self

    def __exit__(self, *error) -> None:
        self._file.close()

    def put(self, key: tuple, values: torch.Tensor) -> None:
        """Keep `(rows, ...)`, instead of what has this key and the same shape."""
        host = values.detach().to("cpu").contiguous()
        if key not in self._kept:
            self._kept[key] = self._file.seek(0, 2), host.shape, host.dtype, values.device
        self._file.seek(self._kept[key][0])
        self._file.write(host.flatten().view(torch.uint8).numpy().data)

    def get(self, key: tuple, start: int, stop: int) -> torch.Tensor:
        """These rows, on the device that they came from."""
        place, shape, dtype, device = self._kept[key]
        row = shape[1:].numel() * dtype.itemsize
        self._file.seek(place + start * row)
        read = bytearray((stop - start) * row)
        self._file.readinto(read)
        return torch.frombuffer(read, dtype=dtype).view(stop - start, *shape[1:]).to(device)


class Calls:
    """
    Keeps the conditional part of a denoiser's calls, and tells of the activations of some sites, while a pipeline runs
    inside the `with` block. A sampler that calls twice at one timestep: the later call stands.

    Args:
        kinds (`dict[str, str]`): what is read at each site.
        keep (*optional*): is told of the step, counted from 0, the site and its activation, `(rows, N, d)`.
    """

    def __init__(
        self, denoisers: dict[str, nn.Module], kinds: dict[str, str],
        keep: Callable[[int, str, torch.Tensor], None] | None = None,
    ):  # fmt: skip
        self.denoisers, self.kinds, self._keep = denoisers, kinds, keep
        self._tap = Tap(self)

    def __enter__(self) -> Calls:
        self.kept: list[tuple[Asked, torch.Tensor]] = []
        self.sizes: dict[str, TokenGrid | None] = {}
        self.call, self._asked, self._tokens, self._texts = None, None, {}, Texts()
        self._tap.watch(self.denoisers, self.kinds)
        return self

    def __exit__(self, *error) -> None:
        self._tap.watch(self.denoisers, None)
        self._asked, self._tokens, self._texts = None, {}, Texts()

    def begin(self, call: Call, arguments: Arguments) -> None:
        """The denoiser is called."""
        asked = Asked.of(self.denoisers[self._tap.last.component], call, arguments, self._texts)
        self.call, self._asked, self._tokens = call, asked, {}

    def site(
        self, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> None:
        """A site was run."""
        if self._asked is None:
            return
        batch = block.batch(hidden_states)
        index = block.rows(hidden_states, call.rows_of("cond", batch))
        self.sizes[name] = token_grid(call, name, batch, block.space(hidden_states))
        if self._keep is not None:
            self._tokens[name] = block.activation(self.kinds[name], block_input[index], hidden_states[index])

    def end(self, call: Call, output) -> None:
        """The denoiser returns."""
        if self._asked is None:
            return
        if self.kept and self.kept[-1][0].timestep == self._asked.timestep:
            self.kept.pop()
        for site, tokens in self._tokens.items():
            self._keep(len(self.kept), site, tokens)
        prediction = prediction_of(output)
        self.kept.append((self._asked, prediction[call.rows_of("cond", len(prediction))].clone()))
        self._asked, self._tokens = None, {}


@dataclass
class Codes:
    """
    The latents of a site that are active on the tokens of some rows.

    Args:
        rows, tokens, count (`int`): how many rows there are, tokens in each, and latents in all.
        places, latents (`torch.Tensor`): token, counted through all rows, and latent of each that is active.
        values (`torch.Tensor`): how much it is.
    """

    rows: int
    tokens: int
    count: int
    places: torch.Tensor
    latents: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, rows: int, tokens: int, count: int, found: list[tuple[torch.Tensor, ...]]) -> Codes:
        """Of what was found in parts: places, latents and values."""
        places, latents, values = (torch.cat(kind) for kind in zip(*found, strict=True))
        kinds = (torch.int16 if bound < 2**15 else torch.int32 for bound in (rows * tokens, count))
        places, latents = (index.to(kind) for index, kind in zip((places, latents), kinds, strict=True))
        return cls(rows, tokens, count, places, latents, values)

    def dense(self, latents: Sequence[int]) -> torch.Tensor:
        """Of these latents, `(rows, N, latents)`."""
        column = torch.full((self.count,), -1, device=self.values.device)
        column[list(latents)] = torch.arange(len(latents), device=self.values.device)
        columns = column[self.latents.long()]
        wanted = columns >= 0
        found = torch.zeros(self.rows * self.tokens, len(latents), device=self.values.device)
        found[self.places[wanted].long(), columns[wanted]] = self.values[wanted]
        return found.view(self.rows, self.tokens, -1)

    def sums(self, weights: torch.Tensor, active: bool = False) -> torch.Tensor:
        """Over tokens that weigh `(rows, N or 1)`, of each latent's activation, or of whether it is active: `(m,)`, on
        the CPU."""
        weights = weights.to(self.values).expand(self.rows, self.tokens).flatten()[self.places.long()]
        values = weights if active else weights * self.values
        return torch.zeros(self.count, device=values.device).index_add_(0, self.latents.long(), values).cpu()


@dataclass
class State:
    """
    Noisy latents of one step, and what the denoiser should answer to them.

    Args:
        call (`Asked`): what the denoiser was called with.
        samples, texts, wants (`list[int]`): its rows with the noisy latent, the "from" and the "to" prompt of each
            state.
        pairs (`list[int]`): which pair each state is of.
        before, wanted (`torch.Tensor`): v(x, from) and v(x, to), `(states, ...)`.
        distance (`torch.Tensor`): ‖v(x, from) − v(x, to)‖² of each state, `(states,)`, on the CPU.
        kinds (`dict[str, str]`): what the dictionary reads at each site.
        tokens (`dict[str, int]`): how many each site has.
        codes, goal_codes (`dict[str, Codes]`): the latents of each site with the "from" and the "to" prompt.
    """

    call: Asked
    samples: list[int]
    texts: list[int]
    wants: list[int]
    pairs: list[int]
    before: torch.Tensor
    wanted: torch.Tensor
    distance: torch.Tensor
    kinds: dict[str, str]
    tokens: dict[str, int] = field(default_factory=dict)
    codes: dict[str, Codes] = field(default_factory=dict)
    goal_codes: dict[str, Codes] = field(default_factory=dict)

    @property
    def timestep(self) -> float:
        return self.call.timestep

    @property
    def device(self) -> torch.device:
        """Where its activations are."""
        return self.before.device

    @property
    def drawn_plain(self) -> torch.Tensor:
        """Whether the noisy latent of each state was made with its "from" prompt, `(states,)`."""
        return torch.tensor([sample == text for sample, text in zip(self.samples, self.texts, strict=True)])

    @property
    def present(self) -> dict[str, torch.Tensor]:
        """The activation of each site with the "from" prompt, `(states, N, d)`; made again whenever it is asked for,
        as `goal` is."""
        return self.activations(self.texts)

    @property
    def goal(self) -> dict[str, torch.Tensor]:
        """The activation of each site with the "to" prompt, `(states, N, d)`."""
        return self.activations(self.wants)

    @torch.no_grad()
    def activations(self, texts: Sequence[int]) -> dict[str, torch.Tensor]:
        """Those of each site with the prompts of these rows of the call, `(states, N, d)`."""
        found = {}
        with Calls({"": self.call.denoiser}, self.kinds, lambda step, site, tokens: found.update({site: tokens})):
            self.call.replay(self.samples, texts)
        return found

    def __len__(self) -> int:
        return len(self.samples)

    def reversed(self) -> State:
        """With the "from" and the "to" prompts exchanged."""
        return replace(
            self, texts=self.wants, wants=self.texts, before=self.wanted, wanted=self.before, codes=self.goal_codes,
            goal_codes=self.codes,
        )  # fmt: skip


@dataclass
class _Run:
    """The states of one generation, and on which tokens of each site the prompts make a difference, `(states, N)`."""

    states: list[State]
    concern: dict[str, torch.Tensor]

    def reversed(self) -> _Run:
        """With the prompts exchanged."""
        return _Run([state.reversed() for state in self.states], self.concern)


@dataclass
class _Drawn:
    """
    What was seen while one batch of pictures was drawn.

    Args:
        shelf (`_Shelf`): has the activation of each site `("own", site, step)`, `(rows, N, d)`, and, at steps that
            are looked at, that of the rows in `differ` with the other prompt of their pair, `("other", site, step)`.
        timesteps (`list[float]`): of all steps.
        looked (`list[int]`): steps that are looked at.
        towards (`list[bool]`): whether each row is drawn with the "to" prompt.
        differ (`list[int]`): rows whose prompts differ.
    """

    shelf: _Shelf
    timesteps: list[float]
    looked: list[int]
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
        gains (`dict[float, torch.Tensor]`): what each step, by timestep, contributes to its effect on each pair,
            `(pairs,)`.
        moved (`torch.Tensor`): how far, squared, it moves the predictions of each pair, in units of how far changing
            the prompt does, `(pairs,)`.
    """

    gains: dict[float, torch.Tensor]
    moved: torch.Tensor

    @property
    def effects(self) -> torch.Tensor:
        """E for each pair, `(pairs,)`."""
        return sum(self.gains.values())


class States:
    """
    What a denoiser meets on the way from noise to the pictures of pairs of prompts. Nothing is steered meanwhile.

    Args:
        pipeline (`DiffusionPipeline`): with a dictionary loaded.
        pairs (`Sequence[tuple[str, str]]`): (from, to). The two may be the same: nothing is to change then.
        adapter_name (`str`, *optional*): of the dictionary.
        seed (`int`): of the noise; both prompts of a pair start at the same, each pair at another.
        batch_size (`int`): prompts shown to the denoiser at once; what memory is needed goes with it.
        progress (`bool`): show a bar.
        codes (`bool`): read all latents, which parts of an [`Intervention`] need that read any.
        moments (`bool`): sum up what linear maps are fitted by, in `moments`.
        steps (`int`): of a generation that are looked at, at most.
        drawn (*optional*): called after each batch of pictures, with the share that it is of all.
        call: passed to the pipeline.

    Raises:
        `ValueError`: the pipeline takes no prompt, cuts one off, or its denoiser gives NaN or inf.
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
        self.kinds = {site: rtsae.config.activation for site, rtsae in self.dictionary.sites.items()}
        self.grids = {
            site: TimeGrid(rtsae.config.anchors, noise_schedule(pipeline.scheduler))
            for site, rtsae in self.dictionary.sites.items()
        }
        per_run, self._runs = max(1, batch_size // 2), []
        starts = range(0, len(self.pairs), per_run)
        with resting(pipeline):
            for start in tqdm(starts, desc="pictures", unit="batch", leave=False, disable=not progress):
                own = self.pairs[start : start + per_run]
                self._runs.append(self._capture(start, own))
                if drawn is not None:
                    drawn(len(own) / len(self.pairs))
        total, count = torch.zeros(len(self.pairs)), torch.zeros(len(self.pairs))
        for state in self.all():
            total.index_add_(0, torch.tensor(state.pairs), state.distance)
            count.index_add_(0, torch.tensor(state.pairs), torch.ones(len(state)))
        told = torch.tensor([pair[0] != pair[1] for pair in self.pairs])
        self.scale = total / count  # mean distance of the states of each pair
        self.scale[~told] = self.scale[told].median() if told.any() else 1.0
        self.told = told

    def _capture(self, first: int, pairs: list[Pair]) -> _Run:
        """Draw both pictures of some pairs, and take what is wanted of them."""
        order = [*range(len(pairs)), *(i for i, pair in enumerate(pairs) if pair[0] != pair[1])]
        row_of = {i: row for row, i in enumerate(order[len(pairs) :], start=len(pairs))}
        prompts = [pairs[i][int(row >= len(pairs))] for row, i in enumerate(order)]
        wants = [row_of.get(i, i) for i in order]
        keeps, denoisers = self._codes or self.moments is not None, get_denoisers(self.pipeline)
        with _Shelf() as shelf:
            kept = self._draw(prompts, [self._seed + first + i for i in order], denoisers, shelf if keeps else None)
            towards = [row >= len(pairs) for row in range(len(order))]
            differ = [row for row, i in enumerate(order) if i in row_of]
            every = -(-len(kept) // self._steps)
            drawn = _Drawn(
                shelf, [asked.timestep for asked, _ in kept], [*range(0, len(kept), every)], towards, differ
            )
            others = [order[row] if towards[row] else wants[row] for row in differ]
            states = []
            for step in drawn.looked:
                asked, own = kept[step]
                before, wanted = own, own
                if differ:
                    other = own.clone()
                    other[differ] = self._ask(asked, differ, others, step, shelf if keeps else None)
                    to = torch.tensor(towards, device=own.device).view(-1, *(1 for _ in own.shape[1:]))
                    before, wanted = torch.where(to, other, own), torch.where(to, own, other)
                distance = finite((before.float() - wanted.float()).square().flatten(1).sum(1)).cpu()
                numbers = list(range(len(order))), order, wants, [first + i for i in order]
                states.append(State(asked, *numbers, before, wanted, distance, self.kinds))
            run = _Run(states, {})
            for site in self.dictionary.sites if keeps else ():
                self._take(site, drawn, run)
        return run

    def _draw(
        self, prompts: list[str], seeds: list[int], denoisers: dict[str, nn.Module], shelf: _Shelf | None
    ) -> list[tuple[Asked, torch.Tensor]]:
        """What the denoiser was asked while the pipeline drew prompts, and what it said."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        call = own_size(self.pipeline) | self._call
        keep = None if shelf is None else lambda step, site, tokens: shelf.put(("own", site, step), tokens)
        with Calls(denoisers, self.kinds, keep) as calls:
            self.pipeline(prompts, generator=generators, output_type="latent", **call)
            self.sizes, self.guidance = calls.sizes, calls.call.guidance
            return calls.kept

    def _ask(self, asked: Asked, rows: list[int], texts: list[int], step: int, shelf: _Shelf | None) -> torch.Tensor:
        """The prediction of some rows with other prompts; their activations are put on the shelf."""
        if shelf is None:
            return asked.replay(rows, texts)
        with Calls({"": asked.denoiser}, self.kinds, lambda _, site, tokens: shelf.put(("other", site, step), tokens)):
            return asked.replay(rows, texts)

    def _take(self, site: str, drawn: _Drawn, run: _Run) -> None:
        """Take what is wanted of the activations of a site, a row at a time, as they may be large."""
        rtsae, rows = self.dictionary.sites[site], range(len(drawn.towards))
        tokens = len(drawn.sides(site, 0, 0)[0])
        if self.moments is not None and site not in self.moments:
            self.moments[site] = Moments(rtsae, tokens, self.sizes[site])
        concern = torch.zeros(len(rows), tokens)
        for state, step in zip(run.states, drawn.looked, strict=True):
            changes = torch.zeros(len(rows), tokens)
            for row in rows:
                present, goal = drawn.sides(site, step, row)
                changes[row] = (present.float() - goal.float()).norm(dim=-1).cpu()
            concern, state.tokens[site] = concern + changes, tokens
            if self.moments is not None and drawn.differ:
                at = self.grids[site].coordinate(state.timestep)
                weight = self.moments[site].weight(at, changes[drawn.differ])
                for row in rows:
                    self.moments[site].add(at, weight, *drawn.sides(site, step, row))
        run.concern[site] = concern > 0.3 * concern.amax(1, keepdim=True)
        if self._codes:
            for state, codes in zip(run.states, self._read(site, drawn, tokens), strict=True):
                state.codes[site], state.goal_codes[site] = codes

    def _read(self, site: str, drawn: _Drawn, tokens: int) -> Iterator[tuple[Codes, Codes]]:
        """The latents of each state of a run with the "from" and with the "to" prompt. A latent depends on what was
        there at the steps before, with the prompt that the noisy latents were made with."""
        rtsae, rows = self.dictionary.sites[site], len(drawn.towards)
        count, device = rtsae.config.num_latents, drawn.sides(site, 0, 0)[0].device
        together = min(CHUNK, max(1024, _READ // (len(rtsae.config.anchors) * rtsae.config.in_channels)))
        found, start = [([], []) for _ in drawn.looked], 0
        while start < count:
            stop = min(start + together, count)
            reader = rtsae.reader(list(range(start, stop)), device)
            if reader.computes is not None and stop - start < count:  # which computes all anyway
                start, stop = 0, count
                reader = rtsae.reader(list(range(count)), device)
            size = max(1, _READ // (tokens * max(rtsae.config.in_channels, stop - start)))
            for first in range(0, rows, size):
                some = range(first, min(first + size, rows))
                memory = reader.begin()
                for step, timestep in enumerate(drawn.timesteps):
                    at = self.grids[site].step(timestep, self.sizes[site], self.guidance)
                    own, sides = drawn.shelf.get(("own", site, step), some.start, some.stop), ()
                    if step in drawn.looked:
                        sides = zip(*(drawn.sides(site, step, row) for row in some), strict=True)
                    for side, there in enumerate(sides):
                        codes = reader.read(memory.copy(), torch.stack(there), at)
                        row, token, latent = where = codes.nonzero(as_tuple=True)
                        active = (row + first) * tokens + token, latent + start, codes[where]
                        found[drawn.looked.index(step)][side].append(active)
                    reader.read(memory, own, at)
                    memory.continue_with(own)
            start = stop
        for sides in found:
            yield tuple(Codes.of(rows, tokens, count, side) for side in sides)

    def reversed(self) -> States:
        """The same with the "from" and the "to" prompts exchanged."""
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
        """Where activations are."""
        return next(self.all()).device

    def step(self, site: str, state: State) -> Step:
        """Where in a generation a state is, for the dictionary of a site."""
        return self.grids[site].step(state.timestep, self.sizes.get(site), self.guidance)

    def presence(self, site: str) -> tuple[list[float], torch.Tensor, torch.Tensor]:
        """
        How present each latent is in the runs of the "to" prompts and in those of the "from" prompts, at each step
        that is looked at: timesteps, and twice `(steps, num_latents)`, the mean activation over tokens in units of the
        typical one.
        """
        rtsae = self.dictionary.sites[site]
        timesteps = [state.timestep for state in self._runs[0].states]
        sums = torch.zeros(2, len(timesteps), rtsae.config.num_latents)
        for run in self._runs:
            for step, state in enumerate(run.states):
                plain = state.drawn_plain[:, None]
                sums[0, step] += state.goal_codes[site].sums(~plain) / state.tokens[site]
                sums[1, step] += state.codes[site].sums(plain) / state.tokens[site]
        means = sums / (len(self.pairs) * rtsae.typical_activation.cpu())
        return timesteps, means[0], means[1]

    def concerned(self, site: str) -> Iterator[torch.Tensor]:
        """For each state, the tokens `(states, N)` on which the two prompts make a difference."""
        for run in self._runs:
            yield from (run.concern[site] for _ in run.states)

    def predict(self, state: State, rows: Sequence[int], changes: Changes) -> torch.Tensor:
        """v(x, from) of some of a state's rows with `changes` added at the sites; differentiable in these."""
        adding = _Adding(self.kinds)
        with adding.tap.watching({"": state.call.denoiser}, changes):
            return adding.predict(state, rows, changes)

    def errors(self, state: State, rows: Sequence[int], changes: Changes) -> torch.Tensor:
        """‖v(x, from; changes) − v(x, to)‖² of some of a state's rows, `(rows,)`, in units of the mean distance of the
        two prompts' predictions over the states of its pair: the average over these is 1 − E."""
        return self.apart(state, rows, self.predict(state, rows, changes), state.wanted)

    def apart(self, state: State, rows: Sequence[int], prediction: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """How far, squared, predictions of some of a state's rows are from others of all of them, in that unit."""
        scale = self.scale[[state.pairs[row] for row in rows]].to(prediction.device)
        return (prediction - others[list(rows)].float()).square().flatten(1).sum(1) / scale

    def distances(self, state: State, rows: Sequence[int]) -> torch.Tensor:
        """‖v(x, from) − v(x, to)‖² of some rows, `(rows,)`, in that unit, on the CPU."""
        return state.distance[list(rows)] / self.scale[[state.pairs[row] for row in rows]]

    def gained(self, state: State, rows: Sequence[int], changes: Changes) -> torch.Tensor:
        """By how much `changes` bring the prediction of some of a state's rows nearer to that of the "to" prompt,
        `(rows,)`, in units of `errors`: the average over these is E."""
        return self.distances(state, rows) - self.errors(state, rows, changes).cpu()

    def effects(self, changes: Callable[[State, Sequence[int]], Changes]) -> torch.Tensor:
        """
        E of the edit that `changes` gives for each state and rows of it, for each pair, `(pairs,)`. Where the prompts
        are the same: minus the change, in units of the median distance of the pairs that differ.
        """
        return self.measure([changes])[0].effects

    @torch.no_grad()
    def measure(self, edits: Sequence[Callable[[State, Sequence[int]], Changes]]) -> list[Measured]:
        """What each of several edits does, at little more than the cost of one where sites come late: what is before
        them is computed once."""
        pairs = len(self.pairs)
        gains, moved, count = [{} for _ in edits], torch.zeros(len(edits), pairs), torch.zeros(pairs)
        for state in self.all():
            for start in range(0, len(state), self.batch_size):
                rows = range(len(state))[start : start + self.batch_size]
                at, before = torch.tensor([state.pairs[row] for row in rows]), self.distances(state, rows)
                count.index_add_(0, at, torch.ones(len(rows)))
                for i, prediction in enumerate(self.predictions(state, rows, edits)):
                    own = gains[i].setdefault(state.timestep, torch.zeros(pairs))
                    own.index_add_(0, at, before - self.apart(state, rows, prediction, state.wanted).cpu())
                    moved[i].index_add_(0, at, self.apart(state, rows, prediction, state.before).cpu())
        count = count.clamp(min=1)
        return [
            Measured({timestep: own / count for timestep, own in gains[i].items()}, moved[i] / count)
            for i in range(len(edits))
        ]

    def predictions(
        self, state: State, rows: Sequence[int], edits: Sequence[Callable[[State, Sequence[int]], Changes]]
    ) -> Iterator[torch.Tensor]:
        """`predict` for each of several edits."""
        denoiser, adding = state.call.denoiser, _Adding(self.kinds)
        with (
            Beginning(denoiser, self.kinds if len(edits) > 1 else ()) as beginning,
            adding.tap.watching({"": denoiser}, self.kinds),
        ):
            for edit in edits:
                changes = edit(state, rows)
                with beginning.again():
                    yield adding.predict(state, rows, changes) if changes else state.before[list(rows)].float()

    def draw(self, count: int, generator: torch.Generator) -> Iterator[tuple[State, list[int], float]]:
        """Random rows of random states, with the weight that makes their average that of all; states that the prompts
        tell apart more come more often."""
        states, rows = list(self.all()), min(_ROWS, self.batch_size)
        size = torch.stack([(state.distance / self.scale[state.pairs]).mean() for state in states])
        if not size.any():
            size += 1
        chance = 0.8 * size / size.sum() + 0.2 / len(states)
        places = (torch.arange(count) + torch.rand(1, generator=generator)) / count  # evenly, so that they vary less
        picks = torch.bucketize(places, chance.cumsum(0)).clamp(max=len(states) - 1)
        for pick in picks[torch.randperm(count, generator=generator)].tolist():
            chosen = torch.randperm(len(states[pick]), generator=generator)[:rows].tolist()
            yield states[pick], chosen, 1 / (len(states) * float(chance[pick]))


class _Adding:
    """Adds changes to activations at sites that its tap watches."""

    def __init__(self, kinds: dict[str, str]):
        self.changes: Changes = {}
        self.kinds, self.tap = kinds, Tap(self)

    def predict(self, state: State, rows: Sequence[int], changes: Changes) -> torch.Tensor:
        """What the denoiser answers to some rows of a state with these changes."""
        self.changes = changes
        return state.call.replay([state.samples[row] for row in rows], [state.texts[row] for row in rows]).float()

    def begin(self, call: Call, arguments: Arguments) -> None:
        """The denoiser is called."""

    def site(
        self, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor | None:
        """The activation with the change."""
        change = self.changes.get(name)
        if change is None:
            return None
        if callable(change):
            change = change(block.activation(self.kinds[name], block_input, hidden_states))
        return hidden_states + block.from_tokens(change.to(hidden_states.device), hidden_states)
