import pytest
import torch

from training.loop.dynamics import fit_dynamics


def linear_process(count: int, noise: float, seed: int = 0) -> torch.Tensor:
    """Trajectories `(count, 3, 5)` of a known linear process with an offset and a scale of its own at each anchor."""
    generator = torch.Generator().manual_seed(seed)
    matrix = 0.5 * torch.randn(5, 5, generator=torch.Generator().manual_seed(99))
    h = [torch.randn(count, 5, generator=generator)]
    for _ in range(2):
        h.append(h[-1] @ matrix.T + noise * torch.randn(count, 5, generator=generator))
    return torch.stack(h, 1) * torch.tensor([1.0, 3.0, 0.5])[:, None] + torch.tensor([2.0, -1.0, 4.0])[:, None]


def test_streamed_moments_give_the_least_squares_solution():
    data = linear_process(4000, noise=0.3)
    dynamics, _ = fit_dynamics(data.split(500), [data], ridge=0.0)
    x = (data - dynamics.mean) / dynamics.scale[:, None]
    for g in range(2):
        exact = torch.linalg.lstsq(x[:, g], x[:, g + 1]).solution.T
        torch.testing.assert_close(dynamics.transition[g], exact, atol=2e-3, rtol=2e-3)


def test_a_linear_process_is_predicted_and_its_noise_is_what_is_left():
    dynamics, fitted = fit_dynamics([linear_process(4000, 0.0)], [linear_process(500, 0.0, seed=1)], ridge=1e-6)
    assert min(fitted["r2"]) > 0.999
    _, noisy = fit_dynamics([linear_process(4000, 1.0)], [linear_process(500, 1.0, seed=1)], ridge=1e-6)
    assert max(noisy["r2"]) < 0.9


def test_residuals_are_standardised():
    data = linear_process(4000, 0.5)
    dynamics, _ = fit_dynamics([data], [data], ridge=1e-3)
    residuals = dynamics.residuals(data)
    torch.testing.assert_close(residuals.square().mean((0, 2)), torch.ones(3), atol=0.02, rtol=0.02)
    assert residuals.mean((0, 2)).abs().max() < 0.02


def test_without_residuals_there_are_no_dynamics():
    data = linear_process(100, 0.1)
    dynamics, _ = fit_dynamics([data], [data], ridge=1e-3, residualize=False)
    assert (dynamics.transition == 0).all()


def test_nothing_to_fit():
    with pytest.raises(ValueError, match="no trajectories"):
        fit_dynamics([], [], ridge=1e-3)
