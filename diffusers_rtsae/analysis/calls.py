"""What a denoiser is asked, what it answers, and the activations of some sites meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..denoiser import Arguments, Block, Call, Tap, token_grid
from ..models import TokenGrid
from ..pipeline import own_size
from .replay import ReplayableCall, SharedArguments, prediction_of


class CallRecorder:
    """
    Keeps the conditional branch of each denoiser call while a pipeline runs inside the `with` block. Where a sampler
    calls twice at one timestep, the later call replaces the earlier one.

    Args:
        activations (`dict[str, str]`): for each site, which activation is read: `"output"`, `"update"` or `"input"`.
        keep (*optional*): called with the step (counted from 0), the site and its activation `(rows, N, d)`.
    """

    def __init__(
        self, denoisers: dict[str, nn.Module], activations: dict[str, str],
        keep: Callable[[int, str, torch.Tensor], None] | None = None,
    ):  # fmt: skip
        self.denoisers, self.activations, self._keep = denoisers, activations, keep
        self._tap = Tap(self)

    def __enter__(self) -> CallRecorder:
        self.calls: list[tuple[ReplayableCall, torch.Tensor]] = []
        self.sizes: dict[str, TokenGrid | None] = {}
        self.call, self._current, self._tokens, self._texts = None, None, {}, SharedArguments()
        self._tap.watch(self.denoisers, self.activations)
        return self

    def __exit__(self, *error) -> None:
        self._tap.watch(self.denoisers, None)
        self._current, self._tokens, self._texts = None, {}, SharedArguments()

    def begin(self, call: Call, arguments: Arguments) -> None:
        """Called before the denoiser runs."""
        replayable = ReplayableCall.of(self.denoisers[self._tap.last.component], call, arguments, self._texts)
        self.call, self._current, self._tokens = call, replayable, {}

    def site(
        self, name: str, call: Call, block: Block, block_input: torch.Tensor, hidden_states: torch.Tensor
    ) -> None:
        """Called after a site has run."""
        if self._current is None:
            return
        batch = block.batch(hidden_states)
        index = block.rows(hidden_states, call.rows_of("cond", batch))
        self.sizes[name] = token_grid(call, name, batch, block.space(hidden_states))
        if self._keep is not None:
            self._tokens[name] = block.activation(self.activations[name], block_input[index], hidden_states[index])

    def end(self, call: Call, output) -> None:
        """Called when the denoiser returns."""
        if self._current is None:
            return
        if self.calls and self.calls[-1][0].timestep == self._current.timestep:
            self.calls.pop()
        for site, tokens in self._tokens.items():
            self._keep(len(self.calls), site, tokens)
        prediction = prediction_of(output)
        self.calls.append((self._current, prediction[call.rows_of("cond", len(prediction))].clone()))
        self._current, self._tokens = None, {}


def draw(
    pipeline, prompts: Sequence[str], seeds: Sequence[int], recorder: CallRecorder, output_type: str = "latent", **call
) -> list:
    """Draw a picture of each prompt from the noise of its seed, and return them; the recorder keeps the calls."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with recorder:
        output = pipeline(list(prompts), generator=generators, output_type=output_type, **own_size(pipeline) | call)
    return output[0]


def call_with(pipeline, prompts: Sequence[str], denoisers: dict[str, nn.Module], **call) -> ReplayableCall:
    """A call of the denoiser with the texts of these prompts. The pipeline takes two steps for it: PixArt calls its
    sampler in another way, which not all samplers know, if there is only one."""
    recorder = CallRecorder(denoisers, {})
    draw(
        pipeline, prompts, range(len(prompts)), recorder, **call | {"num_inference_steps": 2, "output_type": "latent"}
    )
    return recorder.calls[0][0]
