"""The ways people run diffusers: precision, memory layout, offloading, compilation, adapters, threads."""

import copy
import pickle
import threading
from pathlib import Path

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.hooks import apply_group_offloading
from kinds import OTHERS, random_dictionary
from packaging.version import Version
from small_analysis import find_less

from diffusers_rtsae import load_dictionary
from diffusers_rtsae.analysis.effect import frozen
from diffusers_rtsae.analysis.find import find_features

EXAMPLES = Path(__file__).parents[1] / "examples"

SITE = "up_blocks.1.attentions.1"
PROMPTS = ["a star", "a large blue heart on the left"]


@pytest.fixture
def fresh():
    """A pipeline of its own, for what cannot be undone."""
    pipe = StableDiffusionPipeline.from_pretrained(EXAMPLES / "shapes-sd")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=OTHERS)
def of_kind(request, draw):
    """A dictionary of another kind, plain pictures, and those that it steers."""
    sae = random_dictionary(request.param, SITE, 160, [961, 481, 1], 32, 4)
    sae.typical_activation.fill_(30.0)
    pipe = StableDiffusionPipeline.from_pretrained(EXAMPLES / "shapes-sd")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe, steps=3)
    pipe.load_rtsae({SITE: sae})
    pipe.set_rtsae_features({3: [0.0, 1.0]})
    return sae, plain, draw(pipe, steps=3)


@pytest.fixture(scope="module")
def reference(draw):
    """Plain pictures, and those with latent 3 added and latent 5 ablated."""
    pipe = StableDiffusionPipeline.from_pretrained(EXAMPLES / "shapes-sd")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe, steps=3)
    pipe.load_rtsae(EXAMPLES / "shapes-rtsae")
    steer(pipe)
    return plain, draw(pipe, steps=3)


def steer(pipe, strength=1.0):
    pipe.set_rtsae_features({(SITE, 3): [0.0, strength]})


def compile_denoiser(pipe, how: str, **options):
    torch.compiler.reset()
    if how == "wrapped":
        pipe.unet = torch.compile(pipe.unet, **options)
    elif how == "in place":
        pipe.unet.compile(**options)
    else:
        pipe.unet.compile_repeated_blocks(**options)


MODES = {
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "fused projections": lambda pipe: pipe.fuse_qkv_projections(vae=False),
    "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    "model offload": lambda pipe: accelerate.cpu_offload_with_hook(pipe.unet, "cpu"),
    "sequential offload": lambda pipe: accelerate.cpu_offload(pipe.unet, "cpu"),
    "group offload": lambda pipe: apply_group_offloading(
        pipe.unet, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    ),
    "vae slicing": lambda pipe: pipe.vae.enable_slicing(),
    "FreeU": lambda pipe: pipe.enable_freeu(s1=1.0, s2=1.0, b1=1.0, b2=1.0),
}


@pytest.mark.way(1)
@pytest.mark.way(13)
@pytest.mark.parametrize("order", ["before loading", "after loading"])
@pytest.mark.parametrize("mode", MODES)
def test_modes_that_do_not_change_the_pictures(fresh, dictionary, draw, reference, mode, order):
    if mode == "group offload" and Version(diffusers.__version__) < Version("0.41"):
        if torch.accelerator.current_accelerator() is None:
            pytest.skip("diffusers 0.40 offloads groups only where there is an accelerator")
    plain, steered = reference
    if order == "before loading":
        MODES[mode](fresh)
    fresh.load_rtsae(dictionary)
    if order == "after loading":
        MODES[mode](fresh)
    np.testing.assert_allclose(draw(fresh, steps=3), plain, atol=2e-3)
    steer(fresh)
    for _ in range(2):  # some hooks are lost after the first generation
        np.testing.assert_allclose(draw(fresh, steps=3), steered, atol=2e-3)
    fresh.unload_rtsae()
    np.testing.assert_allclose(draw(fresh, steps=3), plain, atol=2e-3)


@pytest.mark.way(11)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16])
def test_half_precision_steers_as_float32_does(fresh, dictionary, draw, reference, dtype):
    fresh.to(dtype)
    plain = draw(fresh, steps=3)
    fresh.load_rtsae(dictionary)
    assert np.array_equal(draw(fresh, steps=3), plain)
    steer(fresh)
    images = draw(fresh, steps=3)
    assert np.array_equal(images[0], plain[0]) and np.isfinite(images).all()
    moved, expected = (images[1] - plain[1]).ravel(), (reference[1][1] - reference[0][1]).ravel()
    assert np.dot(moved, expected) / (np.linalg.norm(moved) * np.linalg.norm(expected)) > 0.9


