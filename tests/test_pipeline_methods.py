"""The plugin on the bundled pipeline: what it changes, and what it must not."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from diffusers_rtsae import Dictionary, list_sites
from diffusers_rtsae.pipeline import _edits

SITE = "up_blocks.1.attentions.1"
PROMPTS = ["a star", "a large blue heart on the left"]


@pytest.fixture
def feature(dictionary, latent):
    """A label of one latent, as one would write it by hand."""
    entry = {"site": SITE, "latents": [latent("white")], "weights": [0.85], "where": None}
    dictionary.labels["by hand"] = {"features": [entry], "edit": {"apply_to": "cond", "end": 0.7}}
    yield "by hand"
    del dictionary.labels["by hand"]


@pytest.mark.way(7)
def test_loaded_but_unused_is_bit_exact(pipe, dictionary, feature, draw):
    plain = draw(pipe)
    keys = list(pipe.unet.state_dict())
    pipe.load_rtsae(dictionary)
    assert np.array_equal(draw(pipe), plain)
    pipe.set_rtsae_features({feature: 0.0})
    assert np.array_equal(draw(pipe), plain)
    pipe.set_rtsae_features({feature: 1.0})
    assert not np.array_equal(draw(pipe), plain)
    assert list(pipe.unet.state_dict()) == keys
    pipe.disable_rtsae()
    assert np.array_equal(draw(pipe), plain) and pipe.get_active_rtsae() == []
    pipe.enable_rtsae()
    assert not np.array_equal(draw(pipe), plain)
    pipe.unload_rtsae()
    assert np.array_equal(draw(pipe), plain) and pipe.get_list_rtsae() == {}
    assert not pipe.unet._forward_pre_hooks


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_any_sampler_and_step_count(steered, feature, draw, scheduler, steps):
    options = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    steered.scheduler = scheduler.from_config(steered.scheduler.config, **options)
    plain = draw(steered, PROMPTS[0], steps)
    with steered.rtsae_steering({feature: 2.0}, end=1.0):  # their single step is the last one of the schedule
        once, twice = draw(steered, PROMPTS[0], steps), draw(steered, PROMPTS[0], steps)
    assert np.array_equal(once, twice) and np.isfinite(once).all()
    assert np.abs(once - plain).mean() > (1e-3 if steps > 1 else 0)


@pytest.mark.parametrize("injection", ["trajectory", "residual"])
@pytest.mark.parametrize("apply_to", ["cond", "all", "contrast"])
def test_strengths_are_per_prompt(steered, feature, draw, injection, apply_to):
    plain = draw(steered)
    with steered.rtsae_steering({feature: [0.0, 2.0]}, injection=injection, apply_to=apply_to):
        images = draw(steered)
    assert np.array_equal(images[0], plain[0]) and not np.array_equal(images[1], plain[1])


@pytest.mark.way(15)
def test_one_strength_per_prompt_serves_all_its_images(steered, feature, draw):
    plain = draw(steered, num_images_per_prompt=2)
    with steered.rtsae_steering({feature: [0.0, 2.0]}):
        images = draw(steered, num_images_per_prompt=2)
    assert np.array_equal(images[:2], plain[:2])
    assert all(not np.array_equal(a, b) for a, b in zip(images[2:], plain[2:], strict=True))


def test_without_guidance_the_whole_batch_is_conditional(steered, feature, draw):
    plain = draw(steered, guidance_scale=1.0)
    with steered.rtsae_steering({feature: [0.0, 2.0]}, apply_to="cond"):
        images = draw(steered, guidance_scale=1.0)
    assert np.array_equal(images[0], plain[0]) and not np.array_equal(images[1], plain[1])


def test_context_restores_on_exit_and_on_error(steered, feature, draw):
    plain = draw(steered)
    with pytest.raises(RuntimeError, match="stop"), steered.rtsae_steering({feature: 2.0}):
        raise RuntimeError("stop")
    assert np.array_equal(draw(steered), plain)
    steered.set_rtsae_features({feature: 1.0})
    lasting = draw(steered)
    with steered.rtsae_steering({feature: 1.0}):
        assert not np.array_equal(draw(steered), lasting)
    assert np.array_equal(draw(steered), lasting)


def test_a_zero_mask_protects_and_a_window_limits(steered, feature, draw):
    plain = draw(steered)
    with steered.rtsae_steering({feature: 2.0}, mask=np.zeros((64, 64))):
        assert np.array_equal(draw(steered), plain)
    with steered.rtsae_steering({feature: 2.0}, start=0.5):
        late = draw(steered)
    with steered.rtsae_steering({feature: 2.0}):
        always = draw(steered)
    assert not np.array_equal(late, plain) and not np.array_equal(late, always)


@pytest.mark.way(2)
def test_a_label_brings_its_options_and_the_caller_has_the_last_word(steered, dictionary):
    def edit(verified: dict, **options):
        labels = {"red": {"features": dictionary.seen("red"), "edit": verified}}
        steered.load_rtsae(Dictionary(dictionary.sites, labels), adapter_name="labelled")
        ((_, _, edit),) = (vars(one).values() for one in _edits(steered, "labelled", {"red": 1.0}, **options))
        steered.delete_rtsae("labelled")
        return edit.operation, edit.start, edit.end, edit.apply_to

    verified = {"end": 0.7, "apply_to": "cond"}
    assert edit(verified) == ("add", 0.0, 0.7, "cond")
    assert edit(verified, apply_to="all") == ("add", 0.0, 0.7, "all")
    assert edit(verified, start=0.8) == ("add", 0.8, 1.0, "cond")  # the label's window would have no room for it
    assert edit(verified, end=None) == ("add", 0.0, 0.7, "cond")
    assert edit(verified, operation="ablate") == ("ablate", 0.0, 1.0, "contrast")  # it was verified for adding
    assert edit({"operation": "set", "start": 0.5}) == ("set", 0.5, 1.0, "contrast")


def test_interrupted_run_leaves_no_trace_in_image_to_image(steered, dictionary, feature, draw):
    latents = [entry["latents"][0] for entry in dictionary.labels[feature]["features"]]
    site = dictionary.labels[feature]["features"][0]["site"]
    steered.set_rtsae_features({(site, latents[0]): 1.0}, operation="set")
    image_to_image = StableDiffusionImg2ImgPipeline(**steered.components, requires_safety_checker=False)
    image_to_image.set_progress_bar_config(disable=True)
    start = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))

    def run():
        generator = torch.Generator().manual_seed(1)
        call = {"strength": 0.5, "num_inference_steps": 10, "generator": generator, "output_type": "np"}
        return image_to_image("a star", image=start, **call).images

    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step >= 2
        return tensors

    image_to_image.set_rtsae_features({(site, latents[0]): 1.0}, operation="set")
    first = run()
    steered("a star", num_inference_steps=10, callback_on_step_end=interrupt, output_type="latent")
    steered._interrupt = False
    assert np.array_equal(run(), first)


def test_the_denoiser_can_be_copied_and_pickled_while_steered(steered, feature):
    steered.set_rtsae_features({feature: 1.0})
    sample, text = torch.randn(2, 4, 16, 16), torch.randn(2, 32, 192)
    with torch.no_grad():
        steered.reset_rtsae_state()
        expected = steered.unet(sample, 500, text).sample
        for copied in (copy.deepcopy(steered.unet), pickle.loads(pickle.dumps(steered.unet))):
            assert copied.__dict__["_rtsae_controller"] is not steered.unet.__dict__["_rtsae_controller"]
            assert torch.equal(copied(sample, 500, text).sample, expected)


def test_other_pipelines_share_the_denoiser(steered, feature, draw):
    steered.set_rtsae_features({feature: 2.0})
    expected = draw(steered)
    other = StableDiffusionPipeline(**steered.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(other), expected)
    assert other.get_list_rtsae() == steered.get_list_rtsae()


def test_several_dictionaries(pipe, dictionary, feature, draw):
    pipe.load_rtsae(dictionary, "first")
    pipe.load_rtsae(dictionary, "second")
    pipe.set_rtsae_features({feature: 1.0}, "first", clip=False)
    once = draw(pipe)
    pipe.set_rtsae_features({feature: 1.0}, "second", clip=False)
    twice = draw(pipe)
    assert not np.array_equal(once, twice)
    pipe.set_rtsae(["first"], [2.0])
    np.testing.assert_allclose(draw(pipe), twice, atol=1e-3)
    pipe.set_rtsae("second")
    assert np.array_equal(draw(pipe), once) and pipe.get_active_rtsae() == ["second"]
    pipe.delete_rtsae("second")
    assert list(pipe.get_list_rtsae()) == ["first"]


def test_a_wrong_name_deletes_nothing_and_the_last_takes_the_hooks_along(steered, feature, draw):
    plain = draw(steered)
    steered.set_rtsae_features({feature: 1.0})
    images = draw(steered)
    with pytest.raises(ValueError, match="'second'"):
        steered.delete_rtsae(["default", "second"])
    assert list(steered.get_list_rtsae()) == ["default"] and np.array_equal(draw(steered), images)
    steered.delete_rtsae(["default"])
    assert np.array_equal(draw(steered), plain) and not steered.unet._forward_pre_hooks


def test_bfloat16_steers_and_stays_finite(pipe, dictionary, feature):
    modules = {name: copy.deepcopy(getattr(pipe, name)).bfloat16() for name in ("unet", "vae", "text_encoder")}
    other = StableDiffusionPipeline(**(pipe.components | modules), requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)

    def run():
        generator = torch.Generator().manual_seed(0)
        return other("a star", num_inference_steps=3, generator=generator, output_type="latent").images

    plain = run()
    other.load_rtsae(dictionary)
    assert torch.equal(run(), plain)
    with other.rtsae_steering({feature: 2.0}):
        steered = run()
    assert steered.dtype == torch.bfloat16 and torch.isfinite(steered).all() and not torch.equal(steered, plain)


def test_schedules_and_their_adapter_weight(steered, feature, draw):
    plain = draw(steered)
    ramps = {"tensor": torch.tensor([0.0, 1.0, 2.0]), "function": lambda progress: 2 * progress}
    images = {}
    for name, ramp in ramps.items():
        with steered.rtsae_steering({feature: ramp}):
            images[name] = draw(steered)
    np.testing.assert_allclose(images["tensor"], images["function"], atol=1e-5)
    assert not np.array_equal(images["tensor"], plain)
    for ramp in ramps.values():
        steered.set_rtsae_features({feature: ramp})
        steered.set_rtsae("default", 0.5)
        halved = draw(steered)
        steered.set_rtsae("default", 1.0)
        steered.set_rtsae_features({feature: torch.tensor([0.0, 0.5, 1.0])})
        np.testing.assert_allclose(halved, draw(steered), atol=1e-5)
    steered.set_rtsae_features({feature: torch.tensor([[0.0, 1.0], [0.0, 2.0]])})
    images = draw(steered)
    assert np.array_equal(images[0], plain[0]) and not np.array_equal(images[1], plain[1])


def test_nested_edits_do_not_depend_on_their_order(steered, dictionary, draw):
    one, two = list(dictionary.labels)[:2]
    with steered.rtsae_steering({one: 1.0}), steered.rtsae_steering({two: 0.5}, start=0.3):
        inner = draw(steered)
    with steered.rtsae_steering({two: 0.5}, start=0.3), steered.rtsae_steering({one: 1.0}):
        np.testing.assert_allclose(draw(steered), inner, atol=1e-4)


@pytest.mark.parametrize("operation", ["transfer", "replace"])
def test_transfer_touches_only_tokens_that_have_the_source(steered, dictionary, draw, operation):
    one, *others = [name for name, label in dictionary.labels.items() if label["factor"] == "background"]
    plain = draw(steered)
    steered.set_rtsae_features({one: 1.0}, operation=operation, source=others, where="everywhere")
    images = draw(steered)
    report = steered.rtsae_report()
    assert not np.array_equal(images, plain)
    assert all(0 <= row["edited"] < 1 for rows in report.values() for row in rows)


def test_the_report_says_what_the_last_generation_did(steered, dictionary, feature, draw):
    entry = dictionary.labels[feature]["features"][0]
    with steered.rtsae_steering({feature: 1.0}, where="everywhere", start=0.5):
        draw(steered, steps=10)
        rows = steered.rtsae_report()[entry["site"]]
    assert {tuple(row["latents"]) for row in rows} == {tuple(entry["latents"])}
    assert all(row["timestep"] <= 500 and row["edited"] == 1.0 and 0 <= row["out_of_range"] <= 1 for row in rows)
    assert len(rows) == len({row["timestep"] for row in rows}) >= 5
    with steered.rtsae_steering({feature: 50.0}):
        draw(steered, steps=2)
        assert all(row["out_of_range"] == 1.0 for row in steered.rtsae_report()[entry["site"]])
    with steered.rtsae_steering({feature: 1.0}, clip=False, where="everywhere"):
        draw(steered, steps=2)
        assert all(row["out_of_range"] is None for row in steered.rtsae_report()[entry["site"]])


def test_the_report_says_how_large_an_edit_was_and_a_huge_one_warns_once(steered, dictionary, feature, draw):
    site = dictionary.labels[feature]["features"][0]["site"]

    def sizes(strength: float, **options) -> list[float]:
        steered.set_rtsae_features({feature: strength}, where="everywhere", start=0.0, end=1.0, **options)
        draw(steered, steps=2)
        return [row["relative_size"] for row in steered.rtsae_report()[site]]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small, double = sizes(0.5, clip=False), sizes(1.0, clip=False)
        assert max(sizes(1e9)) < 10  # kept in range
    assert 0.05 < small[0] < 2 and double[0] == pytest.approx(2 * small[0], rel=1e-3)
    with pytest.warns(UserWarning, match="times as large as the activation") as warned:
        huge = sizes(1e9, clip=False)
    assert huge[0] == pytest.approx(2e9 * small[0], rel=1e-3) and len(warned) == 1
    with pytest.warns(UserWarning, match="times as large as the activation"):
        sizes(-1e9, clip=False)


def test_numbers_of_numpy_are_numbers(steered, draw):
    site = next(iter(list_sites(steered)), None)
    assert site in list_sites(steered.unet) == list_sites(steered)
    given = {
        "index": ({7: 1.5}, {np.int64(7): np.float32(1.5)}, {7: np.array(1.5)}, {7: torch.tensor(1.5)}),
        "site": ({("up_blocks.1.attentions.1", 7): 2}, {("up_blocks.1.attentions.1", np.uint8(7)): np.int32(2)}),
        "per prompt": ({7: [0.0, 1.5]}, {7: list(np.array([0.0, 1.5]))}),
        "schedule": ({7: torch.linspace(0, 2, 5)}, {7: np.linspace(0, 2, 5)}, {7: lambda p: np.array([2 * p])}),
    }
    for name, (first, *others) in given.items():
        steered.set_rtsae_features(first)
        expected = draw(steered, steps=2)
        for other in others:
            steered.set_rtsae_features(other)
            np.testing.assert_allclose(draw(steered, steps=2), expected, atol=1e-5, err_msg=name)
    steered.set_rtsae_features({7: lambda p: np.array(p)})  # a dictionary's weight reaches what a schedule gives
    steered.set_rtsae("default", 0.5)
    half = draw(steered, steps=2)
    steered.set_rtsae("default")
    steered.set_rtsae_features({7: lambda p: 0.5 * p})
    np.testing.assert_allclose(draw(steered, steps=2), half, atol=1e-5)


def test_a_replaced_denoiser_is_noticed_until_it_is_settled(pipe, dictionary, draw):
    unet, other = pipe.unet, UNet2DConditionModel.from_config(pipe.unet.config)
    pipe = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_rtsae(dictionary)
    pipe.set_rtsae_features({7: 1.0})
    steered = draw(pipe, steps=1)
    pipe.unet = torch.compile(unet, backend="eager")  # the same one
    pipe.unet = unet
    assert np.array_equal(draw(pipe, steps=1), steered)
    pipe.unet = None
    pipe.unet = other
    for _ in range(2):
        with pytest.raises(ValueError, match="unet was replaced"):
            draw(pipe, steps=1)
    elsewhere = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    elsewhere.set_progress_bar_config(disable=True)
    plain = draw(elsewhere, steps=1)  # nothing was loaded there
    pipe.load_rtsae(dictionary)
    assert np.array_equal(draw(pipe, steps=1), plain)
    pipe.unet = unet  # which still has its own
    assert np.array_equal(draw(pipe, steps=1), steered)
    pipe.unet = copy.deepcopy(unet)
    assert np.array_equal(draw(pipe, steps=1), steered)
    elsewhere.unload_rtsae()
    pipe.unet = other
    pipe.unload_rtsae()
    assert np.array_equal(draw(pipe, steps=1), plain)
