"""State that belongs to somebody: threads, tasks, pipelines, running generations, gradients that run sites again."""

import asyncio
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from diffusers_rtsae import Dictionary
from diffusers_rtsae.steering import past

SITE = "up_blocks.1.attentions.1"
STEPS = 6


@pytest.fixture
def request_of(steered):
    """A picture by a pipeline of a request's own, which shares the denoiser."""
    tokenizing = threading.Lock()  # a fast tokenizer must not be used by several threads at once

    def generate(features=None, pipe=None):
        pipe = pipe or StableDiffusionPipeline(**steered.components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = DDIMScheduler.from_config(steered.scheduler.config)
        with tokenizing, torch.no_grad():
            text, negative = pipe.encode_prompt("a star", "cpu", 1, True, "")
        call = {"prompt_embeds": text, "negative_prompt_embeds": negative, "num_inference_steps": STEPS}
        generator = torch.Generator().manual_seed(0)

        def draw():
            return pipe(**call, generator=generator, output_type="np", guidance_scale=4.0).images

        if features is None:
            return draw()
        with pipe.rtsae_steering(features):
            return draw()

    return generate


def together(*jobs) -> list:
    """What jobs return that run in a thread each."""
    found = [None] * len(jobs)

    def run(i):
        found[i] = jobs[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.way(15)
def test_threads_that_share_a_denoiser_steer_themselves_alone(steered, request_of):
    wishes = [{"red": 1.0}, {"blue": 1.0}, None]
    alone = [request_of(wish) for wish in wishes]
    assert not np.array_equal(alone[0], alone[1]) and not np.array_equal(alone[1], alone[2])
    for found, expected in zip(together(*(lambda w=wish: request_of(w) for wish in wishes)), alone, strict=True):
        assert np.array_equal(found, expected)


def test_tasks_that_share_a_thread_steer_themselves_alone(steered, request_of):
    """Each task enters its block before any of them draws."""
    wishes, entered = [{"red": 1.0}, {"blue": 1.0}, None], []
    alone = [request_of(wish) for wish in wishes]

    async def serve(wish):
        if wish is None:
            while len(entered) < 2:
                await asyncio.sleep(0)
            return request_of()
        with steered.rtsae_steering(wish):
            entered.append(wish)
            while len(entered) < 2:
                await asyncio.sleep(0)
            return await asyncio.to_thread(request_of)

    async def all_of_them():
        return await asyncio.gather(*map(serve, wishes))

    for found, expected in zip(asyncio.run(all_of_them()), alone, strict=True):
        assert np.array_equal(found, expected)


def test_features_belong_to_the_pipeline_they_were_set_on(steered, request_of):
    other = StableDiffusionPipeline(**steered.components, requires_safety_checker=False)
    third = StableDiffusionImg2ImgPipeline(**steered.components, requires_safety_checker=False)
    red, blue = request_of({"red": 1.0}), request_of({"blue": 1.0})
    steered.set_rtsae_features({"red": 1.0})
    other.set_rtsae_features({"blue": 1.0})
    assert np.array_equal(request_of(pipe=steered), red) and np.array_equal(request_of(pipe=other), blue)
    assert third.get_active_rtsae() == ["default"]  # on which nothing was set: it follows the last one
    assert np.array_equal(request_of(), blue)
    other.set_rtsae_features({})
    assert np.array_equal(request_of(pipe=steered), red)


ABLATED = {(SITE, i): 1.0 for i in range(40)}


def in_mid_run(steered, act) -> tuple[np.ndarray, int]:
    """A picture, and how many steps the report tells of, where `act` is done after the third step."""

    def between(pipe, step, timestep, kwargs):
        if step == 2:
            act()
        return kwargs

    generator = torch.Generator().manual_seed(0)
    image = steered("a star", num_inference_steps=STEPS, generator=generator, output_type="np",
                    callback_on_step_end=between).images  # fmt: skip
    return image, len({row["timestep"] for row in steered.rtsae_report()[SITE]})


def nested(steered):
    inner = StableDiffusionPipeline(**steered.components, requires_safety_checker=False)
    inner.scheduler = DDIMScheduler.from_config(steered.scheduler.config)  # one scheduler cannot run two at once
    with torch.no_grad():
        inner("a blue heart", num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(9))


def another_adapter(steered, dictionary):
    steered.load_rtsae(Dictionary(dictionary.sites, {}), adapter_name="another")
    steered.set_rtsae_features({(SITE, 3): 0.0}, adapter_name="another")


def empty_block(steered):
    with steered.rtsae_steering({}, adapter_name="default"):
        pass


HARMLESS = {
    "the same again": lambda pipe, _: pipe.set_rtsae_features(ABLATED, "default", operation="ablate"),
    "another adapter": another_adapter,
    "an empty block": lambda pipe, _: empty_block(pipe),
    "enable": lambda pipe, _: pipe.enable_rtsae(),
    "set_rtsae": lambda pipe, _: pipe.set_rtsae("default", 1.0),
    "device": lambda pipe, _: pipe.set_rtsae_device("cpu", "default"),
    "a nested generation": lambda pipe, _: nested(pipe),
    "another thread": lambda pipe, _: together(lambda: pipe.set_rtsae_features(ABLATED, operation="ablate")),
}


@pytest.mark.parametrize("what", HARMLESS)
def test_what_changes_no_edit_changes_no_running_generation(steered, dictionary, what):
    steered.scheduler = DDIMScheduler.from_config(steered.scheduler.config)
    steered.set_rtsae_features(ABLATED, operation="ablate")
    expected, steps = in_mid_run(steered, lambda: None)
    found, told = in_mid_run(steered, lambda: HARMLESS[what](steered, dictionary))
    assert np.array_equal(found, expected) and told == steps == STEPS


def test_what_was_read_before_is_known_to_other_edits(steered):
    """Latents that are ablated from the fourth step on are read as if they had been from the first."""
    steered.scheduler = DDIMScheduler.from_config(steered.scheduler.config)
    later = {(SITE, i): 1.0 for i in range(20, 60)}
    steered.set_rtsae_features({(SITE, 0): 1.0}, operation="clamp", start=0.99, end=1.0)  # reads, and does nothing
    found, _ = in_mid_run(steered, lambda: steered.set_rtsae_features(later, operation="ablate"))
    # DDIM's steps are equally far apart: the window opens after the third
    steered.set_rtsae_features(later, operation="ablate", start=0.55)
    expected, _ = in_mid_run(steered, lambda: None)
    assert np.abs(found - expected).max() < 1e-4


def test_gradients_through_sites_that_are_run_again(steered):
    steered.set_rtsae_features(ABLATED, operation="ablate", apply_to="cond")
    unet, text = steered.unet, torch.randn(1, 32, 192, generator=torch.Generator().manual_seed(1))

    def gradient(checkpointing: bool) -> torch.Tensor:
        unet.enable_gradient_checkpointing() if checkpointing else unet.disable_gradient_checkpointing()
        unet.train(checkpointing)
        steered.reset_rtsae_state()
        start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        sample = start
        for t in (900, 500, 100):
            sample = sample - 0.3 * unet(sample, t, text).sample
        return torch.autograd.grad(sample.square().sum(), start)[0]

    try:
        plain, again = gradient(False), gradient(True)
    finally:
        unet.disable_gradient_checkpointing()
        unet.eval()
    torch.testing.assert_close(again, plain, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("state", ["loaded", "set", "drawn", "disabled", "unloaded"])
def test_a_dropped_denoiser_is_freed_at_once(dictionary, state):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**_config())
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.load_rtsae(dictionary)
    if state != "loaded":
        pipe.set_rtsae_features({(SITE, 3): 1.0}, operation="ablate")
    if state == "drawn":
        with torch.no_grad():
            unet(torch.randn(1, 4, 16, 16), 500, torch.randn(1, 8, 192))
    if state == "disabled":
        pipe.disable_rtsae()
    if state == "unloaded":
        pipe.unload_rtsae()
    gone = weakref.ref(unet)
    gc.collect()
    gc.disable()
    try:
        del pipe, unet
        assert gone() is None
    finally:
        gc.enable()


def _config() -> dict:
    from pathlib import Path

    from diffusers import UNet2DConditionModel

    folder = Path(__file__).parents[2] / "examples/shapes-sd/unet"
    return {k: v for k, v in UNet2DConditionModel.load_config(folder).items() if not k.startswith("_")}


def test_an_exchanged_module_is_edited_too(steered):
    """As peft does, a linear site is replaced by a wrapper, and put back."""
    site = "up_blocks.1.attentions.1.proj_out"
    from diffusers_rtsae import RTSAE
    from diffusers_rtsae.denoiser import get_site

    width = get_site(steered.unet, site).out_channels
    steered.unload_rtsae()
    made = RTSAE(site, width, [961, 481, 1], 8, 2)
    made.typical_activation.fill_(20.0)
    steered.load_rtsae({site: made})
    steered.set_rtsae_features({0: 1.0}, clip=False)
    parent, original = get_site(steered.unet, site.rpartition(".")[0]), get_site(steered.unet, site)

    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    def draw():
        generator = torch.Generator().manual_seed(0)
        return steered("a star", num_inference_steps=2, generator=generator, output_type="np").images

    expected = draw()
    parent.proj_out = Wrapper(original)
    assert np.array_equal(draw(), expected)
    parent.proj_out = original
    assert np.array_equal(draw(), expected)
    assert len(steered.rtsae_report()[site]) > 0


def test_blocks_that_are_compiled_by_assignment_are_sites(steered):
    from diffusers_rtsae import list_sites

    sites = list_sites(steered)
    attentions = steered.unet.up_blocks[1].attentions
    plain = attentions[1]
    expected = steered("a star", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
    attentions[1] = torch.compile(plain, backend="eager")
    try:
        assert list_sites(steered) == sites
        steered.set_rtsae_features({(SITE, 3): 1.0}, clip=False)
        found = steered("a star", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
    finally:
        attentions[1] = plain
    wanted = steered("a star", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
    np.testing.assert_allclose(found.images, wanted.images, atol=1e-3)
    assert not np.array_equal(expected.images, wanted.images)


@torch.no_grad()
def latents_read(pipe, timestep: float, draw) -> torch.Tensor:
    """The codes that an edit reads at a step of a generation, `(images, tokens, latents)`."""
    found, rows = {}, list(range(256))
    pipe.set_rtsae_features({(SITE, i): 1.0 for i in rows}, operation="clamp", apply_to="cond")
    from diffusers_rtsae.models.rtsae import PrefixReader

    read = PrefixReader.read

    def reading(reader, memory, tokens, step):
        codes = read(reader, memory, tokens, step)
        found.setdefault(round(step.timestep), codes)
        return codes

    PrefixReader.read = reading
    try:
        draw()
    finally:
        PrefixReader.read = read
        pipe.set_rtsae_features({})
    return found[timestep]


@pytest.mark.parametrize("start", [0.6, 0.4, 0.2])
@pytest.mark.parametrize("given", [True, False], ids=["a picture is given", "nothing is given"])
def test_what_is_read_from_the_middle_is_what_is_read_from_the_beginning(steered, monkeypatch, given, start):
    """Clean latents are given, and the noise of a generation from the start and of one from the middle is the same."""
    if not given:  # as in a refiner: its own prediction must do
        monkeypatch.setattr(past, "given_picture", lambda call, sample: None)
    steered.scheduler = DDIMScheduler.from_config(steered.scheduler.config)
    image_to_image = StableDiffusionImg2ImgPipeline(**steered.components, requires_safety_checker=False)
    image_to_image.set_progress_bar_config(disable=True)
    prompts = ["a red star", "a large blue heart on the left", "a small green circle"]
    call = {"num_inference_steps": 10, "output_type": "latent", "guidance_scale": 3.0}
    clean = steered(prompts, generator=[torch.Generator().manual_seed(i) for i in range(3)], **call).images

    def draw(strength):
        generators = [torch.Generator().manual_seed(9 + i) for i in range(3)]
        return image_to_image(prompts, image=clean, strength=strength, generator=generators, **call)

    timestep = int(steered.scheduler.timesteps[round(10 * (1 - start))])
    middle = latents_read(steered, timestep, lambda: draw(start))
    # the beginning: the anchors that came before, noised with the same noise, are the steps of a run of its own
    alphas, anchors = steered.scheduler.alphas_cumprod, [961, 481, 1]
    noise = torch.cat(
        [torch.randn(1, *clean.shape[1:], generator=torch.Generator().manual_seed(9 + i)) for i in range(3)]
    )
    text, _ = steered.encode_prompt(prompts, "cpu", 1, False)

    def from_the_beginning():
        steered.reset_rtsae_state()
        for t in [*(anchor for anchor in anchors if anchor > timestep), timestep]:
            noisy = alphas[t].sqrt() * clean + (1 - alphas[t]).sqrt() * noise
            steered.unet(noisy, torch.tensor(t), encoder_hidden_states=text)

    whole = latents_read(steered, timestep, from_the_beginning)
    agreement = torch.cosine_similarity(middle.flatten(1), whole.flatten(1))
    print(f"{timestep} {given} {agreement.tolist()}")
    assert agreement.min() > 0.98 if given else agreement.mean() > 0.8


def test_the_past_is_that_of_its_own_thread(steered, request_of):
    """Another thread draws a whole picture while the denoiser is asked what was before the first step."""
    alone, done = {(SITE, i): 1.0 for i in range(8)}, []
    image_to_image = StableDiffusionImg2ImgPipeline(**steered.components, requires_safety_checker=False)
    image_to_image.scheduler = DDIMScheduler.from_config(steered.scheduler.config)
    image_to_image.set_progress_bar_config(disable=True)
    with torch.no_grad():
        text, negative = steered.encode_prompt("a star", "cpu", 1, True, "")

    def draw():
        generator = torch.Generator().manual_seed(0)
        with steered.rtsae_steering(alone, operation="ablate"):
            return image_to_image(
                prompt_embeds=text, negative_prompt_embeds=negative, image=torch.zeros(1, 3, 64, 64), strength=0.5,
                num_inference_steps=4, generator=generator, output_type="np",
            ).images  # fmt: skip

    expected, mine = draw(), threading.current_thread()

    def in_between(*_):
        if threading.current_thread() is mine and not done:
            done.append(steered.unet._forward_pre_hooks.copy())
            together(request_of)

    hook = steered.unet.conv_out.register_forward_hook(in_between)
    found = draw()
    hook.remove()
    assert len(done[0]) == 2  # ours, and that which asks for the past
    assert np.array_equal(found, expected)


def test_a_past_that_cannot_be_made_up_is_told_once(steered):
    steered.scheduler = DDIMScheduler.from_config(steered.scheduler.config)
    image_to_image = StableDiffusionImg2ImgPipeline(**steered.components, requires_safety_checker=False)
    image_to_image.set_progress_bar_config(disable=True)
    steered.set_rtsae_features({(SITE, 3): 1.0}, operation="ablate")
    steered.unet.is_cache_enabled = True
    try:
        with pytest.warns(UserWarning, match=r"begins at t = .*, after the anchors \[961, 481\].*a block cache"):
            image_to_image("a star", image=torch.rand(1, 3, 64, 64), strength=0.6, num_inference_steps=4)
    finally:
        del steered.unet.is_cache_enabled


def test_setting_features_forgets_what_generations_did_that_are_over(steered, draw):
    def change(pipe, i, t, inputs):
        pipe.set_rtsae_features({"red": 1.0})
        return inputs

    steered.set_rtsae_features({"red": 1.0})
    draw(steered, ["a star"], 3, 0, callback_on_step_end=change)
    assert len(steered.rtsae_report()[SITE]) == 3
    steered.set_rtsae_features({"red": 0.0})
    draw(steered, ["a star"], 2, 0)
    assert steered.rtsae_report() == {}
    for strength, steps in ((1.0, 2), (0.0, 0)):
        with steered.rtsae_steering({"red": strength}):
            draw(steered, ["a star"], 2, 0)
        assert len(steered.rtsae_report().get(SITE, [])) == steps


def test_the_report_of_calls_without_end_keeps_the_last(pipe, dictionary, monkeypatch):
    """Nobody says that a generation is over where no pipeline calls."""
    monkeypatch.setattr("diffusers_rtsae.steering.run._REPORTED", 5)
    pipe.load_rtsae(dictionary)
    pipe.set_rtsae_features({(SITE, 5): 1.0}, apply_to="cond")
    with torch.no_grad():
        for t in range(900, 100, -100):
            pipe.unet(torch.zeros(1, 4, 16, 16), t, torch.zeros(1, 32, 192))
    (rows,) = pipe.rtsae_report().values()
    assert [row["timestep"] for row in rows] == [600, 500, 400, 300, 200]
