"""Which samplers a pipeline has depends on what its model predicts."""

from pathlib import Path

import pytest

from training.experiments.samplers import FLOW, NOISE, markdown, samplers_of, scheduler
from training.worlds.pictures import generate, load_pipeline

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def people():
    return load_pipeline(EXAMPLES / "people-dit", "cpu")


@pytest.mark.parametrize("name", FLOW.known)
def test_a_model_of_rectified_flow_draws_with_each_of_its_samplers(people, name):
    before = people.scheduler
    assert samplers_of(people) is FLOW
    people.scheduler = scheduler(people, name)
    try:
        images = generate(people, ["a man judge with dark skin in noto style"], [0], 4, 3.0)
    finally:
        people.scheduler = before
    # its pictures are on white, and noise is on nothing
    assert images[0, :, :4].mean() > 0.9 and images.std() > 0.1


def test_a_model_of_noise_has_others_and_each_kind_its_reference(pipe):
    assert samplers_of(pipe) is NOISE
    for kind in (NOISE, FLOW):
        (name, steps), figures = kind.reference, {"leakage_mean": 0.1}
        rows = [{"sampler": name, "steps": steps, "success": 0.8} | figures]
        rows.append({"sampler": "another", "steps": steps, "success": 0.5} | figures)
        assert f"of the success of {name} with {steps} steps: 1 of 2 with {steps}." in markdown(rows)
