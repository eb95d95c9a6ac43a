"""
Effect: how much of what another prompt would change in a denoiser's prediction an edit of its activations changes.

With v the prediction, x a noisy latent, and a "from" and a "to" prompt that differ in a concept,

    E(edit) = 1 − Σ ‖v(x, from; edit) − v(x, to)‖² / Σ ‖v(x, from) − v(x, to)‖²

over steps and over noisy latents of both prompts' own runs; the mean over pairs. 1: the edit does what changing the
prompt does; 0: nothing; below 0: harm. It needs no scorer and no picture. Its gradient at no edit ranks all latents at
once (attribution patching: Nanda 2022; Kramár et al. 2024, 2403.00745).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from tqdm.auto import tqdm

from ..denoiser import (
    Arguments,
    Block,
    Call,
    Tap,
    TimeGrid,
    get_denoiser,
    get_denoisers,
    is_compiled,
    noise_schedule,
    token_grid,
)
from ..hub import Dictionary
from ..models import TokenGrid, interpolate
from ..pipeline import get_dictionary, own_size, resting

Pair = tuple[str, str]
Change = torch.Tensor | Callable[[torch.Tensor], torch.Tensor]
# What to add to the tokens of each site, (rows, N or 1, d), or how that follows from these.
Changes = dict[str, Change]
_ROWS = 8  # states of one gradient, at most
TOKENS = Block("")  # of activations that are laid out as tokens
CHUNK = 4096  # latents looked at together
_STEPS = 13  # of a generation that are looked at, at most
_NOT_BATCHED = ("img_ids", "txt_ids")  # positions, the same for all rows


def check_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs of different prompts; raises `ValueError` with the first that is none."""
    if isinstance(pairs, str) or not pairs:
        raise ValueError("Expected pairs (from, to) of prompts, got none.")
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
            raise ValueError(f"Expected pairs (from, to) of prompts, got {pair!r}.")
        if pair[0] == pair[1]:
            raise ValueError(
                f"The prompts of a pair must differ, or there is no effect to have a share of: both are {pair[0]!r}. "
                "Prompts in which nothing is to change go in `unchanged`."
            )
    return [tuple(pair) for pair in pairs]


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


def _take(value, batch: int, rows, name: str = ""):
    """Some rows of whatever in a denoiser's arguments has one for each of its batch."""
    if torch.is_tensor(value) and value.ndim and len(value) == batch and name not in _NOT_BATCHED:
        return value[rows]
    if isinstance(value, dict):
        return {key: _take(inner, batch, rows, key) for key, inner in value.items()}
    if isinstance(value, list) and len(value) == batch and all(torch.is_tensor(one) for one in value):
        return value[rows] if isinstance(rows, slice) else [value[row] for row in rows]
    if isinstance(value, list | tuple):
        return type(value)(_take(inner, batch, rows) for inner in value)
    return value


def _prediction(output) -> torch.Tensor:
    output = output[0] if isinstance(output, tuple) else output.sample
    return torch.stack(output) if isinstance(output, list) else output


@dataclass
class Asked:
    """What the conditional rows of a denoiser were asked in one call."""

    denoiser: nn.Module
    timestep: float  # in training units
    arguments: Arguments
    rows: int

    @classmethod
    def of(cls, denoiser: nn.Module, call: Call, arguments: Arguments) -> Asked | None:
        """`None` if it has no conditional rows."""
        rows = call.rows_of("cond", call.rows)
        if rows is None:
            return None
        args = tuple(_take(value, call.rows, rows) for value in arguments.args)
        kwargs = _take(arguments.kwargs, call.rows, rows)
        own = Arguments(arguments.names, args, kwargs, arguments.channels)
        return cls(denoiser, call.timestep, own, rows.stop - rows.start)

    def replay(self, samples: Sequence[int], texts: Sequence[int]) -> torch.Tensor:
        """The prediction for the noisy latents of some rows and the text, and all else, of others."""
        names, args, kwargs = self.arguments.names, self.arguments.args, self.arguments.kwargs
        args, kwargs = tuple(_take(value, self.rows, texts) for value in args), _take(kwargs, self.rows, texts)
        sample = _take(self.arguments.sample, self.rows, samples)
        args, kwargs = Arguments(names, args, kwargs).with_sample(sample)
        return _prediction(self.denoiser(*args, **kwargs))


