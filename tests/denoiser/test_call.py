import math
import weakref

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    SCMScheduler,
)

from diffusers_rtsae import RTSAE
from diffusers_rtsae.denoiser import Arguments, Call, CallReader, TimeGrid, noise_schedule, training_time

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


def read(reader: CallReader, shape: tuple[int, ...], timestep, **told) -> Call:
    return reader.read(Arguments(["sample", "timestep"], (torch.zeros(shape), timestep), told))


class Calling(DiffusionPipeline):
    """A pipeline that does nothing but call the denoiser, here what reads its calls."""

    do_classifier_free_guidance = True

    def __init__(self):
        self.scheduler = DDIMScheduler()

    def __call__(self, reader, *calls: tuple[int, float], batch_size: int = 1, num_images_per_prompt: int = 1):
        for i, (rows, t) in enumerate(calls):  # noqa: B007
            yield read(reader, (rows, 4, 8, 8), t)


def test_conditional_rows_follow_guidance_live():
    reader, pipeline = CallReader(), Calling()
    steps = pipeline(reader, (4, 900), (2, 800), batch_size=2)
    first = next(steps)
    assert first.rows_of("cond", 4) == slice(2, 4) and first.prompts == 2 and first.is_start
    pipeline.do_classifier_free_guidance = False
    second = next(steps)
    assert second.rows_of("cond", 2) == slice(0, 2) and second.rows_of("uncond", 2) is None
    assert not second.is_start  # dropping guidance in mid-run is no new generation


def test_each_pipeline_is_asked_about_its_own_call():
    reader, guided, plain = CallReader(), Calling(), Calling()
    plain.do_classifier_free_guidance = False
    for _ in range(2):
        assert next(guided(reader, (2, 900))).rows_of("cond", 2) == slice(1, 2)
        assert next(plain(reader, (2, 900), num_images_per_prompt=2)).rows_of("cond", 2) == slice(0, 2)


def starts(pipeline, reader, *times: float) -> list[bool]:
    return [call.is_start for call in pipeline(reader, *((2, t) for t in times))]


def test_a_call_of_a_pipeline_is_a_generation():
    reader, pipeline = CallReader(), Calling()
    assert starts(pipeline, reader, 900, 500, 500, 510, 100) == [True] + [False] * 4  # small steps back happen
    for _ in range(3):  # image-to-image may begin below where the last run ended
        assert starts(pipeline, reader, 50, 40) == [True, False]
    assert starts(pipeline, reader, 900, 400, 950) == [True, False, True]  # two runs in one call
    assert read(reader, (1, 4, 8, 8), 30).pipeline is None


def test_inverse_samplers_rise_through_one_generation():
    assert starts(Calling(), CallReader(), 1, 201, 401, 801) == [True] + [False] * 3
    assert starts(Calling(), CallReader(), 1, 201, 401, 1, 201) == [True, False, False, True, False]


def test_a_generation_that_runs_in_another_is_one_of_its_own():
    reader, pipeline = CallReader(), Calling()
    outer = pipeline(reader, (2, 900), (2, 500), (2, 100))
    first = next(outer)
    assert starts(pipeline, reader, 800, 400) == [True, False]
    second = next(outer)
    assert not second.is_start and first.generation is second.generation


def test_what_a_generation_keeps_is_dropped_with_its_call():
    reader, pipeline, kept = CallReader(), Calling(), []

    class Something:
        pass

    for call in pipeline(reader, (2, 900), (2, 500)):
        call.generation.memories[pipeline] = Something()
        kept.append(weakref.ref(call.generation.memories[pipeline]))
        run = call.run
    del call
    assert run() is None and all(one() is None for one in kept)


def test_without_a_pipeline_time_jumping_back_or_another_shape_is_a_new_generation():
    reader = CallReader()
    steps = (((2, 4, 8, 8), 900), ((2, 4, 8, 8), 100), ((2, 4, 8, 8), 950), ((2, 4, 16, 8), 900))
    calls = [read(reader, shape, torch.tensor([t])) for shape, t in steps]
    assert [call.is_start for call in calls] == [True, False, True, True]
    assert calls[-1].rows_of("cond", 2) == slice(0, 2)


def test_rows_of_a_training_loop_have_a_time_each():
    call = read(CallReader(), (3, 4, 8, 8), torch.tensor([100, 900, 900]))
    assert [(part.timestep, rows) for part, rows in call.parts_of(3)] == [(100, slice(0, 1)), (900, slice(1, 3))]


@pytest.mark.parametrize(
    ("scheduler", "timestep", "expected"),
    [
        (DDIMScheduler(), 250, 250),
        (FlowMatchEulerDiscreteScheduler(), 1.0, 1.0),
        (DDIMScheduler(num_train_timesteps=100), 25, 250),
        (EDMEulerScheduler(), 0.0, 500),  # σ = 1: as much noise as signal
        (SCMScheduler(), math.pi / 4, 500),
        (IPNDMScheduler(), 0.5, 500),
    ],
    ids=lambda value: type(value).__name__,
)
def test_time_is_in_training_units(scheduler, timestep, expected):
    assert training_time(timestep, scheduler) == pytest.approx(expected)


def test_a_sampler_with_another_unit_is_refused():
    with pytest.raises(ValueError, match="DDIMScheduler calls with timestep 4000, expected 0 to 1000"):
        training_time(4000, DDIMScheduler())


class ToyTransformerBlock(torch.nn.Module):
    def forward(self, hidden_states):
        return hidden_states * 1.0


class Toy(torch.nn.Module):
    """A denoiser of one block."""

    def __init__(self):
        super().__init__()
        self.transformer_blocks, self.config = torch.nn.ModuleList([ToyTransformerBlock()]), {}

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        return (self.transformer_blocks[0](hidden_states),)


class CallsEachPart(DiffusionPipeline):
    """A pipeline whose unconditional call lacks the tokens of the text."""

    do_classifier_free_guidance = True

    def __init__(self):
        super().__init__()
        self.transformer, self.scheduler = Toy(), DDIMScheduler()

    def __call__(self, t=500, batch_size=1):
        prompt_embeds, negative_prompt_embeds = torch.ones(1, 2, 4), torch.zeros(1, 2, 4)
        first = self.transformer(torch.ones(1, 6, 4), t, prompt_embeds)[0]
        return first, self.transformer(torch.ones(1, 4, 4), t, negative_prompt_embeds)[0]


def test_a_change_of_other_tokens_is_refused():
    pipe, site = CallsEachPart(), "transformer_blocks.0"
    sae = RTSAE(site, 4, [961, 1], 4, 2)
    sae.typical_activation.fill_(10.0)
    pipe.load_rtsae({site: sae})
    with pipe.rtsae_steering({0: 1.0}, clip=False):  # one vector for all tokens follows
        conditional, unconditional = pipe()
    torch.testing.assert_close(conditional[0, 0] - 1, 1 - unconditional[0, 0])
    with pipe.rtsae_steering({0: 1.0}), pytest.raises(ValueError, match="apply_to='contrast' needs as many"):
        pipe()
    with pipe.rtsae_steering({0: 1.0}, apply_to="cond"):
        assert torch.equal(pipe()[1], torch.ones(1, 4, 4))
