"""Pipelines of diffusers that call their denoiser in a way of their own, small and random."""

import diffusers
import pytest
import torch
from every_pipeline.builds import BUILDS, Ask, load_all
from every_pipeline.measure import AMOUNT, Subject, dictionary, moved, widths_of

from diffusers_rtsae import list_sites
from diffusers_rtsae.denoiser import describe, get_denoisers, get_site


def built(name: str) -> Subject:
    load_all()
    return Subject(name, BUILDS[name](getattr(diffusers, name)))


def load(subject: Subject, site: str, ask: Ask) -> dict[str, torch.Tensor]:
    """Give it a dictionary at a site; its first direction, at full activation."""
    made = dictionary(site, widths_of(subject, [site], ask)[site])
    subject.pipe.load_rtsae(made)
    return (AMOUNT * made[site].feature_trajectories([0])[0, 0]).detach()


def test_steps_that_are_denoised_beside_one_another_are_refused():
    subject, ask, site = built("StableDiffusionParadigmsPipeline"), Ask(steps=4), "down_blocks.0"
    load(subject, site, ask)
    with pytest.raises(ValueError, match="Paradigms.* at different times in one call: that cannot be followed"):
        subject.steered(ask, site, apply_to="cond")


@pytest.mark.parametrize("prompts", [(1,), (1, 3)], ids=["one video", "two videos"])
def test_a_mask_of_frames_holds_in_each_video(prompts):
    subject, ask, site = built("AnimateDiffPipeline"), Ask(prompts=prompts), "down_blocks.0"
    vector = load(subject, site, ask)
    first = torch.zeros(1, 2, 8, 8)
    first[:, 0] = 1  # of two frames
    _, calls = subject.steered(ask, site, apply_to="cond", mask=first)
    block = describe(get_site(subject.pipe.unet, site))
    expected = [0.0, 0.0] * len(prompts) + [1.0, 0.0] * len(prompts)  # unconditional videos first
    assert moved(calls[0], block, vector)[0].mean(1).tolist() == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("name", ["AmusedImg2ImgPipeline", "SanaSprintImg2ImgPipeline"])
def test_latents_are_read_in_the_middle_of_what_is_no_diffusion_of_pictures(name):
    subject, ask = built(name), Ask()
    site = next(site for site in list_sites(subject.pipe) if site.startswith("transformer_"))
    load(subject, site, ask)
    with subject.pipe.rtsae_steering({(site, 0): 1.0}, operation="ablate"):
        subject.run(ask)
    assert subject.pipe.rtsae_report()[site]


def test_a_dictionary_of_the_second_of_two_denoisers_is_known_and_unloaded():
    subject, ask, site = built("WanPipeline"), Ask(), "blocks.0"
    pipe, plain = subject.pipe, subject.run(Ask())[0]
    alone = type(pipe)(**{**pipe.components, "transformer": pipe.transformer_2, "transformer_2": None})
    width = widths_of(subject, [site], ask)[site]
    alone.load_rtsae(dictionary(site, width))
    alone.set_rtsae_features({(site, 0): 1.0}, clip=False)
    assert pipe.get_list_rtsae() == alone.get_list_rtsae() == {"default": [site]}
    assert pipe.get_active_rtsae() == ["default"]
    pipe.unload_rtsae()
    assert pipe.get_list_rtsae() == alone.get_list_rtsae() == {} and pipe.get_active_rtsae() == []
    for denoiser in get_denoisers(pipe).values():
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser.modules())
    torch.testing.assert_close(subject.run(ask)[0], plain, atol=0, rtol=0)
