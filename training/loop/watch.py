"""Validation while training: figures for the log and for trackers, and early warnings."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator

from diffusers_rtsae.files import write_text

from .trainer import DictionaryTrainer


class Watch:
    """
    Validation while training: a line in `log.jsonl`, the recipe's trackers, and early warnings.

    Args:
        done (`int`): steps that are finished. Lines of the log about later steps, which are repeated, are dropped.
    """

    def __init__(self, accelerator: Accelerator, work: Path, done: int):
        self.accelerator, self.path = accelerator, work / "log.jsonl"
        self.best: dict[str, float] = {}
        self.warned: set[tuple[str, str]] = set()
        if accelerator.is_main_process and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            if lines and not lines[-1].endswith("\n"):  # it was killed while it wrote
                lines.pop()
            write_text(self.path, "".join(line for line in lines if json.loads(line)["step"] <= done))

    def __call__(
        self, step: int, name: str, trainer: DictionaryTrainer, train: dict[str, torch.Tensor],
        validation: torch.Tensor, rate: float,
    ) -> dict:  # fmt: skip
        figures = torch.stack([*train.values()]).tolist()
        logged = {f"{key}_train": value for key, value in zip(train, figures, strict=True)}
        logged |= trainer.measure(trainer.inputs(validation))
        logged |= {"trajectories_per_second": round(rate)}
        self._warn(name, "dead", logged["dead"] > 0.2, f"{logged['dead']:.0%} of the latents are dead")
        settled, k, l0 = step > trainer.settings.steps / 2, trainer.settings.k, logged["l0_validation"]
        self._warn(
            name,
            "gap",
            settled and abs(l0 / k - 1) > 0.25,
            f"{l0:.1f} latents are active on held-out data, expected about {k}",
        )
        best = self.best.setdefault(name, logged["fvu_validation"])
        self.best[name] = min(best, logged["fvu_validation"])
        exploding = logged["fvu_validation"] > 3 * best
        self._warn(
            name, "loss", exploding, f"FVU on held-out data rose from {best:.3f} to {logged['fvu_validation']:.3f}"
        )
        if self.accelerator.is_main_process:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, "dictionary": name} | logged) + "\n")
        self.accelerator.log({f"{name}/{key}": value for key, value in logged.items()}, step=step)
        return logged

    def _warn(self, name: str, kind: str, happened: bool, message: str) -> None:
        if happened and (name, kind) not in self.warned:
            self.warned.add((name, kind))
            warnings.warn(f"{name}: {message}.", stacklevel=3)
