"""Every sampler: the clock follows it, edits act, and nothing depends on how it counts time."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

from diffusers_rtsae.denoiser import CallReader

SITE = "up_blocks.1.attentions.1"
SAMPLERS = {
    "DDIM": ("DDIMScheduler", {}),
    "DDIM, trailing": ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    "DDPM": ("DDPMScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "PNDM with PRK": ("PNDMScheduler", {"skip_prk_steps": False}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler Karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
    "KDPM2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ single": ("DPMSolverSinglestepScheduler", {}),
    "DPM++ SDE": ("DPMSolverSDEScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "DEIS": ("DEISMultistepScheduler", {"algorithm_type": "deis"}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
    "SA solver": ("SASolverScheduler", {}),
    "IPNDM": ("IPNDMScheduler", {}),
}  # flow matching is in test_guidance_rows.py, with the models made for it
LATENTS = {"output_type": "latent"}  # which say more than pictures
UNUSUAL = {"IPNDM"}  # not made for this model: it denoises, but to no picture


@pytest.fixture(params=SAMPLERS)
def sampler(request, steered):
    kind, options = SAMPLERS[request.param]
    if kind == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    made = getattr(diffusers, kind)
    if request.param in UNUSUAL:
        steered.scheduler = made()
    else:
        steered.scheduler = made.from_config(steered.scheduler.config, **options)
    return request.param


@pytest.mark.way(2)
@pytest.mark.way(3)
@pytest.mark.parametrize("steps", [1, 4])
def test_edits_act_and_seeds_repeat(steered, sampler, draw, steps, monkeypatch):
    if (sampler, steps) == ("IPNDM", 1):
        pytest.skip("its single step divides by zero, whatever the model says")
    seen = []
    read = CallReader.read

    def reading(reader, arguments, component):
        call = read(reader, arguments, component)
        seen.append(call.timestep)
        return call

    monkeypatch.setattr(CallReader, "read", reading)
    try:
        plain = draw(steered, steps=steps, **LATENTS)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        assert steps == 1
        pytest.skip(f"diffusers cannot make a single step with it: {error}")
    seen.clear()
    with steered.rtsae_steering({(SITE, 3): [0.0, 2.0]}, where="everywhere"):
        once = draw(steered, steps=steps, **LATENTS)
        calls = len(seen)
        twice = draw(steered, steps=steps, **LATENTS)
        report = steered.rtsae_report()
    assert np.isfinite(once).all() and np.array_equal(once, twice) and len(seen) == 2 * calls
    assert np.array_equal(once[0], plain[0]) and not np.array_equal(once[1], plain[1])
    first = 0 if steps == 1 else 1  # a single step with leading spacing is the last of the schedule
    assert calls >= steps and max(seen) > (first if sampler not in UNUSUAL else 0) and max(seen) <= 1000.5
    assert len(report[SITE]) == calls


def test_reading_edits_follow_every_sampler(steered, sampler, draw):
    """An ablation predicts from the last anchor, so it depends on where in time each call is."""
    call = {"prompts": "a star", "steps": 4} | LATENTS
    plain = draw(steered, **call)
    rows = {(SITE, i): 1.0 for i in range(40)}
    with steered.rtsae_steering(rows, operation="ablate"):
        once, twice = draw(steered, **call), draw(steered, **call)
    assert np.isfinite(once).all() and np.array_equal(once, twice) and not np.array_equal(once, plain)


def test_custom_timesteps_and_image_to_image(steered, draw):
    steered.scheduler = DDIMScheduler.from_config(steered.scheduler.config)
    image_to_image = StableDiffusionImg2ImgPipeline(**steered.components, requires_safety_checker=False)
    image_to_image.set_progress_bar_config(disable=True)
    start = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    steered.scheduler = diffusers.DDPMScheduler.from_config(steered.scheduler.config)
    calls = {
        "custom timesteps": lambda: draw(steered, timesteps=[999, 700, 400, 3]),
        **{
            f"strength {s}": lambda s=s: draw(image_to_image, steps=6, image=start, strength=s)
            for s in (0.2, 0.5, 1.0)
        },
    }
    for call in calls.values():
        plain = call()
        with steered.rtsae_steering({(SITE, 3): [0.0, 2.0]}):
            images = call()
        assert np.isfinite(images).all() and np.array_equal(images[0], plain[0])
        assert not np.array_equal(images[1], plain[1])


@pytest.mark.parametrize("change", ["another scheduler", "its betas"])
def test_the_noise_schedule_is_the_one_at_the_call(steered, draw, change):
    ablate = dict.fromkeys([(SITE, i) for i in range(40)], 1.0)
    original = DDIMScheduler.from_config(steered.scheduler.config)
    rescaled = DDIMScheduler.from_config(original.config, rescale_betas_zero_snr=True)
    images = []
    for features_first in (True, False):
        steered.scheduler = DDIMScheduler.from_config(original.config)
        for setting in (True, False):
            if setting == features_first:
                steered.set_rtsae_features(ablate, operation="ablate", end=1.0)
            elif change == "its betas":
                steered.scheduler.alphas_cumprod = rescaled.alphas_cumprod
            else:
                steered.scheduler = rescaled
        images.append(draw(steered, steps=4))
    assert np.array_equal(*images)
    with steered.rtsae_steering({}):
        steered.disable_rtsae()
        assert not np.array_equal(draw(steered, steps=4), images[0])
