"""Pipelines that users write: what their calls are is told by names and by what the denoiser gets, or refused."""

import concurrent.futures
import copy
from pathlib import Path

import peft
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, KandinskyPriorPipeline, StableDiffusionPipeline

from diffusers_rtsae import RTSAE, load_dictionary
from diffusers_rtsae.denoiser.callers import FAMILIES, family_of

SITE = "up_blocks.1.attentions.1"
MANY = {(SITE, i): 1.0 for i in range(40)}
EXAMPLES = Path(__file__).parents[2] / "examples"


class Custom(DiffusionPipeline):
    """Draws with a loop of its own."""

    def __init__(self, unet, scheduler, text_encoder, tokenizer):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)

    def encode(self, prompt: str) -> torch.Tensor:
        tokens = self.tokenizer(prompt, padding="max_length", max_length=32, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids)[0]

    def noise(self, steps: int = 4) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def step(self, latents: torch.Tensor, t, text: torch.Tensor) -> torch.Tensor:
        return self.scheduler.step(self.unet(latents, t, text).sample, t, latents).prev_sample

    def guide(self, x: torch.Tensor, t, texts: list[torch.Tensor], at: int) -> torch.Tensor:
        """All texts in one call; the unconditional one is at this place."""
        found = self.unet(torch.cat([x] * 2), t, torch.cat(texts)).sample
        return self.scheduler.step(found[at] + 4 * (found[1 - at] - found[at]), t, x).prev_sample


class Plain(Custom):
    @torch.no_grad()
    def __call__(self, prompt: str) -> torch.Tensor:
        text, latents = self.encode(prompt), self.noise()
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(self.unet(latents, t, text).sample, t, latents).prev_sample
        return latents


class TimeByAnotherName(Custom):
    """Whose `t` counts steps."""

    @torch.no_grad()
    def __call__(self, prompt: str) -> torch.Tensor:
        text, latents = self.encode(prompt), self.noise()
        for t in range(4):
            latents = self.step(latents, self.scheduler.timesteps[t], text)
        return latents


class TimeIsText(Custom):
    """Whose `t` is the prompt."""

    @torch.no_grad()
    def __call__(self, t: str) -> torch.Tensor:
        text, latents = self.encode(t), self.noise()
        for now in self.scheduler.timesteps:
            latents = self.scheduler.step(self.unet(latents, now, text).sample, now, latents).prev_sample
        return latents


def all_steps(pipe: Custom, latents: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    for t in pipe.scheduler.timesteps:
        latents = pipe.step(latents, t, text)
    return latents


class LoopIsAFunction(Custom):
    @torch.no_grad()
    def __call__(self, prompt: str) -> torch.Tensor:
        text, latents = self.encode(prompt), self.noise()
        return all_steps(self, latents, text)


def custom(kind: type, plain: StableDiffusionPipeline) -> Custom:
    scheduler = DDIMScheduler.from_config(plain.scheduler.config)
    return kind(plain.unet, scheduler, plain.text_encoder, plain.tokenizer)


@pytest.fixture
def made(pipe):
    """A custom pipeline on the bundled world, with its dictionary."""

    def make(kind: type) -> Custom:
        own = custom(kind, pipe)
        own.load_rtsae(load_dictionary(EXAMPLES / "shapes-rtsae"))
        return own

    return make


@pytest.mark.parametrize("kind", [TimeByAnotherName, TimeIsText, LoopIsAFunction])
def test_a_loop_written_another_way_is_steered_the_same(made, kind):
    found = []
    for one in (Plain, kind):
        pipe = made(one)
        pipe.set_rtsae_features(MANY, operation="ablate")
        found.append((pipe("a star"), pipe.rtsae_report()[SITE]))
        pipe.unload_rtsae()
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-6, rtol=1e-6)
    assert found[1][1] == found[0][1] and {row["timestep"] for row in found[0][1]} == {751.0, 501.0, 251.0, 1.0}


