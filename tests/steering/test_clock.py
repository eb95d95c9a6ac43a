import pytest
import torch
from diffusers import DDIMScheduler

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


class FakePipeline:
    """What the clock reads of a pipeline: its scheduler and whether it guides."""

    do_classifier_free_guidance = True

    def __init__(self):
        self.scheduler = DDIMScheduler()


def test_conditional_rows_follow_guidance_live():
    clock, pipeline = Clock(), FakePipeline()
    clock.watch(pipeline)
    clock.tick(torch.zeros(4, 4, 8, 8), 900, None)
    assert clock.conditional_rows(4) == slice(2, 4)
    pipeline.do_classifier_free_guidance = False
    assert clock.conditional_rows(2) == slice(0, 2)


def test_generation_changes_with_new_timesteps_only():
    clock, pipeline, sample = Clock(), FakePipeline(), torch.zeros(2, 4, 8, 8)
    clock.watch(pipeline)
    for t in (900, 500, 500, 510, 100):  # repeats and small steps back happen within a run
        clock.tick(sample, t, None)
    assert clock.generation == 1
    pipeline.scheduler.set_timesteps(10)
    clock.tick(sample, 50, None)  # image-to-image may begin below where the last run ended
    assert clock.generation == 2


def test_dropping_guidance_in_mid_run_is_the_same_generation():
    clock, pipeline = Clock(), FakePipeline()
    clock.watch(pipeline)
    clock.tick(torch.zeros(4, 4, 8, 8), 900, None)
    pipeline.do_classifier_free_guidance = False
    clock.tick(torch.zeros(2, 4, 8, 8), 800, None)
    assert clock.generation == 1


def test_without_a_pipeline_time_jumping_back_or_another_shape_is_a_new_generation():
    clock = Clock()
    for shape, t in (((2, 4, 8, 8), 900), ((2, 4, 8, 8), 100), ((2, 4, 8, 8), 950), ((2, 4, 16, 8), 900)):
        clock.tick(torch.zeros(shape), t, None)
    assert clock.generation == 3
