import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from diffusers_rtsae.steering import Clock, TimeGrid

ALPHAS = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
ANCHORS = [961, 721, 481, 241, 1]


def test_anchors_have_whole_coordinates():
    grid = TimeGrid(ANCHORS, ALPHAS)
    assert [grid.coordinate(t) for t in ANCHORS] == pytest.approx([0, 1, 2, 3, 4])


def test_coordinates_grow_with_time_and_are_clamped():
    grid = TimeGrid(ANCHORS, ALPHAS)
    path = [grid.coordinate(t) for t in (999, 961, 900, 721.5, 721, 300, 1, 0)]
    assert path == sorted(path) and path[0] == 0 and path[-1] == 4


def test_interpolation_is_on_the_log_snr_axis():
    grid, snr = TimeGrid(ANCHORS, ALPHAS), (ALPHAS / (1 - ALPHAS)).log()
    expected = (snr[800] - snr[961]) / (snr[721] - snr[961])
    assert grid.coordinate(800) == pytest.approx(expected.item(), abs=1e-4)


def test_without_a_schedule_interpolation_is_linear_in_time():
    assert TimeGrid([1000, 500, 0], None).coordinate(750) == pytest.approx(0.5)


class Caller(DiffusionPipeline):
    """A pipeline that does nothing but call the denoiser, here the clock."""

    do_classifier_free_guidance = True

    def __init__(self):
        self.scheduler = DDIMScheduler()

    def __call__(self, clock: Clock, rows: int, timestep: float, batch_size: int = 1, num_images_per_prompt: int = 1):
        clock.tick(torch.zeros(rows, 4, 8, 8), timestep)


def test_conditional_rows_follow_guidance_live():
    clock, pipeline = Clock(), Caller()
    pipeline(clock, 4, 900, batch_size=2)
    assert dict(clock.rows(4))["cond"] == slice(2, 4) and clock.prompts == 2
    pipeline.do_classifier_free_guidance = False
    pipeline(clock, 2, 800, batch_size=2)
    assert dict(clock.rows(2))["cond"] == slice(0, 2)
    assert clock.generation == 1  # dropping guidance in mid-run is no new generation


def test_each_pipeline_is_asked_about_its_own_call():
    clock, guided, plain = Clock(), Caller(), Caller()
    plain.do_classifier_free_guidance = False
    for _ in range(2):
        guided(clock, 2, 900)
        assert dict(clock.rows(2))["cond"] == slice(1, 2)
        plain(clock, 2, 900, num_images_per_prompt=2)
        assert dict(clock.rows(2))["cond"] == slice(0, 2)
    assert clock.generation == 4


def test_generation_changes_with_new_timesteps_only():
    clock, pipeline = Clock(), Caller()
    for t in (900, 500, 500, 510, 100):  # repeats and small steps back happen within a run
        pipeline(clock, 2, t)
    assert clock.generation == 1
    pipeline.scheduler.set_timesteps(10)
    pipeline(clock, 2, 50)  # image-to-image may begin below where the last run ended
    assert clock.generation == 2


def test_without_a_pipeline_time_jumping_back_or_another_shape_is_a_new_generation():
    clock = Clock()
    for shape, t in (((2, 4, 8, 8), 900), ((2, 4, 8, 8), 100), ((2, 4, 8, 8), 950), ((2, 4, 16, 8), 900)):
        clock.tick(torch.zeros(shape), torch.tensor([t]))
    assert clock.generation == 3 and dict(clock.rows(2))["cond"] == slice(0, 2)