def loop(order: str, negative: str, positive: str) -> type:
    """A pipeline that guides, with these names for its texts: in one call, or in one for each text."""
    code = [
        "def __call__(self, prompt):",
        f"    {negative}, {positive} = self.encode(''), self.encode(prompt)",
        "    x = self.noise(2)",
        "    for t in self.scheduler.timesteps:",
    ]
    if order == "calls":
        code += [
            f"        away = self.unet(x, t, {negative}).sample",
            f"        x = self.scheduler.step(4 * self.unet(x, t, {positive}).sample - 3 * away, t, x).prev_sample",
        ]
    else:
        texts = [negative, positive] if order == "uncond cond" else [positive, negative]
        code += [f"        x = self.guide(x, t, [{', '.join(texts)}], {texts.index(negative)})"]
    space = {}
    exec("\n".join([*code, "    return x"]), space)
    return type("Guiding", (Custom,), {"__call__": torch.no_grad()(space["__call__"])})


def moved_rows(pipe: Custom) -> list[list[bool]]:
    """Which rows of each call the edits move at their site."""
    found, module = [], pipe.unet.get_submodule(SITE)
    first = module.register_forward_hook(lambda _, __, output: found.append([output[0]]), prepend=True)
    last = module.register_forward_hook(lambda _, __, output: found[-1].append(output[0]))
    try:
        pipe("a star")
    finally:
        first.remove()
        last.remove()
    return [[bool((after[i] != before[i]).any()) for i in range(len(after))] for before, after in found]


NAMES = [
    ("prompt_embeds_uncond", "prompt_embeds"), ("uncond_embeds", "embeds"), ("negative", "positive"), ("uncond", "c"),
]  # fmt: skip


@pytest.mark.parametrize("negative, positive", NAMES)
@pytest.mark.parametrize("order", ["uncond cond", "cond uncond", "calls"])
def test_the_negative_text_is_told_by_its_name(made, order, negative, positive):
    pipe = made(loop(order, negative, positive))
    pipe.set_rtsae_features({"red": 1.0}, apply_to="cond")
    once = {"uncond cond": [[False, True]], "cond uncond": [[True, False]], "calls": [[False], [True]]}[order]
    assert moved_rows(pipe) == once * 2


@pytest.mark.parametrize("order", ["uncond cond", "cond uncond", "calls"])
def test_texts_that_no_name_tells_apart_are_refused(made, order):
    pipe = made(loop(order, "first", "second"))
    pipe.set_rtsae_features({"red": 1.0})
    with pytest.raises(ValueError, match="does not say which text is the negative one"):
        pipe("a star")


class Editing(StableDiffusionPipeline):
    """Draws twice in one call."""

    def __call__(self, prompt: str, **call):
        first = super().__call__(prompt, **call)
        return first, super().__call__(prompt, **call)


def test_a_subclass_that_draws_twice_is_steered_alike_both_times(pipe):
    own = Editing(**pipe.components, requires_safety_checker=False)
    own.load_rtsae(load_dictionary(EXAMPLES / "shapes-rtsae"))
    own.set_rtsae_features(MANY, operation="ablate")
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    first, second = own("a star", latents=latents, num_inference_steps=4, output_type="latent")
    assert torch.equal(first.images, second.images)


class WithoutConfig:
    """A sampler that is no diffusers class."""

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def __getattr__(self, name):
        if name in ("scheduler", "config"):
            raise AttributeError(name)
        return getattr(self.scheduler, name)


def test_a_sampler_that_does_not_say_its_unit_of_time_is_refused(made):
    pipe = made(Plain)
    pipe.set_rtsae_features({"red": 1.0})
    pipe.scheduler = WithoutConfig(pipe.scheduler)
    with pytest.raises(ValueError, match="WithoutConfig does not say how many training steps there are"):
        pipe("a star")


@pytest.mark.parametrize("by_name", [False, True])
def test_a_denoiser_wrapped_by_peft_is_told_its_time(pipe, by_name):
    wrapped = peft.get_peft_model(copy.deepcopy(pipe.unet), peft.LoraConfig(r=2, target_modules=["to_q"]))
    own, site = custom(Plain, pipe), f"base_model.model.{SITE}"
    own.unet = wrapped
    own.load_rtsae({site: RTSAE(site, 160, [961, 481, 1], 8, 2)})
    own.set_rtsae_features({(site, 0): 1.0}, clip=False, start=0.0, end=0.5)
    text = torch.zeros(1, 32, 192)
    for time in (900, 300):
        with torch.no_grad():
            if by_name:
                wrapped(torch.zeros(1, 4, 16, 16), timestep=time, encoder_hidden_states=text)
            else:
                wrapped(torch.zeros(1, 4, 16, 16), time, text)
    assert [row["timestep"] for row in own.rtsae_report()[site]] == [900.0]
    own("a star")
    assert [row["timestep"] for row in own.rtsae_report()[site]] == [751.0, 501.0]