def test_layerwise_casting(fresh, dictionary, draw, reference):
    fresh.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    plain = draw(fresh, steps=3)
    fresh.load_rtsae(dictionary)
    steer(fresh)
    images = draw(fresh, steps=3)
    assert np.array_equal(images[0], plain[0]) and not np.array_equal(images[1], plain[1])
    np.testing.assert_allclose(images[1] - plain[1], reference[1][1] - reference[0][1], atol=0.25)
    with pytest.raises(ValueError, match="layerwise casting, whose weights are in another precision"), frozen(fresh):
        pass


class _RowScaled(torch.Tensor):
    """A weight in whole numbers and a scale for each row, in the way of quantization by hand."""

    @staticmethod
    def __new__(cls, weight: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)

    def __init__(self, weight: torch.Tensor):
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.whole = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            args = [a.whole.float() * a.scale if isinstance(a, cls) else a for a in args]
            return function(*args, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return cls(function(args[0].whole.float() * args[0].scale, *args[1:], **(kwargs or {})))


def test_weights_quantized_by_hand_give_gradients(fresh, dictionary, monkeypatch):
    """As torchao and quanto leave them: whole numbers, that nothing in the denoiser's configuration tells of."""
    find_less(monkeypatch)
    call = {"count": 3, "num_inference_steps": 2, "guidance_scale": 3.0}
    fresh.load_rtsae(dictionary)
    plain = find_features(fresh, ["a red star"], ["a blue star"], **call)
    for module in fresh.unet.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(_RowScaled(module.weight.detach()), requires_grad=False)
    fresh.unet.is_quantized = True
    rough = find_features(fresh, ["a red star"], ["a blue star"], **call)
    assert rough[0].index == plain[0].index and rough[0].slope == pytest.approx(plain[0].slope, rel=0.1)


@pytest.mark.way(14)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow_at_absurd_strengths(fresh, dictionary, draw, dtype):
    fresh.to(dtype)
    fresh.load_rtsae(dictionary)
    for strength in (1e6, -1e6):
        fresh.set_rtsae_features({(SITE, 3): strength, (SITE, 5): strength})
        assert np.isfinite(draw(fresh, steps=1)).all()


@pytest.mark.way(11)
def test_from_pipe_in_another_precision(fresh, dictionary, draw):
    fresh.to(torch.bfloat16)
    fresh.load_rtsae(dictionary)
    steer(fresh)
    other = StableDiffusionPipeline.from_pipe(fresh, torch_dtype=torch.float32, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    images = draw(other, steps=3)
    assert np.isfinite(images).all()
    other.set_rtsae_features({(SITE, 3): 0.0})
    assert not np.array_equal(draw(other, steps=3)[1], images[1])


@pytest.mark.way(9)
@pytest.mark.parametrize("how", [pytest.param("wrapped", marks=pytest.mark.slow), "in place", "blocks"])
def test_compiled_denoisers(fresh, dictionary, draw, reference, how):
    """The compiler's own passes are left out (`backend="eager"`): what is tested is what it traces."""
    plain, steered = reference
    compile_denoiser(fresh, how, backend="eager")
    draw(fresh, steps=2)  # compiled before anything is loaded
    fresh.load_rtsae(dictionary)
    np.testing.assert_allclose(draw(fresh, steps=3), plain, atol=1e-3)
    steer(fresh)
    np.testing.assert_allclose(draw(fresh, steps=3), steered, atol=1e-3)
    fresh.unload_rtsae()
    np.testing.assert_allclose(draw(fresh, steps=3), plain, atol=1e-3)


@pytest.mark.parametrize("mode", ["sequential offload", "half precision"])
def test_every_kind_runs_in_every_mode(fresh, of_kind, draw, mode):
    sae, plain, steered = of_kind
    if mode == "half precision":
        fresh.to(dtype=torch.bfloat16)
    else:
        MODES[mode](fresh)
    fresh.load_rtsae({SITE: sae})
    before = draw(fresh, steps=3)
    fresh.set_rtsae_features({3: [0.0, 1.0]})
    after = draw(fresh, steps=3)
    assert np.array_equal(after[0], before[0])
    if mode == "half precision":
        change, wanted = (after - before)[1].astype(np.float32), (steered - plain)[1]
        assert np.isfinite(after).all() and np.corrcoef(change.ravel(), wanted.ravel())[0, 1] > 0.8
    else:
        np.testing.assert_allclose(before, plain, atol=1e-3)
        np.testing.assert_allclose(after, steered, atol=1e-3)
    assert np.abs(steered - plain)[1].max() > 0.05


@pytest.mark.slow
def test_every_kind_runs_compiled(fresh, of_kind, draw):
    sae, plain, steered = of_kind
    compile_denoiser(fresh, "in place", backend="eager")
    fresh.load_rtsae({SITE: sae})
    np.testing.assert_allclose(draw(fresh, steps=3), plain, atol=1e-3)
    fresh.set_rtsae_features({3: [0.0, 1.0]})
    np.testing.assert_allclose(draw(fresh, steps=3), steered, atol=1e-3)


@pytest.mark.way(10)
@pytest.mark.parametrize("how", ["wrapped", pytest.param("in place", marks=pytest.mark.slow)])
def test_one_graph_serves_all_steps_and_strengths(fresh, dictionary, draw, how):
    counter = torch._dynamo.testing.CompileCounter()
    compile_denoiser(fresh, how, backend=counter)
    fresh.load_rtsae(dictionary)
    images = []
    for strength in (0.5, 1.0, 2.0):
        fresh.set_rtsae_features({(SITE, 3): strength}, operation="set")
        images.append(draw(fresh, steps=4))
    assert counter.frame_count <= 2
    assert not np.array_equal(images[0], images[1]) and not np.array_equal(images[1], images[2])


@pytest.mark.way(12)
def test_lora_before_and_after(fresh, dictionary, draw, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights="gaussian")
    fresh.load_rtsae(dictionary)
    steer(fresh)
    before = draw(fresh, steps=3)
    fresh.unet.add_adapter(config)
    for name, parameter in fresh.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 0.02)
    with_lora = draw(fresh, steps=3)
    assert not np.array_equal(with_lora, before)
    fresh.unload_rtsae()
    plain = draw(fresh, steps=3)
    assert np.array_equal(with_lora[0], plain[0]) and not np.array_equal(with_lora[1], plain[1])
    fresh.load_rtsae(dictionary)  # after the LoRA
    steer(fresh)
    assert np.array_equal(draw(fresh, steps=3), with_lora)
    fresh.unload_lora_weights()
    np.testing.assert_allclose(draw(fresh, steps=3), before, atol=1e-5)


def ip_adapter_weights(unet, width: int = 16) -> dict:
    """Random weights of an IP-Adapter that fit a U-Net."""
    generator, cross = torch.Generator().manual_seed(0), unet.config.cross_attention_dim
    weights, index = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for part in ("to_k_ip", "to_v_ip"):
                weights[f"{index}.{part}.weight"] = torch.randn(hidden, cross, generator=generator) * 0.1
            index += 2
    projection = {
        "proj.weight": torch.randn(4 * cross, width, generator=generator) * 0.1, "proj.bias": torch.zeros(4 * cross),
        "norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross),
    }  # fmt: skip
    return {"image_proj": projection, "ip_adapter": weights}


@pytest.mark.way(13)
def test_ip_adapter_before_and_after(fresh, dictionary, draw):
    without = draw(fresh, steps=3)
    fresh.load_rtsae(dictionary)
    steer(fresh)
    fresh.unet._load_ip_adapter_weights([ip_adapter_weights(fresh.unet)])
    embeds = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(1))  # unconditional, conditional
    call = {"steps": 3, "ip_adapter_image_embeds": [embeds.repeat_interleave(2, 0)]}
    steered = draw(fresh, **call)
    fresh.unload_rtsae()
    plain = draw(fresh, **call)
    assert np.array_equal(steered[0], plain[0]) and not np.array_equal(steered[1], plain[1])
    assert not np.array_equal(plain, without)
    fresh.load_rtsae(dictionary)  # after the IP-Adapter
    steer(fresh)
    assert np.array_equal(draw(fresh, **call), steered)


