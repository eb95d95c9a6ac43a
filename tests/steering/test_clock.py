import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from diffusers_rtsae.steering import Clock, TimeGrid, noise_schedule

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


def test_flow_matching_has_no_noise_schedule():
    flow = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    assert flow.alphas_cumprod is not None and noise_schedule(flow) is None
    assert noise_schedule(FlowMatchEulerDiscreteScheduler()) is None
    assert noise_schedule(DPMSolverMultistepScheduler()) is not None


def test_without_a_schedule_interpolation_is_linear_in_time():
    assert TimeGrid([1000, 500, 0], None).coordinate(750) == pytest.approx(0.5)


class Caller(DiffusionPipeline):
    """A pipeline that does nothing but call the denoiser, here the clock."""

    do_classifier_free_guidance = True

    def __init__(self):
        self.scheduler = DDIMScheduler()

    def __call__(self, clock: Clock, *calls: tuple[int, float], batch_size: int = 1, num_images_per_prompt: int = 1):
        for rows, timestep in calls:
            clock.tick(torch.zeros(rows, 4, 8, 8), timestep)
            yield  # what happens between the steps


def test_conditional_rows_follow_guidance_live():
    clock, pipeline = Clock(), Caller()
    steps = pipeline(clock, (4, 900), (2, 800), batch_size=2)
    next(steps)
    assert dict(clock.rows(4))["cond"] == slice(2, 4) and clock.prompts == 2
    pipeline.do_classifier_free_guidance = False
    next(steps)
    assert dict(clock.rows(2))["cond"] == slice(0, 2)
    assert clock.generation == 1  # dropping guidance in mid-run is no new generation


def test_each_pipeline_is_asked_about_its_own_call():
    clock, guided, plain = Clock(), Caller(), Caller()
    plain.do_classifier_free_guidance = False
    for _ in range(2):
        next(guided(clock, (2, 900)))
        assert dict(clock.rows(2))["cond"] == slice(1, 2)
        next(plain(clock, (2, 900), num_images_per_prompt=2))
        assert dict(clock.rows(2))["cond"] == slice(0, 2)
    assert clock.generation == 4


def test_a_call_of_a_pipeline_is_a_generation():
    clock, pipeline = Clock(), Caller()
    for _ in pipeline(clock, *((2, t) for t in (900, 500, 500, 510, 100))):  # repeats and small steps back happen
        pipeline.scheduler.set_timesteps(10)  # another thread begins with the same scheduler
    assert clock.generation == 1
    for generation in range(2, 6):  # image-to-image may begin below where the last run ended
        assert len(list(pipeline(clock, (2, 50), (2, 40)))) == 2
        assert clock.generation == generation
    assert len(list(pipeline(clock, (2, 900), (2, 400), (2, 950)))) == 3  # two runs in one call
    assert clock.generation == 7
    clock.tick(torch.zeros(1, 4, 8, 8), 30)  # no pipeline any more
    assert clock.generation == 8


def test_without_a_pipeline_time_jumping_back_or_another_shape_is_a_new_generation():
    clock = Clock()
    for shape, t in (((2, 4, 8, 8), 900), ((2, 4, 8, 8), 100), ((2, 4, 8, 8), 950), ((2, 4, 16, 8), 900)):
        clock.tick(torch.zeros(shape), torch.tensor([t]))
    assert clock.generation == 3 and dict(clock.rows(2))["cond"] == slice(0, 2)
