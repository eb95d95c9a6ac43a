import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_rtsae import RTSAE
from diffusers_rtsae.steering import Edit, PlanState, PrefixEncoder, SitePlan, TimeGrid, Trajectory

ALPHAS = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
ANCHORS = [961, 721, 481, 241, 1]
D, M = 12, 20


def random_rtsae(seed: int) -> RTSAE:
    torch.manual_seed(seed)
    rtsae = RTSAE("mid_block", D, ANCHORS, M, 4)
    dynamics = rtsae.dynamics
    spreads = {
        dynamics.mean: 1.0,
        dynamics.transition: 0.2,
        rtsae.encoder_bias.data: 0.1,
        rtsae.decoder_bias.data: 0.3,
    }
    for tensor, spread in spreads.items():
        tensor.copy_(spread * torch.randn(tensor.shape))
    dynamics.scale.uniform_(0.5, 2)
    dynamics.residual_scale.uniform_(0.3, 1)
    rtsae.threshold.uniform_(0, 0.5)
    rtsae.typical_activation.uniform_(0.5, 3)
    rtsae.max_activation.copy_(5 * rtsae.typical_activation)
    return rtsae


def walk(encoder: PrefixEncoder, h: torch.Tensor, timesteps: list[float]) -> list[torch.Tensor]:
    codes, state = [], Trajectory()
    for i, timestep in enumerate(timesteps):
        codes.append(encoder.observe(state, h[:, :, i], timestep))
        state.continue_with(h[:, :, i])
    return codes


@pytest.mark.parametrize("seed", range(5))
def test_lazy_folded_encoding_equals_the_dense_path_at_every_anchor(seed):
    rtsae, h = random_rtsae(seed), torch.randn(2, 7, 5, D)
    rows = torch.randperm(M)[:6].tolist()
    codes = walk(PrefixEncoder(rtsae, rows, TimeGrid(ANCHORS, ALPHAS), torch.device("cpu")), h, ANCHORS)
    for g, code in enumerate(codes):
        dense = rtsae.encode(h[:, :, : g + 1].flatten(0, 1)).unflatten(0, (2, 7))[..., rows]
        torch.testing.assert_close(code, dense, atol=1e-4, rtol=1e-4)


def test_calling_twice_at_a_timestep_overwrites():
    rtsae, h = random_rtsae(0), torch.randn(1, 3, 5, D)
    grid = TimeGrid(ANCHORS, ALPHAS)
    once = walk(PrefixEncoder(rtsae, [0, 1], grid, torch.device("cpu")), h, ANCHORS)
    noise = torch.randn(1, 3, 5, D)
    doubled = torch.stack([noise, h], dim=3).flatten(2, 3)  # a first guess at each step, then the real call
    twice = walk(
        PrefixEncoder(rtsae, [0, 1], grid, torch.device("cpu")), doubled, [t for t in ANCHORS for _ in range(2)]
    )
    for a, b in zip(once, twice[1::2], strict=True):
        torch.testing.assert_close(a, b)


