"""Scorer and judge of any world: trained, stopped, continued, compared."""

import copy
import json

import pytest
import torch

from diffusers_rtsae.analysis.scorer import FactorScorer
from training.worlds import load_world, scoring
from training.worlds.scoring import agreement
from training.worlds.shapes.scenes import render, render_pictures, sample_scenes
from training.worlds.shapes.scorer import FACTORS, held_out_renders, targets

WORLD = load_world("shapes")


def test_scorers_agree_on_what_they_read_alike(scorer):
    pictures = render(sample_scenes(24, 3, objects=1))
    assert set(agreement(WORLD, scorer, scorer, pictures).values()) == {1.0}
    same_but_style = copy.deepcopy(scorer)  # which reads "flat" everywhere
    first = sum(len(values) for name, values in scorer.factors.items() if name < "style")
    same_but_style.head[-1].bias.data[first + scorer.factors["style"].index("flat")] += 1e4
    alike = agreement(WORLD, scorer, same_but_style, pictures)
    assert alike["style"] == alike["all"] < 0.5 and alike["colour"] == alike["valid"] == 1.0


def test_a_killed_training_of_a_judge_continues_and_can_be_loaded(tmp_path, monkeypatch):
    pictures, _, scenes = render_pictures(64, seed=1)
    monkeypatch.setattr(scoring, "compare", lambda *a: {})
    monkeypatch.setattr(scoring, "CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(scoring, "JUDGE", scoring.JUDGE._replace(channels=32))
    corrupt, left = scoring.corrupt, iter((1, 1))

    def killed(images, generator):
        next(left)  # nothing is left in the third step
        return corrupt(images, generator)

    def train(name: str) -> None:
        told = ["--judge", "--out", str(tmp_path / name), "--work", str(tmp_path / f"{name}-work")]
        a = scoring.new_parser("", 4).parse_args([*told, "--batch-size", "4", "--device", "cpu"])
        training = (pictures, targets(scenes))
        scoring.run(WORLD, a, FACTORS, lambda seed: training, lambda: held_out_renders(count=8))

    train("whole")
    with monkeypatch.context() as patched, pytest.raises(StopIteration):
        patched.setattr(scoring, "corrupt", killed)
        train("parts")
    assert not (tmp_path / "parts").exists()
    train("parts")
    whole, parts = (FactorScorer.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert whole.config.architecture == "attention"
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    assert json.loads((tmp_path / "parts" / "metrics.json").read_text())["held_out_pictures"] == 8
