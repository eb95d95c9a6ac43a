"""What a denoiser predicts for the same noisy latents if one word of the prompt is another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from ..denoiser import TimeGrid, get_denoisers, noise_schedule
from ..dictionary import Dictionary
from ..models import Step, interpolate
from ..pipeline import get_dictionary, resting
from ..steering import Edit, Fold, fold_edits, total
from .calls import CallRecorder, call_with, draw
from .effect import frozen, gradient
from .looks import LOOKS, Looks, place_of
from .replay import ReplayableCall, SharedPrefix
from .states import CHUNK, AddingTap, check_prompts, finite
from .vocabulary import Exchange, Exchanges

Latent = tuple[str, int]  # site and index


@dataclass
class _Round:
    """One exchange for each of some pictures.

    Args:
        exchanges (`list[Exchange]`): the exchanges.
        places (`list[int]`): their indices among all exchanges.
        rows (`list[int]`): the rows of the pictures they change.
        text (`ReplayableCall`): a call of the denoiser with their texts.
    """

    exchanges: list[Exchange]
    places: list[int]
    rows: list[int]
    text: ReplayableCall


@dataclass
class _Batch:
    """Pictures drawn together: the calls of the denoiser at some steps, and the exchanges."""

    calls: list[ReplayableCall]
    rounds: list[_Round]


@dataclass
class Slopes:
    """
    To first order, how much of the change that each word makes does each latent make.

    Args:
        added (`dict[str, torch.Tensor]`): for each site the derivatives with respect to the strength of each latent,
            `(words, num_latents)`.
        lengths (`dict[str, torch.Tensor]`): root mean square length of a latent's direction over the anchors at
            strength 1, `(num_latents,)`.
        sizes (`torch.Tensor`): mean squared change that each word makes to a prediction, `(words,)`.
        looks (`dict[str, torch.Tensor]`): for each site how much each latent changes each of [`LOOKS`] at strength 1,
            `(looks, num_latents)`; no rows where pictures cannot be looked at.
    """

    added: dict[str, torch.Tensor]
    lengths: dict[str, torch.Tensor]
    sizes: torch.Tensor
    looks: dict[str, torch.Tensor]


@dataclass
class Moved:
    """
    How latents that are added move predictions, beside how exchanging a word does. All are sums over the states.

    Args:
        along (`torch.Tensor`): scalar product of the change of each latent and that of each exchange, `(latents,
            exchanges)`.
        own (`torch.Tensor`): squared length of the change of each latent in the picture of each exchange.
        between (`torch.Tensor`): scalar products of the changes of any two exchanges of one picture, `(exchanges,
            exchanges)`, and zero for those of two pictures.
        looks (`torch.Tensor`): how much each latent changes each of [`LOOKS`] in each picture, `(latents, looks,
            pictures)`; no looks where pictures cannot be looked at.
        places (`torch.Tensor`): row, column and spread of the change of each latent, see [`place_of`], `(latents, 3)`;
            NaN if predictions are no pictures.
    """

    along: torch.Tensor
    own: torch.Tensor
    between: torch.Tensor
    looks: torch.Tensor
    places: torch.Tensor


class ExchangedStates:
    """
    The noisy latents that a denoiser meets while it draws prompts, unsteered, and texts in which one word is another.

    Each picture is drawn once, however many words are exchanged in its prompt; the other texts are encoded by calls of
    the pipeline with two steps.

    Args:
        pipeline (`DiffusionPipeline`): with a dictionary loaded.
        exchanges (`Exchanges`): the prompts and the exchanges.
        adapter_name (`str`, *optional*): of the dictionary.
        seed (`int`): of the noise; each prompt starts from another.
        batch_size (`int`): prompts in one denoiser call.
        steps (`int`): the most steps of a generation to look at.
        call: passed to the pipeline.

    Raises:
        `ValueError`: the pipeline takes no prompt, its tokenizer cuts one off, or its denoiser gives NaN or inf.
    """

    @torch.no_grad()
    def __init__(
        self, pipeline, exchanges: Exchanges, adapter_name: str | None = None, seed: int = 0, batch_size: int = 16,
        steps: int = 8, **call,
    ):  # fmt: skip
        self.pipeline, self.exchanges = pipeline, exchanges
        self.dictionary: Dictionary = get_dictionary(pipeline, adapter_name)
        self.activations = {site: sae.config.activation for site, sae in self.dictionary.sites.items()}
        self.grids = {
            site: TimeGrid(sae.config.anchors, noise_schedule(pipeline.scheduler))
            for site, sae in self.dictionary.sites.items()
        }
        check_prompts(pipeline, [*exchanges.prompts, *(one.prompt for one in exchanges.changed)])
        self._denoisers, self._call = get_denoisers(pipeline), call
        self._batches = []
        with resting(pipeline):
            for start in range(0, len(exchanges.prompts), batch_size):
                prompts = exchanges.prompts[start : start + batch_size]
                seeds = range(seed + start, seed + start + len(prompts))
                calls = self._drawn(prompts, seeds)
                calls = calls[:: -(-len(calls) // steps)]
                self._batches.append(_Batch(calls, list(self._rounds(start, len(prompts)))))

    def _rounds(self, start: int, count: int) -> Iterator[_Round]:
        """The exchanges of some pictures, in rounds with one for each picture at most."""
        of_row: list[list[int]] = [[] for _ in range(count)]
        for place, one in enumerate(self.exchanges.changed):
            if start <= one.base < start + count:
                of_row[one.base - start].append(place)
        for turn in range(max(map(len, of_row))):
            rows = [row for row, places in enumerate(of_row) if turn < len(places)]
            places = [of_row[row][turn] for row in rows]
            exchanges = [self.exchanges.changed[place] for place in places]
            text = call_with(self.pipeline, [one.prompt for one in exchanges], self._denoisers, **self._call)
            yield _Round(exchanges, places, rows, text)

    def _drawn(self, prompts: list[str], seeds: Sequence[int]) -> list[ReplayableCall]:
        """The calls of the denoiser while the pipeline draws these prompts."""
        recorder = CallRecorder(self._denoisers, self.activations)
        draw(self.pipeline, prompts, seeds, recorder, **self._call)
        self.sizes, self.guidance = recorder.sizes, recorder.call.guidance
        return [call for call, _ in recorder.calls]

    @torch.no_grad()
    def sizes_of_changes(self) -> torch.Tensor:
        """How much exchanging words changes predictions, squared and summed over the states, `(exchanges,)`."""
        sizes = torch.zeros(len(self.exchanges.changed))
        for batch in self._batches:
            for call in batch.calls:
                plain = call.replay(range(call.rows), range(call.rows)).float()
                for one in batch.rounds:
                    change = self._changed(call, one, plain)
                    sizes[one.places] += change.square().flatten(1).sum(1).cpu()
        return sizes

    @property
    def states(self) -> int:
        """The number of calls of the denoiser that are looked at."""
        return sum(len(batch.calls) for batch in self._batches)

    def step(self, site: str, call: ReplayableCall) -> Step:
        """The denoising step of a call, as the dictionary of a site takes it."""
        return self.grids[site].step(call.timestep, self.sizes.get(site), self.guidance)

    def slopes(self, done: Callable[[], None]) -> Slopes:
        """
        Differentiate the changes that words make for all latents at once (attribution patching): one backward pass for
        each round and state.

        Args:
            done: called after each state.

        Raises:
            `ValueError`: the denoiser gives no gradient, or one that is NaN or inf.
        """
        words, sites = self.exchanges.words, self.dictionary.sites
        number = {word: i for i, word in enumerate(words)}
        wanted = len(words) + self._of_looks
        sums = {s: torch.zeros(wanted, len(sae.config.anchors), sae.config.in_channels) for s, sae in sites.items()}
        sizes = torch.zeros(len(words))
        with frozen(self.pipeline):
            for batch in self._batches:
                for call in batch.calls:
                    leaves = _Leaves(self, call)
                    prediction = leaves.predict()
                    for one in batch.rounds:
                        change = self._changed(call, one, prediction.detach())
                        spots = [number[exchange.word] for exchange in one.exchanges]
                        sizes.index_add_(0, torch.tensor(spots), change.square().flatten(1).sum(1).cpu())
                        leaves.add_slopes(sums, 2 * (prediction[one.rows] * change).sum(), one.rows, spots)
                    for look, cotangent in enumerate(self._looked(call, prediction)):
                        spots = [len(words) + look] * call.rows
                        leaves.add_slopes(sums, (prediction * cotangent).sum(), list(range(call.rows)), spots)
                    done()
        slopes, looks, lengths = {}, {}, {}
        for site, of_site in sums.items():
            added, lengths[site] = self._along_latents(site, of_site)
            slopes[site] = added[: len(words)] / sizes[:, None].clamp(min=1e-20)
            looks[site] = added[len(words) :] / (len(self.exchanges.prompts) * len(self._batches[0].calls))
        counts = Counter(one.word for one in self.exchanges.changed)
        sizes /= torch.tensor([counts[word] * len(self._batches[0].calls) for word in words])
        return Slopes(slopes, lengths, sizes, looks)

    def _along_latents(self, site: str, slopes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Slopes along each latent of a site, `(wanted, num_latents)`, from those along activations `(wanted, G, d)`;
        and the latents' lengths."""
        sae = self.dictionary.sites[site]
        added, length = torch.zeros(len(slopes), sae.config.num_latents), torch.zeros(sae.config.num_latents)
        for start in range(0, sae.config.num_latents, CHUNK):
            rows = list(range(start, min(start + CHUNK, sae.config.num_latents)))
            paths = sae.feature_trajectories(rows).detach().float().cpu()
            paths = paths * sae.typical_activation[rows, None, None].cpu()
            added[:, rows] = torch.einsum("mgd,wgd->wm", paths, slopes)
            length[rows] = paths.square().sum(-1).mean(1).sqrt()
        added[:, sae.density.cpu() == 0] = 0
        return added, length

    @cached_property
    def _looks(self) -> Looks | None:
        return Looks.of(self.pipeline, [batch.calls[-1] for batch in self._batches])

    @property
    def _of_looks(self) -> int:
        return 0 if self._looks is None else len(LOOKS)

    def _looked(self, call: ReplayableCall, prediction: torch.Tensor) -> torch.Tensor:
        """How a prediction must change for looks to change, `(looks, rows, ...)`."""
        return prediction[None][:0] if self._looks is None else self._looks.gradients(call, prediction)

    @torch.no_grad()
    def measure(self, latents: Sequence[Latent], done: Callable[[], None]) -> Moved:
        """How adding each of some latents at strength 1 moves the predictions; `done` is called after each latent and
        state."""
        count, device = len(self.exchanges.changed), next(iter(self._denoisers.values())).device
        pictures, calls = len(self.exchanges.prompts), len(self._batches[0].calls)
        moved = Moved(
            torch.zeros(len(latents), count), torch.zeros(len(latents), count), torch.zeros(count, count),
            torch.zeros(len(latents), self._of_looks, pictures), torch.zeros(len(latents), 3),
        )  # fmt: skip
        start = 0
        folds = [fold_edits([_adding(index)], self.dictionary.sites[site], [], device) for site, index in latents]
        for batch in self._batches:
            places = torch.tensor([place for one in batch.rounds for place in one.places])
            rows = torch.tensor([row for one in batch.rounds for row in one.rows])
            for call in batch.calls:
                plain = call.replay(range(call.rows), range(call.rows)).float()
                changes = torch.cat([self._changed(call, one, plain) for one in batch.rounds]).flatten(1)
                same = (rows[:, None] == rows[None]).float()
                moved.between[places[:, None], places[None]] += (changes @ changes.T).cpu() * same
                looked = self._looked(call, plain).flatten(2)
                for i, change in enumerate(self._added(call, latents, folds, plain)):
                    where = place_of(change)
                    moved.places[i] += torch.full((3,), torch.nan) if where is None else where.sum(0).cpu()
                    change = change.flatten(1)
                    moved.along[i, places] += (change[rows] * changes).sum(1).cpu()
                    moved.own[i, places] += change.square().sum(1)[rows].cpu()
                    moved.looks[i, :, start : start + call.rows] += (looked * change).sum(2).cpu()
                    done()
            start += call.rows
        moved.looks /= calls
        moved.places /= pictures * calls
        return moved

    def _changed(self, call: ReplayableCall, one: _Round, plain: torch.Tensor) -> torch.Tensor:
        """How the exchanges of a round change the predictions, `(rows, ...)`."""
        with torch.no_grad():
            return finite(call.replay(one.rows, range(len(one.rows)), one.text).float() - plain[one.rows])

    def _added(
        self, call: ReplayableCall, latents: Sequence[Latent], folds: Sequence[list[Fold]], plain: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """How adding each latent changes the predictions, `(rows, ...)`."""
        rows, adding = range(call.rows), AddingTap(self.activations)
        with (
            SharedPrefix(call.denoiser, self.activations) as prefix,
            adding.tap.watching({"": call.denoiser}, self.activations),
        ):
            for (site, _), own in zip(latents, folds, strict=True):
                step = self.step(site, call)
                adding.changes = {site: partial(_sum_of, own, step)}
                with prefix.reused():
                    yield call.replay(rows, rows).float() - plain


class _Leaves:
    """Predictions of a call with zeros added to the sites' tokens, of which gradients are taken; and how far each
    token is moved by one unit along a latent's direction, `(rows, N or 1, 1)`."""

    def __init__(self, states: ExchangedStates, call: ReplayableCall):
        self.states, self.call = states, call
        self.leaves: dict[str, torch.Tensor] = {}
        self.reach: dict[str, torch.Tensor] = {}

    def predict(self) -> torch.Tensor:
        adding, rows = AddingTap(self.states.activations), range(self.call.rows)
        adding.changes = {site: partial(self._leaf, site) for site in self.states.activations}
        with adding.tap.watching({"": self.call.denoiser}, adding.changes):
            return self.call.replay(rows, rows).float()

    def add_slopes(
        self, sums: dict[str, torch.Tensor], loss: torch.Tensor, rows: Sequence[int], spots: Sequence[int]
    ) -> None:
        """Add the gradients of a loss of the predictions to `sums`, of each site `(wanted, G, d)`: that of each of
        some rows at its spot."""
        for site, slope in gradient(loss, self.leaves, keep=True).items():
            slope = (slope * self.reach[site])[rows].sum(1).cpu()
            coordinate = self.states.grids[site].coordinate(self.call.timestep)
            at = interpolate(torch.eye(sums[site].shape[1]), coordinate)
            sums[site].index_add_(0, torch.tensor(spots), at[:, None] * slope[:, None])

    def _leaf(self, site: str, tokens: torch.Tensor) -> torch.Tensor:
        if site not in self.leaves:  # gradient checkpointing runs a site twice
            with torch.no_grad():
                (fold,) = fold_edits([_adding(0)], self.states.dictionary.sites[site], [], tokens.device)
                self.reach[site], _ = fold.change(tokens, None, self.states.step(site, self.call))
            self.leaves[site] = torch.zeros(tokens.shape, device=tokens.device).requires_grad_()
        return self.leaves[site]


def _adding(latent: int) -> Edit:
    return Edit(latents=(latent,), weights=(1.0,), strength=1.0, clip=False)


def _sum_of(folds: Sequence[Fold], step: Step, tokens: torch.Tensor) -> torch.Tensor:
    """The change that some folds make to tokens."""
    return total([fold.change(tokens, None, step) for fold in folds], tokens)