class Calls:
    """Keeps the conditional part of a denoiser's calls, with the activations of some sites, while a pipeline runs
    inside the `with` block. A sampler that calls twice at one timestep: the later call stands."""

    def __init__(self, denoisers: dict[str, nn.Module], sites: Sequence[str]):
        self.denoisers, self.sites, self._tap = denoisers, sites, Tap(self)

    def __enter__(self) -> Calls:
        self.kept: list[tuple[Asked, torch.Tensor, dict]] = []
        self.sizes: dict[str, TokenGrid | None] = {}
        self.call, self._asked, self._tokens = None, None, {}
        self._tap.watch(self.denoisers, self.sites)
        return self

    def __exit__(self, *error) -> None:
        self._tap.watch(self.denoisers, None)

    def begin(self, call: Call, arguments: Arguments) -> None:
        """The denoiser is called."""
        denoiser = self.denoisers[self._tap.component]
        self.call, self._asked, self._tokens = call, Asked.of(denoiser, call, arguments), {}

    def site(
        self, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> None:
        """A site was run."""
        if self._asked is not None:
            batch = block.batch(hidden_states)
            index = block.rows(hidden_states, call.rows_of("cond", batch))
            self.sizes[name] = token_grid(call, name, batch, block.space(hidden_states))
            self._tokens[name] = (block.to_tokens(block_input[index]), block.to_tokens(hidden_states[index]))

    def end(self, call: Call, output) -> None:
        """The denoiser returns."""
        if self._asked is None:
            return
        if self.kept and self.kept[-1][0].timestep == self._asked.timestep:
            self.kept.pop()
        prediction = _prediction(output)
        self.kept.append((self._asked, prediction[call.rows_of("cond", len(prediction))].float(), self._tokens))


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
        distance (`torch.Tensor`): ‖v(x, from) − v(x, to)‖² of each state, `(states,)`.
        codes (`dict[str, torch.Tensor]`): latents of each site that an edit reads, `(states, N, latents)`.
        columns (`dict[str, dict[int, int]]`): where in these a latent is.
        present, goal (`dict[str, torch.Tensor]`): the activation of each site with the "from" and the "to" prompt,
            `(states, N, d)`.
    """

    call: Asked
    samples: list[int]
    texts: list[int]
    wants: list[int]
    pairs: list[int]
    before: torch.Tensor
    wanted: torch.Tensor
    distance: torch.Tensor
    codes: dict[str, torch.Tensor] = field(default_factory=dict)
    columns: dict[str, dict[int, int]] = field(default_factory=dict)
    present: dict[str, torch.Tensor] = field(default_factory=dict)
    goal: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def timestep(self) -> float:
        return self.call.timestep

    def __len__(self) -> int:
        return len(self.samples)

    def reversed(self) -> State:
        """With the "from" and the "to" prompts exchanged."""
        return replace(
            self, texts=self.wants, wants=self.texts, before=self.wanted, wanted=self.before, present=self.goal,
            goal=self.present, codes={}, columns={},
        )  # fmt: skip


@dataclass
class _Run:
    """The steps of one generation, their states (`None` where they are not looked at), the activations
    `(states, N, steps, d)` that its sites had with the "from" prompt, with the "to" prompt, and with the one that the
    latents were made with, and how far the first two are apart on each token, `(states, N)`."""

    timesteps: list[float]
    states: list[State | None]
    present: dict[str, torch.Tensor]
    goal: dict[str, torch.Tensor]
    past: dict[str, torch.Tensor]
    concern: dict[str, torch.Tensor]

    def reversed(self) -> _Run:
        """With the prompts exchanged."""
        states = [None if state is None else state.reversed() for state in self.states]
        return _Run(self.timesteps, states, self.goal, self.present, self.past, self.concern)


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
        call: passed to the pipeline.

    Raises:
        `ValueError`: the pipeline takes no prompt, cuts one off, or its denoiser gives NaN or inf.
    """

    @torch.no_grad()
    def __init__(
        self, pipeline, pairs: Sequence[Pair], adapter_name: str | None = None, seed: int = 0, batch_size: int = 16,
        progress: bool = False, **call,
    ):  # fmt: skip
        self.pipeline, self.denoiser = pipeline, get_denoiser(pipeline)
        self.dictionary: Dictionary = get_dictionary(pipeline, adapter_name)
        self.pairs, self._seed, self._call, self.batch_size = list(pairs), seed, call, batch_size
        check_prompts(pipeline, sorted({prompt for pair in self.pairs for prompt in pair}))
        self.grids = {
            site: TimeGrid(rtsae.config.anchors, noise_schedule(pipeline.scheduler))
            for site, rtsae in self.dictionary.sites.items()
        }
        per_run = max(1, batch_size // 2)
        starts = range(0, len(self.pairs), per_run)
        with resting(pipeline):
            self._runs = [
                self._capture(start, self.pairs[start : start + per_run])
                for start in tqdm(starts, desc="pictures", unit="batch", leave=False, disable=not progress)
            ]
        total, count = torch.zeros(len(self.pairs)), torch.zeros(len(self.pairs))
        for state in self.all():
            total.index_add_(0, torch.tensor(state.pairs), state.distance.cpu())
            count.index_add_(0, torch.tensor(state.pairs), torch.ones(len(state)))
        told = torch.tensor([pair[0] != pair[1] for pair in self.pairs])
        self.scale = total / count  # mean distance of the states of each pair
        self.scale[~told] = self.scale[told].median() if told.any() else 1.0
        self.told = told

    def _capture(self, first: int, pairs: list[Pair]) -> _Run:
        prompts = [pair[0] for pair in pairs] + [pair[1] for pair in pairs if pair[0] != pair[1]]
        order = list(range(len(pairs))) + [i for i, pair in enumerate(pairs) if pair[0] != pair[1]]
        row_of = {i: row for row, i in enumerate(order[len(pairs) :], start=len(pairs))}
        generators = [torch.Generator().manual_seed(self._seed + first + i) for i in order]
        sites = list(self.dictionary.sites)
        with Calls(get_denoisers(self.pipeline), sites) as calls:
            call = own_size(self.pipeline) | self._call
            self.pipeline(prompts, generator=generators, output_type="latent", **call)
            kept, self.sizes, self.guidance = calls.kept, calls.sizes, calls.call.guidance
        samples, texts = list(range(len(prompts))), order
        wants = [row_of.get(i, i) for i in order]
        states = []
        present, goal, past = ({site: [] for site in sites} for _ in range(3))
        every, concern = -(-len(kept) // _STEPS), dict.fromkeys(sites, 0)
        with Calls(get_denoisers(self.pipeline), sites) as again:
            for step, (call, _, tokens) in enumerate(kept):
                told, there, state = tokens, tokens, None
                if step % every == 0:
                    again.kept = []
                    before = call.replay(samples, texts).float()
                    told = again.kept[-1][2]
                    wanted = finite(call.replay(samples, wants).float())
                    there = again.kept[-1][2]
                    for site in sites:
                        apart = self._activation(site, told[site]) - self._activation(site, there[site])
                        concern[site] += apart.float().norm(dim=-1).cpu()
                    distance = (before - wanted).square().flatten(1).sum(1)
                    state = State(call, samples, texts, wants, [first + i for i in order], before, wanted, distance)
                states.append(state)
                for site in sites:
                    present[site].append(self._activation(site, told[site]).cpu())
                    goal[site].append(self._activation(site, there[site]).cpu())
                    past[site].append(self._activation(site, tokens[site]).cpu())
        stacked = [{site: torch.stack(kind[site], 2) for site in sites} for kind in (present, goal, past)]
        for step, state in enumerate(states):
            if state is not None:
                state.present, state.goal = (
                    {site: values[:, :, step] for site, values in kind.items()} for kind in stacked[:2]
                )
        return _Run([call.timestep for call, _, _ in kept], states, *stacked, concern)

    def reversed(self) -> States:
        """The same with the "from" and the "to" prompts exchanged."""
        other = copy.copy(self)
        other.pairs = [pair[::-1] for pair in self.pairs]
        other._runs = [run.reversed() for run in self._runs]
        return other

    def standing(self) -> States:
        """The same that want what is there: 1 − E is how far, squared, an edit moves the prediction."""
        other = copy.copy(self)
        other._runs = [
            replace(run, states=[state and replace(state, wanted=state.before) for state in run.states])
            for run in self._runs
        ]
        return other

    def _activation(self, site: str, tokens: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return TOKENS.activation(self.dictionary.sites[site].config.activation, *tokens)

    def all(self) -> Iterator[State]:
        """The states of all runs and steps."""
        return (state for run in self._runs for state in run.states if state is not None)

    @torch.no_grad()
    def latents(self, site: str, latents: Sequence[int], own: bool = False) -> Iterator[tuple[State, torch.Tensor]]:
        """
        Each state with the activation `(states, N, latents)` that some latents of a site have there.

        Args:
            own (`bool`): with the prompt that the noisy latent was made with, instead of the "from" prompt.
        """
        rtsae = self.dictionary.sites[site]
        for run in self._runs:
            present, past = run.past[site] if own else run.present[site], run.past[site]
            reader = rtsae.reader(list(latents), present.device)
            memory = reader.begin()
            for step, state in enumerate(run.states):
                at = self.grids[site].step(run.timesteps[step], self.sizes[site], self.guidance)
                codes = reader.read(memory, present[:, :, step], at)
                memory.continue_with(past[:, :, step])
                if state is not None:
                    yield state, codes

    @torch.no_grad()
    def presence(self, site: str) -> tuple[list[float], torch.Tensor, torch.Tensor]:
        """
        How present each latent is in the runs of the "to" prompts and in those of the "from" prompts, at each step
        that is looked at: timesteps, and twice `(steps, num_latents)`, the mean activation over tokens in units of the
        typical one.
        """
        rtsae = self.dictionary.sites[site]
        timesteps = [state.timestep for state in self._runs[0].states if state is not None]
        count, sums = rtsae.config.num_latents, torch.zeros(2, len(timesteps), rtsae.config.num_latents)
        for start in range(0, count, CHUNK):
            part = slice(start, min(start + CHUNK, count))
            for i, (state, codes) in enumerate(self.latents(site, range(count)[part], own=True)):
                present = codes.mean(1).cpu()
                for row, (sample, text) in enumerate(zip(state.samples, state.texts, strict=True)):
                    sums[int(sample == text), i % len(timesteps), part] += present[row]
        means = sums / (len(self.pairs) * rtsae.typical_activation.cpu())
        return timesteps, means[0], means[1]

    def concerned(self, site: str) -> Iterator[torch.Tensor]:
        """For each state, the tokens `(states, N)` on which the two prompts make a difference."""
        for run in self._runs:
            where = run.concern[site] > 0.3 * run.concern[site].amax(1, keepdim=True)
            yield from (where for state in run.states if state is not None)

    def read(self, site: str, latents: Sequence[int]) -> None:
        """Keep the activation of these latents of a site in the `codes` of all states."""
        columns = {latent: i for i, latent in enumerate(latents)}
        for state, codes in self.latents(site, latents):
            state.codes[site], state.columns[site] = codes.clone(), columns

    def predict(self, state: State, rows: Sequence[int], changes: Changes) -> torch.Tensor:
        """v(x, from) of some of a state's rows with `changes` added at the sites; differentiable in these."""
        kinds = {site: self.dictionary.sites[site].config.activation for site in changes}
        adding = _Adding(changes, kinds)
        with adding.tap.watching({"": state.call.denoiser}, changes):
            texts = [state.texts[row] for row in rows]
            return state.call.replay([state.samples[row] for row in rows], texts).float()

    def errors(self, state: State, rows: Sequence[int], changes: Changes) -> torch.Tensor:
        """‖v(x, from; changes) − v(x, to)‖² of some of a state's rows, `(rows,)`, in units of the mean distance of the
        two prompts' predictions over the states of its pair: the average over these is 1 − E."""
        missed = self.predict(state, rows, changes) - state.wanted[list(rows)]
        scale = self.scale[[state.pairs[row] for row in rows]].to(missed.device)
        return missed.square().flatten(1).sum(1) / scale

    def gained(self, state: State, rows: Sequence[int], changes: Changes) -> torch.Tensor:
        """By how much `changes` bring the prediction of some of a state's rows nearer to that of the "to" prompt,
        `(rows,)`, in units of `errors`: the average over these is E."""
        scale = self.scale[[state.pairs[row] for row in rows]]
        return state.distance[list(rows)].cpu() / scale - self.errors(state, rows, changes).cpu()

    def effects(self, changes: Callable[[State, Sequence[int]], Changes]) -> torch.Tensor:
        """
        E of the edit that `changes` gives for each state and rows of it, for each pair, `(pairs,)`. Where the prompts
        are the same: minus the change, in units of the median distance of the pairs that differ.
        """
        return sum(self.gains(changes).values())

    @torch.no_grad()
    def gains(self, changes: Callable[[State, Sequence[int]], Changes]) -> dict[float, torch.Tensor]:
        """What the steps contribute to the effects of an edit, by timestep, each `(pairs,)`: an edit changes the
        prediction of its own step alone."""
        gained, count = {}, torch.zeros(len(self.pairs))
        for state in self.all():
            own = gained.setdefault(state.timestep, torch.zeros(len(self.pairs)))
            for start in range(0, len(state), self.batch_size):
                rows = range(len(state))[start : start + self.batch_size]
                pairs = torch.tensor([state.pairs[row] for row in rows])
                own.index_add_(0, pairs, self.gained(state, rows, changes(state, rows)))
                count.index_add_(0, pairs, torch.ones(len(rows)))
        return {timestep: own / count.clamp(min=1) for timestep, own in gained.items()}

    def draw(self, count: int, generator: torch.Generator) -> Iterator[tuple[State, list[int], float]]:
        """Random rows of random states, with the weight that makes their average that of all; states that the prompts
        tell apart more come more often."""
        states, rows = list(self.all()), min(_ROWS, self.batch_size)
        size = torch.stack([(state.distance.cpu() / self.scale[state.pairs]).mean() for state in states])
        chance = 0.8 * size / size.sum().clamp(min=1e-20) + 0.2 / len(states)
        for pick in torch.multinomial(chance, count, replacement=True, generator=generator).tolist():
            chosen = torch.randperm(len(states[pick]), generator=generator)[:rows].tolist()
            yield states[pick], chosen, 1 / (len(states) * float(chance[pick]))


class _Adding:
    """Adds changes to activations."""

    def __init__(self, changes: Changes, kinds: dict[str, str]):
        self.changes, self.kinds, self.tap = changes, kinds, Tap(self)

    def begin(self, call: Call, arguments: Arguments) -> None:
        """The denoiser is called."""

    def site(
        self, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """The activation with the change."""
        change = self.changes[name]
        if callable(change):
            change = change(block.activation(self.kinds[name], block_input, hidden_states))
        return hidden_states + block.from_tokens(change.to(hidden_states.device), hidden_states)


@contextlib.contextmanager
def frozen(pipeline, checkpointing: bool = False):
    """The denoiser can be differentiated with respect to its activations alone inside the `with` block."""
    denoiser = get_denoiser(pipeline)
    compiled = is_compiled(denoiser, pipeline)
    if getattr(denoiser, "is_quantized", False) or compiled:
        kind = "compiled" if compiled else "quantized"
        raise ValueError(f"Effects are gradients through the denoiser, and a {kind} one gives none; load a plain one.")
    wanted = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    try:
        with torch.enable_grad():
            yield
    finally:
        if checkpointing:
            denoiser.disable_gradient_checkpointing()
        for parameter in wanted:
            parameter.requires_grad_(True)


@dataclass
class Part:
    """
    Latents that are fitted at one site. On the tokens that `gate` names some are added; others are taken away, each by
    its own activation.

    Args:
        gate (`list[int]`, *optional*): only tokens on which one of these latents is active; everywhere without it.
        added (`list[int]`), weights (`torch.Tensor`): latents and how much of their typical activation, `(added,)`.
        removed (`list[int]`), shares (`torch.Tensor`): latents and which share of their activation, `(removed,)`.
    """

    gate: list[int] | None = None
    added: list[int] = field(default_factory=list)
    weights: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    removed: list[int] = field(default_factory=list)
    shares: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def read(self) -> list[int]:
        return sorted({*(self.gate or ()), *self.removed})

    @property
    def fitted(self) -> list[torch.Tensor]:
        return [p for p in (self.weights, self.shares) if p.numel()]


class Intervention:
    """Parts at some sites as a change of activations, differentiable in what is fitted. It is called with a state and
    some of its rows."""

    def __init__(self, parts: dict[str, Part], states: States):
        self.parts, self.states = parts, states
        self.dictionary, self.grids = states.dictionary, states.grids

    def read(self) -> None:
        """Have its states keep the activations of what the parts read."""
        for site, part in self.parts.items():
            self.states.read(site, part.read)

    def gate(self, site: str, state: State, rows: Sequence[int]) -> torch.Tensor:
        """Which tokens a site's additions reach, `(rows, N or 1, 1)`."""
        part = self.parts[site]
        if part.gate is None:
            return torch.ones(len(rows), 1, 1)
        return (self.active(site, state, rows, part.gate) > 0).any(-1, keepdim=True).float()

    def gain(self, site: str, state: State, rows: Sequence[int]) -> torch.Tensor | float:
        """How many times its direction a latent moves each token by, `(rows, N, 1)`, where that varies."""
        gain = self.dictionary.sites[site].gain(state.present[site][list(rows)].float())
        return 1.0 if gain is None else gain

    def active(self, site: str, state: State, rows: Sequence[int], latents: Sequence[int]) -> torch.Tensor:
        return state.codes[site][list(rows)][..., [state.columns[site][latent] for latent in latents]]

    def full(self, site: str, state: State, rows: Sequence[int], change: torch.Tensor | None) -> torch.Tensor:
        """A change of every token of some rows, `(rows, N, d)`, as a leaf."""
        tokens, width = state.codes[site].shape[1], self.dictionary.sites[site].config.in_channels
        zero = torch.zeros(len(rows), tokens, width, device=state.codes[site].device)
        return zero if change is None else (zero + change).detach()

    def shares_of_anchors(self, site: str, timestep: float) -> torch.Tensor:
        """What each anchor's direction weighs at a step, `(G,)`."""
        anchors = torch.eye(len(self.dictionary.sites[site].config.anchors))
        return interpolate(anchors, self.grids[site].coordinate(timestep))

    def directions(self, site: str, latents: Sequence[int], timestep: float) -> torch.Tensor:
        """`(latents, d)` at a step."""
        step = self.grids[site].step(timestep)
        return self.dictionary.sites[site].directions(list(latents)).at(step).float()

    def __call__(self, state: State, rows: Sequence[int], added: float = 1.0) -> Changes:
        """What to add at each site; `added` is the strength of the additions alone."""
        changes = {}
        for site, part in self.parts.items():
            rtsae, terms, gain = self.dictionary.sites[site], [], self.gain(site, state, rows)
            if part.added:
                amounts = part.weights * rtsae.typical_activation[part.added]
                path = amounts @ self.directions(site, part.added, state.timestep)
                terms.append(added * self.gate(site, state, rows) * gain * path)
            if part.removed:
                amounts = gain * part.shares * self.active(site, state, rows, part.removed)
                terms.append(-amounts @ self.directions(site, part.removed, state.timestep))
            if terms:
                changes[site] = sum(terms[1:], terms[0])
        return changes


@dataclass
class FirstOrder:
    """
    How the effect grows with the weight of each latent of a site, at the present weights.

    Args:
        added (`torch.Tensor`): dE by weight of its constant addition, `(m,)`, in units of its typical activation.
        added_length (`torch.Tensor`): root mean square size of that addition in activation space, `(m,)`.
        removed, removed_length (`torch.Tensor`): the same by share of what is there of each candidate,
            `(candidates,)`.
    """

    added: torch.Tensor
    added_length: torch.Tensor
    removed: torch.Tensor
    removed_length: torch.Tensor


def first_order(
    model: Intervention, candidates: dict[str, list[int]], count: int, generator: torch.Generator
) -> dict[str, FirstOrder]:
    """
    Attribution patching: all latents of all sites of an intervention at once, from `count` backward passes.

    Args:
        candidates (`dict[str, list[int]]`): latents of each site that might be taken away; the states must have read
            them.
    """
    states, dictionary = model.states, model.dictionary
    configs = {site: dictionary.sites[site].config for site in model.parts}
    sums = {site: torch.zeros(len(config.anchors), config.in_channels) for site, config in configs.items()}
    sizes = {site: torch.zeros(len(config.anchors)) for site, config in configs.items()}
    removed = {site: torch.zeros(2, len(latents)) for site, latents in candidates.items()}
    for state, rows, weight in states.draw(count, generator):
        there = model(state, rows)
        changes = {site: model.full(site, state, rows, there.get(site)).requires_grad_() for site in model.parts}
        loss = states.errors(state, rows, changes).mean() * weight
        for site, gradient in zip(changes, torch.autograd.grad(loss, list(changes.values())), strict=True):
            gain, at = model.gain(site, state, rows), model.shares_of_anchors(site, state.timestep)
            gate = model.gate(site, state, rows) * gain
            sums[site] -= at[:, None] * (gradient * gate).sum((0, 1)).cpu()
            sizes[site] += weight * at * float(gate.square().mean()) * gradient.shape[1]
            if candidates.get(site):
                active = gain * model.active(site, state, rows, candidates[site])
                paths = model.directions(site, candidates[site], state.timestep)
                removed[site][0] += torch.einsum("bnk,bnd,kd->k", active, gradient, paths).cpu()
                removed[site][1] += (weight * active.square().sum((0, 1)) / len(rows) * paths.square().sum(1)).cpu()
    found = {}
    for site in model.parts:
        rtsae = dictionary.sites[site]
        added = torch.zeros(2, rtsae.config.num_latents)
        for start in range(0, rtsae.config.num_latents, CHUNK):
            rows = list(range(start, min(start + CHUNK, rtsae.config.num_latents)))
            typical = rtsae.typical_activation[rows, None, None].cpu()
            paths = rtsae.feature_trajectories(rows).detach().float().cpu() * typical
            added[0, rows] = torch.einsum("mgd,gd->m", paths, sums[site])
            added[1, rows] = torch.einsum("mgd,mgd,g->m", paths, paths, sizes[site])
        gain, square = removed.get(site, torch.zeros(2, 0)) / count
        found[site] = FirstOrder(added[0] / count, (added[1] / count).sqrt(), gain, square.sqrt())
    return found
