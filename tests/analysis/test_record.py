import numpy as np
import pytest
import torch

from diffusers_rtsae.analysis.record import Recorder, record
from diffusers_rtsae.analysis.scorer import shows


@pytest.fixture
def site(dictionary):
    return next(iter(dictionary.sites))


def test_recording_changes_nothing_and_keeps_the_conditional_half(pipe, site, draw):
    plain = draw(pipe)
    with Recorder(pipe, [site, "mid_block"]) as recorder:
        assert np.array_equal(draw(pipe), plain)
    h = recorder.trajectories(site)
    assert h.shape == (2, 64, 4, 160) and len(recorder.timesteps) == 4
    assert recorder.trajectories("mid_block").shape[0] == 2
    with Recorder(pipe, [site]) as again:
        draw(pipe, negative_prompt=["blue", "red"])
    assert not torch.equal(again.trajectories(site), h)  # another negative prompt steers the picture elsewhere
    torch.testing.assert_close(again.trajectories(site)[:, :, 0], h[:, :, 0])  # but not the first conditional call
    assert not pipe.unet._forward_pre_hooks


def test_recording_chosen_timesteps(pipe, site, draw):
    pipe.scheduler.set_timesteps(4)
    wanted = [float(t) for t in pipe.scheduler.timesteps[[0, 3]]]
    with Recorder(pipe, [site], wanted) as recorder:
        draw(pipe)
    assert recorder.timesteps == wanted and recorder.trajectories(site).shape[2] == 2


def test_traced_activations_equal_the_dense_code(steered, dictionary, site):
    rtsae = dictionary.sites[site]
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 25, "guidance_scale": 4.0}
    with Recorder(steered, [site], [float(t) for t in rtsae.config.anchors]) as recorder:
        steered("a large red star", generator=generator, **call)
    latents = rtsae.encode(recorder.trajectories(site)[0])
    index = int(latents.sum(0).argmax())
    recording = record(steered, "a large red star", generator=torch.Generator().manual_seed(0), **call)
    maps = recording.maps([(site, index)])[0]
    assert maps.shape == (1, 25, 8, 8) and recording.timesteps[-1] == rtsae.config.anchors[-1]
    expected = latents[:, index].view(8, 8) / rtsae.typical_activation[index]
    torch.testing.assert_close(maps[0, -1], expected, atol=1e-3, rtol=1e-3)
    whole = recording.presence(site)
    torch.testing.assert_close(whole[0, :, index], maps[0].mean((1, 2)), atol=1e-4, rtol=1e-3)


def test_presence_under_a_mask_counts_only_there(steered, site):
    recording = record(steered, ["a star on the left", "a heart"], num_inference_steps=4)
    mask = torch.zeros(64, 64)
    mask[:, :32] = 1
    left, right, whole = recording.presence(site, mask), recording.presence(site, 1 - mask), recording.presence(site)
    assert whole.shape == (2, 4, 2048)
    torch.testing.assert_close((left + right) / 2, whole, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="covers at least one token, got an empty one"):
        recording.presence(site, torch.zeros(64, 64))


def test_shows_needs_a_valid_picture_and_every_filled_slot():
    reading = {"valid": "yes", "left.colour": "red", "right.colour": None, "style": "flat"}
    assert (
        shows(reading, "colour", "red") and shows(reading, "style", "flat") and not shows(reading, "style", "dotted")
    )
    assert not shows(reading | {"right.colour": "blue"}, "colour", "red")
    assert not shows(reading | {"valid": "no"}, "colour", "red")
    assert not shows({"valid": "yes", "left.colour": None}, "colour", "red")