def test_a_subclass_is_called_as_its_class_is():
    mine = type("MyPrior", (KandinskyPriorPipeline,), {})
    assert family_of(mine) is family_of(KandinskyPriorPipeline) is not FAMILIES[-1]


def test_loops_of_tasks_and_threads_without_a_pipeline_do_not_share_a_memory(made):
    pipe = made(Plain)

    def draw(seed: int, steps=(951, 700, 450, 200, 1)):
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        text = torch.randn(1, 32, 192, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad(), pipe.rtsae_steering(MANY, operation="ablate"):
            for t in steps:
                x = x - 0.2 * pipe.unet(x, t, text).sample
                yield x

    def last(steps) -> torch.Tensor:
        pipe.reset_rtsae_state()
        return [*steps][-1]

    alone = [last(draw(seed)) for seed in (1, 2)]
    pipe.reset_rtsae_state()
    loops, found = [draw(seed) for seed in (1, 2)], [None, None]
    threads = [concurrent.futures.ThreadPoolExecutor(1) for _ in loops]
    for _ in range(5):  # in turns, each in a thread of its own
        found = [thread.submit(next, one).result() for thread, one in zip(threads, loops, strict=True)]
    for thread, one in zip(threads, loops, strict=True):
        thread.submit(one.close).result()
        thread.shutdown()
    assert all(map(torch.equal, found, alone))


def test_a_copy_of_a_pipeline_has_the_features_of_its_original(pipe):
    made = pipe.load_rtsae(load_dictionary(EXAMPLES / "shapes-rtsae")) or pipe
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    made.set_rtsae_features({"red": 1.0})
    other.set_rtsae_features({"blue": 1.0})

    def draw(own):
        own.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return own("a star", num_inference_steps=2, output_type="latent", generator=generator).images

    assert torch.equal(draw(copy.deepcopy(made)), draw(made)) and not torch.equal(draw(other), draw(made))


def test_time_told_as_a_share_of_noise_is_in_training_units_without_a_pipeline(made):
    pipe = made(Plain)
    pipe.set_rtsae_features({"red": 1.0}, start=0.0, end=0.5)
    for t in (1.0, 0.9, 0.2):
        with torch.no_grad():
            pipe.unet(torch.zeros(1, 4, 16, 16), torch.tensor(t), torch.zeros(1, 32, 192))
    assert [row["timestep"] for row in pipe.rtsae_report()[SITE]] == pytest.approx([1000, 900])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_of_several_passes_are_those_without_checkpointing(made, reentrant):
    pipe = made(Plain)
    pipe.set_rtsae_features(MANY, operation="ablate")

    def gradient() -> torch.Tensor:
        pipe.reset_rtsae_state()
        latents = torch.ones(1, 4, 16, 16).requires_grad_()
        text = torch.ones(1, 32, 192)
        losses = [pipe.unet(latents * (i + 1), t, text).sample.square().sum() for i, t in enumerate((100, 900))]
        for loss in losses:
            loss.backward()
        return latents.grad

    expected = gradient()
    pipe.unet.train().enable_gradient_checkpointing(
        lambda function, *args: torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=reentrant)
    )
    torch.testing.assert_close(gradient(), expected, atol=1e-5, rtol=1e-4)
    x = torch.ones(1, 4, 16, 16).requires_grad_()
    whole = torch.utils.checkpoint.checkpoint(
        lambda x: pipe.unet(x, 500, torch.ones(1, 32, 192)).sample, x, use_reentrant=reentrant
    )
    with pytest.raises(ValueError, match="have its blocks checkpointed"):
        whole.sum().backward()
    pipe.unet.disable_gradient_checkpointing()
    pipe.unet.eval().zero_grad()  # others use it too
