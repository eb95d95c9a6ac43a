"""Noisy latents of one step of denoising, with what a denoiser predicts for them with either prompt of a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from .calls import CallRecorder
from .replay import ReplayableCall
from .stored import Codes


@dataclass
class State:
    """
    Noisy latents of one step, with the denoiser's predictions for both prompts of their pairs.

    Args:
        call (`ReplayableCall`): the call of the denoiser.
        samples, texts, target_texts (`list[int]`): for each state, the rows of the call that hold its noisy latent,
            its "from" prompt and its "to" prompt.
        pairs (`list[int]`): the index of each state's pair.
        prediction, target (`torch.Tensor`): v(x, from) and v(x, to), `(states, ...)`.
        distance (`torch.Tensor`): ‖v(x, from) − v(x, to)‖² of each state, `(states,)`, on the CPU.
        activations (`dict[str, str]`): which activation the dictionary reads at each site.
        tokens (`dict[str, int]`): the number of tokens of each site.
        codes, goal_codes (`dict[str, Codes]`): the active latents of each site with the "from" and with the "to"
            prompt.
    """

    call: ReplayableCall
    samples: list[int]
    texts: list[int]
    target_texts: list[int]
    pairs: list[int]
    prediction: torch.Tensor
    target: torch.Tensor
    distance: torch.Tensor
    activations: dict[str, str]
    tokens: dict[str, int] = field(default_factory=dict)
    codes: dict[str, Codes] = field(default_factory=dict)
    goal_codes: dict[str, Codes] = field(default_factory=dict)

    @property
    def timestep(self) -> float:
        """In training units."""
        return self.call.timestep

    @property
    def device(self) -> torch.device:
        """The device of its activations."""
        return self.prediction.device

    @property
    def drawn_with_from(self) -> torch.Tensor:
        """Whether the noisy latent of each state was made with its "from" prompt, `(states,)`."""
        return torch.tensor([sample == text for sample, text in zip(self.samples, self.texts, strict=True)])

    @property
    def present(self) -> dict[str, torch.Tensor]:
        """The activation of each site with the "from" prompt, `(states, N, d)`. It is not stored: each access runs
        the denoiser again, as `goal` does."""
        return self.replayed(self.texts)

    @property
    def goal(self) -> dict[str, torch.Tensor]:
        """The activation of each site with the "to" prompt, `(states, N, d)`."""
        return self.replayed(self.target_texts)

    @torch.no_grad()
    def replayed(self, texts: Sequence[int]) -> dict[str, torch.Tensor]:
        """The activation of each site with the texts of some rows of the call, `(states, N, d)`."""
        results = {}
        keep = lambda _, site, tokens: results.update({site: tokens})  # noqa: E731
        with CallRecorder({"": self.call.denoiser}, self.activations, keep):
            self.call.replay(self.samples, texts)
        return results

    def __len__(self) -> int:
        return len(self.samples)

    def reversed(self) -> State:
        """With the "from" and the "to" prompts exchanged."""
        return replace(
            self, texts=self.target_texts, target_texts=self.texts, prediction=self.target, target=self.prediction,
            codes=self.goal_codes, goal_codes=self.codes,
        )  # fmt: skip
