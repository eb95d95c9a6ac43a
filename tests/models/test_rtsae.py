import pytest
import torch

from diffusers_rtsae import RTSAE


@pytest.fixture
def rtsae():
    generator = torch.Generator().manual_seed(0)
    model = RTSAE("mid_block", 6, [900, 500, 100], num_latents=10, k=3)
    for tensor in (model.dynamics.mean, model.dynamics.transition, model.encoder_bias.data, model.decoder_bias.data):
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    model.dynamics.scale.copy_(torch.tensor([0.5, 1.0, 2.0]))
    model.dynamics.residual_scale.copy_(torch.tensor([1.0, 0.3, 0.7]))
    model.threshold.copy_(torch.tensor([0.1, 0.2, 0.3]))
    return model


def trajectories(count=20):
    return torch.randn(count, 3, 6, generator=torch.Generator().manual_seed(1))


def test_rollout_inverts_residuals(rtsae):
    h = trajectories()
    torch.testing.assert_close(rtsae.dynamics.rollout(rtsae.dynamics.residuals(h)), h)


def test_teacher_forced_equals_online_for_exact_residuals_and_differs_otherwise(rtsae):
    h = trajectories()
    residuals = rtsae.dynamics.residuals(h)
    torch.testing.assert_close(rtsae.dynamics.teacher_forced(residuals, h), h)
    residuals[:, 0] += 1
    forced, online = rtsae.dynamics.teacher_forced(residuals, h), rtsae.dynamics.rollout(residuals)
    torch.testing.assert_close(forced[:, 1], h[:, 1])  # the error of the first anchor does not travel
    assert not torch.allclose(online[:, 1], h[:, 1])


def test_feature_trajectory_is_what_decoding_one_more_unit_adds(rtsae):
    latents = torch.rand(1, 10)
    more = latents.clone()
    more[0, 4] += 1
    added = rtsae.decode(more) - rtsae.decode(latents)
    torch.testing.assert_close(rtsae.feature_trajectories([4]), added, atol=1e-5, rtol=1e-4)


def test_encoding_a_prefix_ignores_what_comes_later(rtsae):
    h = trajectories()
    changed = h.clone()
    changed[:, 2] = 0
    assert torch.equal(rtsae.encode(h[:, :2]), rtsae.encode(changed[:, :2]))
    assert not torch.equal(rtsae.encode(h), rtsae.encode(changed))


def test_latents_respect_the_threshold(rtsae):
    latents = rtsae.encode(trajectories())
    assert (latents[latents > 0] > 0.3).all() and (latents > 0).any()


def test_save_and_load_keep_everything(rtsae, tmp_path):
    rtsae.save_pretrained(tmp_path)
    again = RTSAE.from_pretrained(tmp_path)
    assert again.config.site == "mid_block" and again.config.anchors == [900, 500, 100]
    assert torch.equal(again.encode(trajectories()), rtsae.encode(trajectories()))
