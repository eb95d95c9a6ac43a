"""An operation of edits and a family of pipelines that are added from outside: one entry each."""

from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from diffusers_rtsae import load_dictionary
from diffusers_rtsae.denoiser import callers
from diffusers_rtsae.dictionary import format as of_files
from diffusers_rtsae.steering import OPERATIONS
from diffusers_rtsae.steering.operations import Operation

EXAMPLES = Path(__file__).parents[2] / "examples"
SITE = "up_blocks.1.attentions.1"
MANY = {(SITE, i): 1.0 for i in range(40)}


def test_an_operation_steers_and_stands_in_a_label(monkeypatch, pipe, draw, tmp_path):
    monkeypatch.setitem(OPERATIONS, "halve", Operation(lambda z: -z.strength / 2 * z.now, neutral=0.0))
    monkeypatch.setitem(of_files.CHOICES, "operation", (*of_files.CHOICES["operation"], "halve"))
    dictionary = load_dictionary(EXAMPLES / "shapes-rtsae")
    entry = {"site": SITE, "latents": list(range(40)), "weights": [1.0] * 40, "where": None}
    dictionary.add_label("half", {"features": [entry], "edit": {"operation": "halve"}}, {})
    dictionary.save(tmp_path)
    plain, pictures = draw(pipe), []
    pipe.load_rtsae(tmp_path)
    for features, options in (
        (MANY, {"operation": "halve"}),
        ({"half": 1.0}, {}),
        (dict.fromkeys(MANY, 0.5), {"operation": "ablate"}),
    ):
        pipe.set_rtsae_features(features, **options)
        pictures.append(draw(pipe))
    assert (pictures[0] != plain).any() and np.allclose(pictures[0], pictures[2], atol=1e-5)
    assert np.allclose(pictures[0], pictures[1], atol=1e-5)
    pipe.set_rtsae_features(dict.fromkeys(MANY, 0.0), operation="halve")
    assert (draw(pipe) == plain).all()


class WarmingPipeline(DiffusionPipeline):
    """Asks its denoiser once before it draws, for something else."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def warm(self, x: torch.Tensor, t: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        return self.unet(x, t, prompt_embeds).sample

    @torch.no_grad()
    def __call__(self, prompt_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.scheduler.set_timesteps(3)
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        aside = self.warm(x, self.scheduler.timesteps[0], prompt_embeds)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t, prompt_embeds).sample, t, x).prev_sample
        return aside, x


def test_a_family_says_which_calls_are_no_steps(monkeypatch, pipe):
    tokens = pipe.tokenizer("a star", padding="max_length", max_length=32, return_tensors="pt").input_ids
    text, warming = pipe.text_encoder(tokens)[0].detach(), WarmingPipeline(pipe.unet, pipe.scheduler)
    plain = warming(text)
    warming.load_rtsae(load_dictionary(EXAMPLES / "shapes-rtsae"))
    warming.set_rtsae_features({(SITE, 570): 1.0}, clip=False, apply_to="cond")
    assert not torch.equal(warming(text)[0], plain[0])
    entry = callers.Family("WarmingPipeline", aside=("warm",))
    monkeypatch.setattr(callers, "FAMILIES", (entry, *callers.FAMILIES))
    callers.family_of.cache_clear()
    try:
        aside, drawn = warming(text)
    finally:
        callers.family_of.cache_clear()
    assert torch.equal(aside, plain[0]) and not torch.equal(drawn, plain[1])