def test_steps_between_anchors_do_not_change_the_code_at_the_anchors():
    rtsae, grid = random_rtsae(1), TimeGrid(ANCHORS, ALPHAS)
    fine = sorted({*ANCHORS, 841, 601, 361, 121}, reverse=True)
    h = torch.randn(1, 3, len(fine), D)
    coarse = walk(PrefixEncoder(rtsae, [0, 1, 2], grid, torch.device("cpu")), h[:, :, ::2], ANCHORS)
    codes = walk(PrefixEncoder(rtsae, [0, 1, 2], grid, torch.device("cpu")), h, fine)
    for a, b in zip(coarse, codes[::2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_steps_before_the_first_anchor_stand_for_it_in_turn():
    rtsae, h, grid = random_rtsae(0), torch.randn(1, 3, 5, D), TimeGrid(ANCHORS, ALPHAS)
    expected = walk(PrefixEncoder(rtsae, [0, 1], grid, torch.device("cpu")), h, ANCHORS)
    earlier = torch.cat([torch.randn(1, 3, 2, D), h], dim=2)
    codes = walk(PrefixEncoder(rtsae, [0, 1], grid, torch.device("cpu")), earlier, [999, 981, *ANCHORS])
    for a, b in zip(expected, codes[2:], strict=True):
        torch.testing.assert_close(a, b)


def test_skipped_anchors_compose_the_dynamics():
    """Along a trajectory that follows the linear dynamics exactly, nothing new is seen after a skip."""
    rtsae, grid = random_rtsae(2), TimeGrid(ANCHORS, ALPHAS)
    rtsae.decoder_bias.data.zero_()
    residuals = torch.zeros(3, 5, D)
    residuals[:, 0] = torch.randn(3, D)
    h = rtsae.dynamics.rollout(residuals)[None]
    rtsae.threshold.zero_()
    encoder = PrefixEncoder(rtsae, list(range(M)), grid, torch.device("cpu"))
    codes = walk(encoder, h[:, :, [0, 2, 4]], [961, 481, 1])
    torch.testing.assert_close(codes[1], codes[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(codes[2], codes[0], atol=1e-4, rtol=1e-4)


def plan_delta(edit: Edit, tokens: torch.Tensor, timestep: float, rtsae: RTSAE, size=(2, 2)):
    plan, state = SitePlan(rtsae, [edit], ALPHAS), PlanState()
    on_cond = plan.conditional(state, tokens, timestep, size)
    return on_cond, plan.unconditional(state, 0, tokens, timestep, size)


def test_adding_one_typical_activation_moves_along_the_feature_trajectory():
    rtsae, tokens = random_rtsae(3), torch.randn(2, 4, D)
    edit = Edit(latents=(5,), weights=(1.0,), strength=2.0, apply_to="contrast")
    for g, timestep in enumerate(ANCHORS):
        on_cond, on_uncond = plan_delta(edit, tokens, timestep, rtsae)
        expected = 2 * rtsae.typical_activation[5] * rtsae.feature_trajectories([5])[0, g]
        torch.testing.assert_close(on_cond.expand(2, 1, D)[0, 0], expected)
        torch.testing.assert_close(on_uncond, -on_cond)


def test_residual_injection_adds_only_the_innovation():
    rtsae, tokens = random_rtsae(3), torch.randn(1, 4, D)
    edit = Edit(latents=(5,), weights=(1.0,), strength=1.0, injection="residual", apply_to="cond")
    on_cond, on_uncond = plan_delta(edit, tokens, 481, rtsae)
    torch.testing.assert_close(on_cond[0, 0], rtsae.typical_activation[5] * rtsae.residual_directions([5])[0, 2])
    assert on_uncond is None


def test_ablating_removes_exactly_what_the_latent_wrote():
    rtsae, tokens = random_rtsae(4), torch.randn(1, 4, D)
    rtsae.threshold.zero_()
    edit = Edit(latents=(3,), weights=(1.0,), strength=0.0, operation="scale")
    on_cond, _ = plan_delta(edit, tokens, 961, rtsae)
    latents = rtsae.encode(tokens[0, :, None])
    expected = -latents[:, 3, None] * rtsae.feature_trajectories([3])[0, 0]
    torch.testing.assert_close(on_cond[0], expected, atol=1e-5, rtol=1e-4)
    assert (on_cond[0][latents[:, 3] == 0] == 0).all()  # an inactive feature that is scaled changes nothing


def test_where_and_mask_restrict_the_change():
    rtsae, tokens = random_rtsae(5), torch.randn(1, 4, D)
    active = rtsae.encode(tokens[0, :, None])[:, 7] > 0
    base = {"latents": (5,), "weights": (1.0,), "strength": 1.0}
    gated, _ = plan_delta(Edit(**base, where=(7,)), tokens, 961, rtsae)
    assert torch.equal(gated[0].abs().sum(1) > 0, active) and 0 < active.sum() < 4
    mask = torch.tensor([[[1.0, 0.0], [0.0, 0.5]]])
    masked, _ = plan_delta(Edit(**base, mask=mask), tokens, 961, rtsae)
    whole, _ = plan_delta(Edit(**base), tokens, 961, rtsae)
    torch.testing.assert_close(masked[0], whole[0] * mask.flatten()[:, None])


def test_outside_its_window_an_edit_does_nothing():
    edit = Edit(latents=(5,), weights=(1.0,), strength=1.0, start=0.5)
    assert plan_delta(edit, torch.randn(1, 4, D), 961, random_rtsae(6)) == (None, None)