def test_textual_inversion(fresh, dictionary, draw, tmp_path):
    fresh.load_rtsae(dictionary)
    steer(fresh)
    width = fresh.text_encoder.config.hidden_size
    fresh.load_textual_inversion({"<new>": torch.randn(width, generator=torch.Generator().manual_seed(0))})
    prompts = ["a <new>", "a <new> on the left"]
    steered = draw(fresh, prompts, steps=3)
    fresh.disable_rtsae()
    plain = draw(fresh, prompts, steps=3)
    assert np.array_equal(steered[0], plain[0]) and not np.array_equal(steered[1], plain[1])


@pytest.mark.way(15)
def test_resolution_may_change_between_generations(fresh, dictionary, draw):
    fresh.load_rtsae(dictionary)
    steer(fresh)
    for size in ((64, 64), (96, 64), (64, 128)):
        steered = draw(fresh, steps=2, height=size[0], width=size[1])
        fresh.disable_rtsae()
        plain = draw(fresh, steps=2, height=size[0], width=size[1])
        fresh.enable_rtsae()
        assert np.array_equal(steered[0], plain[0]) and not np.array_equal(steered[1], plain[1])


@pytest.mark.way(15)
@pytest.mark.parametrize("shared", ["denoiser", "pipeline"])
def test_several_threads(fresh, dictionary, shared):
    """Each begins while the others are in the middle, then all go step by step. Prompts are encoded before, as a
    fast tokenizer is not for several threads."""
    count, results, generator = 3, {}, torch.Generator().manual_seed(0)
    fresh.load_rtsae(dictionary)
    fresh.set_rtsae_features({(SITE, 3): 1.0, (SITE, 7): 0.5}, operation="set")
    pipes = [fresh] * count
    if shared == "denoiser":
        pipes = [StableDiffusionPipeline(**fresh.components, requires_safety_checker=False) for _ in range(count)]
        for pipe in pipes:
            pipe.scheduler = DDIMScheduler.from_config(fresh.scheduler.config)
            pipe.set_progress_bar_config(disable=True)
    texts = fresh.encode_prompt(PROMPTS, torch.device("cpu"), 1, True)
    call = dict(zip(("prompt_embeds", "negative_prompt_embeds"), texts, strict=True))
    call |= {"latents": torch.randn(count, 2, 4, 16, 16, generator=generator), "num_inference_steps": 4}

    def work(i, **more):
        settings = call | {"latents": call["latents"][i], "guidance_scale": 4.0, "output_type": "np"}
        results[i] = pipes[i](**settings, **more).images

    for i in range(count):
        work(i)
    expected, results = results, {}
    begun, together = [threading.Event() for _ in range(count)], threading.Barrier(count, timeout=60)

    def in_turn(i):
        def after_step(pipe, step, timestep, tensors):
            begun[i].set()
            together.wait()
            return tensors

        if i > 0:
            begun[i - 1].wait(60)
        work(i, callback_on_step_end=after_step)

    threads = [threading.Thread(target=in_turn, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(count):
        np.testing.assert_allclose(results[i], expected[i], atol=1e-5)


def test_interrupt_and_callbacks(fresh, dictionary, draw):
    fresh.load_rtsae(dictionary)
    fresh.set_rtsae_features({(SITE, 3): 1.0}, operation="set")
    whole = draw(fresh, steps=4)

    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step >= 1
        return tensors

    assert not np.array_equal(draw(fresh, steps=4, callback_on_step_end=interrupt), whole)
    assert np.array_equal(draw(fresh, steps=4), whole)


@pytest.mark.way(15)
def test_a_copied_or_pickled_denoiser_keeps_its_features(fresh, dictionary, draw):
    fresh.load_rtsae(dictionary)
    fresh.set_rtsae_features({(SITE, 3): 1.0}, operation="set")
    expected = draw(fresh, steps=2)
    for unet in (copy.deepcopy(fresh.unet), pickle.loads(pickle.dumps(fresh.unet))):
        other = StableDiffusionPipeline(**(fresh.components | {"unet": unet}), requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        assert np.array_equal(draw(other, steps=2), expected)
        other.set_rtsae_features({(SITE, 3): 0.0})
        assert not np.array_equal(draw(other, steps=2), expected)
        assert np.array_equal(draw(fresh, steps=2), expected)


def test_dictionary_dtype_and_device(fresh, draw):
    images = []
    for dtype in (None, torch.float16, torch.float32):
        fresh.load_rtsae(load_dictionary(EXAMPLES / "shapes-rtsae", dtype=dtype))
        fresh.set_rtsae_device("cpu")
        steer(fresh)
        images.append(draw(fresh, steps=2))
        fresh.unload_rtsae()
    assert np.array_equal(images[0], images[1]) and np.allclose(images[0], images[2], atol=1e-4)


def test_training_after_generating_in_inference_mode(fresh, dictionary, draw):
    fresh.load_rtsae(dictionary)
    fresh.set_rtsae_features({(SITE, 3): 1.0}, operation="set")
    with torch.inference_mode():
        draw(fresh, steps=2)
    sample = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 8, fresh.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    for timestep in (961, 481, 1):
        fresh.unet(sample, timestep, text).sample.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in fresh.unet.get_submodule(SITE).parameters())
