"""
A denoiser on a device that is not the CPU, which is simulated on the CPU: pictures are the CPU's, whatever lies where;
and steering neither makes the host wait for the device nor copies to it, once it has begun.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from kinds import MADE, random_dictionary
from PIL import Image
from simulated_device import NAME, SimulatedTensor, simulated
from small_analysis import find_less, fit_less

from diffusers_rtsae import load_dictionary
from diffusers_rtsae.analysis.effect import States
from diffusers_rtsae.analysis.explain import explain
from diffusers_rtsae.analysis.find import find_features, top_features
from diffusers_rtsae.analysis.fit import fit_feature
from diffusers_rtsae.analysis.graph import feature_graph
from diffusers_rtsae.analysis.names import name_features
from diffusers_rtsae.analysis.plots import plot_feature_trajectories, plot_heat_maps, plot_presence, plot_similarity
from diffusers_rtsae.analysis.record import record
from diffusers_rtsae.analysis.report import write_report
from diffusers_rtsae.analysis.statistics import measure, set_statistics
from diffusers_rtsae.models import LinearDynamics
from diffusers_rtsae.steering import OPERATIONS
from training.architectures import atm
from training.data.collect import anchor_timesteps, collect
from training.data.prompts import read_samples
from training.data.split import Data
from training.data.store import TrajectoryStore
from training.evaluation.reconstruction import evaluate, timing
from training.evaluation.replacement import recovered
from training.loop import trainer as trainer_module
from training.loop.checkpoints import Checkpoints
from training.loop.loop import train_dictionaries
from training.loop.trainer import DictionaryTrainer
from training.recipe import Recipe
from training.registry import ARCHITECTURES, KINDS

EXAMPLES = Path(__file__).parents[1] / "examples"
SITE, SITES = "up_blocks.1.attentions.1", [f"transformer_blocks.{i}.attn2" for i in range(6)]
# where a dictionary is; from the device less is copied
PLACES = ["cpu", pytest.param(NAME, marks=pytest.mark.slow)]
RED, ACTIVE = 570, [412, 1224]  # latents of the bundled dictionary, and what is active at two steps
OWN = {"shapes-sd": {}, "people-dit": {"use_resolution_binning": False, "clean_caption": False}}
PROMPTS = {"shapes-sd": ["a star", "a large blue heart on the left"], "people-dit": ["a woman", "a cook"]}


@pytest.fixture
def device():
    with simulated() as device:
        yield device


@pytest.fixture(scope="module")
def _pipelines():
    made = {}

    def pipeline(name: str, place: str, dtype: torch.dtype):
        if (name, place, dtype) not in made:
            pipe = DiffusionPipeline.from_pretrained(EXAMPLES / name).to(place, dtype)
            pipe.set_progress_bar_config(disable=True)
            made[name, place, dtype] = pipe
        return made[name, place, dtype]

    yield pipeline
    made.clear()


@pytest.fixture
def both(_pipelines):
    """`both(name)`: a bundled pipeline on the CPU and on the device, with this dictionary."""
    used = []

    def pipelines(name: str = "shapes-sd", dictionary=None, dtype: torch.dtype = torch.float32) -> list:
        pipes = [_pipelines(name, place, dtype) for place in ("cpu", NAME)]
        for pipe in pipes:
            pipe.load_rtsae(dictionary or load_dictionary(EXAMPLES / f"{name.split('-')[0]}-rtsae"))
        used.extend(pipes)
        return pipes

    yield pipelines
    for pipe in used:
        pipe.unload_rtsae()


def draw(pipe, steps: int = 2, images: int = 1, **call) -> np.ndarray:
    """Latents, which say more than pictures."""
    name = "shapes-sd" if hasattr(pipe, "unet") else "people-dit"
    generators = [torch.Generator().manual_seed(seed) for seed in range(images)]
    call = {"guidance_scale": 4.0, "output_type": "latent"} | OWN[name] | call
    drawn = pipe(PROMPTS[name][:images], generator=generators, num_inference_steps=steps, **call).images
    return drawn.float().cpu().numpy() if torch.is_tensor(drawn) else drawn


def check_same(
    pipes: list, features: dict, images: int = 1, steps: int = 2, atol: float = 1e-3, places=("cpu", NAME), **options
) -> None:
    """The device draws what the CPU draws, with the dictionary in each place, and something else than without
    features."""
    for pipe in pipes:
        pipe.set_rtsae_features(features, **options)
    expected, told = draw(pipes[0], steps, images), pipes[0].rtsae_report()
    for place in places:
        pipes[1].set_rtsae_device(place)
        np.testing.assert_allclose(draw(pipes[1], steps, images), expected, atol=atol)
    rows, others = (
        [[row[name] for name in ("edited", "out_of_range", "relative_size")] for row in sum(report.values(), [])]
        for report in (told, pipes[1].rtsae_report())
    )
    assert max(size for *_, size in rows) > 0.01  # it does something
    np.testing.assert_allclose(np.array(others, dtype=float), np.array(rows, dtype=float), rtol=0.05, atol=0.02)


# The device itself


def test_the_simulated_device_refuses_and_counts_as_cuda_does(device):
    a, b = torch.ones(3, device=NAME), torch.ones(3)
    for meet in [
        lambda: a + b, lambda: a @ b, lambda: torch.cat([a, b]), lambda: b * a.sum(), lambda: b[a.long()],
        lambda: b.sum().add_(a.sum()), lambda: torch.stack([a.sum(), b.sum()]),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match="same device"):
            meet()
    with pytest.raises(RuntimeError, match="same device"):
        a + a.to(f"{NAME}:1")
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=NAME, generator=torch.Generator())
    with pytest.raises(TypeError, match="Use Tensor.cpu"):
        np.asarray(a)
    made = a * b.sum() + 2  # a number on the host may join
    assert made.device == torch.device(NAME, 0) and isinstance(made, SimulatedTensor)
    for kind, does in {
        "wait": [
            lambda: a.sum().item(), a.tolist, lambda: bool(a.isfinite().all()), a.nonzero, lambda: a[a > 0],
            lambda: torch.equal(a, a), lambda: f"{a.sum():.3g}", lambda: float(a[0]),
        ],
        "download": [a.cpu, lambda: a.to("cpu", torch.float16), lambda: b.copy_(a)],
        "upload": [
            lambda: b.to(NAME), lambda: torch.tensor([1.0], device=NAME), lambda: a[[0, 1]], lambda: a.new_tensor([1]),
            lambda: a[torch.tensor([0])], lambda: a.copy_(b), lambda: b.to(a), lambda: torch.asarray(b, device=NAME),
        ],
        "transfer": [lambda: a.to(f"{NAME}:1")],
        None: [
            lambda: a[0], lambda: a[:2], lambda: a.half(), lambda: torch.zeros_like(a), lambda: a.new_zeros(2),
            lambda: torch.arange(3, device=NAME), lambda: a.topk(2), lambda: torch.where(a > 0, a, 0.0),
            lambda: a.clamp(min=1), lambda: torch.eye(2, device=NAME), lambda: a[torch.arange(2, device=NAME)],
        ],
    }.items():  # fmt: skip
        for i, do in enumerate(does):
            device.reset()
            do()
            assert device.kinds == ({} if kind is None else {kind: 1}), (kind, i)
    assert not device.lines  # this file is not the package


def test_modules_optimizers_and_gradients_work_on_the_simulated_device(device):
    torch.manual_seed(0)
    layers, rows = [torch.nn.Linear(3, 2) for _ in range(2)], torch.randn(5, 3)
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].to(NAME)
    for layer in layers:
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
        for _ in range(3):
            layer(rows.to(layer.weight.device)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert isinstance(layers[1].weight, torch.nn.Parameter) and layers[1].weight.device.type == NAME
    torch.testing.assert_close(layers[1].cpu().weight, layers[0].weight)
    with torch.inference_mode():
        assert rows.to(NAME).to(torch.float16).to(rows).device.type == "cpu"


def test_the_simulated_device_is_gone_after_the_block():
    with simulated() as device:
        assert torch.accelerator.is_available()
    torch.ones(2).to(NAME)
    assert not device.kinds and not torch.accelerator.is_available()


# Pictures


DTYPES = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1, torch.float64: 1e-4}


@pytest.mark.parametrize("name", OWN)
def test_a_plain_pipeline_draws_what_it_draws_on_the_cpu(device, both, name):
    expected, found = (draw(pipe, 3, 2, output_type="np") for pipe in both(name))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert not device.lines and device.kinds["download"]  # the picture


FULL = {"clamp": 0.01, "scale": 3.0}


@pytest.mark.filterwarnings("ignore:To read some latents")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "kind, operation",
    [
        pytest.param(kind, operation, marks=[] if quick else pytest.mark.slow)
        for kind in MADE
        for operation in OPERATIONS
        for quick in [kind == "RTSAE" or operation in ("add", "ablate")]
    ],
)
def test_every_kind_and_operation(device, both, kind, operation, place):
    sae = random_dictionary(kind, SITE, 160, [961, 481, 1], 32, 4)
    sae.typical_activation.fill_(0.5 if operation == "erase" else 30.0)
    sae.max_activation.fill_(150.0)
    sae.mean_activation.fill_(10.0)
    source = {"source": 20} if operation in ("transfer", "replace") else {}
    features = {i: FULL.get(operation, 1.0) for i in range(0, 16, 2) if operation != "erase" or i in (4, 6)}
    check_same(both(dictionary={SITE: sae}), features, operation=operation, places=(place,), **source)


HALF = np.zeros((8, 8), dtype=np.float32)
HALF[:4] = 1
OPTIONS = {
    "everything": {},
    "no clipping": {"clip": False},
    "where": {"where": ACTIVE},
    "a mask": {"mask": HALF},
    "a mask for each prompt": {"mask": np.stack([HALF, 1 - HALF])},
    "erased under a mask": {"operation": "erase", "where": "everywhere", "mask": HALF},
    "erased where seen, under a mask for each prompt": {
        "operation": "erase", "mask": np.stack([HALF, 1 - HALF]), "apply_to": "contrast", "strength": [1.0, 0.5],
        "features": ("star", "heart"),
    },
    "a mask and where, taken from another": {
        "mask": Image.fromarray((HALF * 255).astype(np.uint8)), "where": ACTIVE, "operation": "transfer",
        "source": ACTIVE,
    },
    "one strength for each prompt": {"strength": [0.5, 1.0]},
    "a schedule": {"strength": torch.tensor([1.0, 0.5, 0.0])},
    "a schedule for each prompt": {"strength": torch.tensor([[1.0, 0.5], [0.0, 0.5]])},
    "a schedule on the device": {"strength": torch.tensor([1.0, 0.5, 0.0], device=NAME)},
    "a mask on the device": {"mask": torch.from_numpy(HALF).to(NAME)},
    "a function": {"strength": lambda progress: 1 - progress},
    "renormalised": {"renormalise": True},
    "one half": {"apply_to": "cond"},
    "both branches": {"apply_to": "all"},
    "this step alone": {"injection": "residual"},
    "a window": {"end": 0.5},
    "a weight": {"weight": 0.5},
    "absurdly much": {"strength": 50.0, "clip": False},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The edits at")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_of_an_edit(device, both, options, place):
    pipes, told = both(), {"strength": 1.0} | OPTIONS[options]
    for pipe in pipes:
        pipe.set_rtsae("default", told.get("weight", 1.0))
    strength = told.pop("strength")
    told.pop("weight", None)
    features = dict.fromkeys(told.pop("features", (RED, 1320)), strength)
    check_same(pipes, features, images=2, places=(place,), **told)


@pytest.mark.parametrize("name, features", {
    "shapes-sd": {"red": 1.0, "dotted": [0.0, 0.5], ACTIVE[0]: -1.0},
    "people-dit": {"man": 1.0, "dark": [0.5, -0.5]},
}.items())  # fmt: skip
def test_labels_and_maps(device, both, name, features):
    pipes = both(name)
    check_same(pipes, features, images=2)
    check_same(pipes, features, images=2, mask=HALF, renormalise=True)


@pytest.mark.parametrize("operation", ["add", "ablate", "erase"])
def test_several_sites(device, both, operation):
    features = {(site, latent): 1.0 for site in SITES for latent in range(64)}
    options = {"where": "everywhere", "mask": HALF} if operation == "erase" else {}
    check_same(both("people-dit"), features, operation=operation, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name, label", {"shapes-sd": "red", "people-dit": "man"}.items())
def test_other_precisions(device, both, name, label, dtype):
    if dtype == torch.float16 and name == "shapes-sd":
        pytest.skip("CPUs are slow at convolutions in float16")
    atol = {torch.float16: 0.05, torch.bfloat16: 0.3, torch.float64: 1e-4}[dtype]
    check_same(
        both(name, dtype=dtype), {label: 1.0, (SITE, RED) if name == "shapes-sd" else (SITES[0], 5): 1.0}, atol=atol
    )


def test_a_pipeline_that_moves_is_followed(device, both):
    pipes = both()
    pipe = pipes[0]
    pipe.set_rtsae_features({"red": 1.0, RED: 1.0, ACTIVE[0]: 0.5}, mask=HALF)
    expected = draw(pipe)
    try:
        for place in (NAME, f"{NAME}:1", "cpu", NAME):
            pipe.to(place)
            np.testing.assert_allclose(draw(pipe), expected, atol=1e-3)
    finally:
        pipe.to("cpu")


@pytest.mark.parametrize("order", ["before loading", "after loading"])
def test_model_offloading(device, both, order):
    expected = both()[0]
    expected.set_rtsae_features({"red": 1.0, RED: 1.0})
    pipe = DiffusionPipeline.from_pretrained(EXAMPLES / "shapes-sd")
    pipe.set_progress_bar_config(disable=True)
    if order == "before loading":
        pipe.enable_model_cpu_offload(device=NAME)
    pipe.load_rtsae(load_dictionary(EXAMPLES / "shapes-rtsae"))
    pipe.set_rtsae_features({"red": 1.0, RED: 1.0})
    if order == "after loading":
        pipe.enable_model_cpu_offload(device=NAME)
    for _ in range(2):
        np.testing.assert_allclose(draw(pipe), draw(expected), atol=1e-3)
    assert pipe.unet.device.type == "cpu" and device.kinds["upload"] > 300


def test_image_to_image(device, both):
    drawn, picture = [], Image.new("RGB", (64, 64), "red")
    for pipe in both():
        pipe.set_rtsae_features({RED: 1.0, **dict.fromkeys(ACTIVE, 0.5)})
        other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        call = {"strength": 0.6, "num_inference_steps": 5, "output_type": "np"}
        drawn.append(other("a star", image=picture, generator=torch.Generator().manual_seed(0), **call).images)
    np.testing.assert_allclose(drawn[1], drawn[0], atol=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_steering(device, both, checkpointing):
    found = []
    for pipe in both():
        pipe.set_rtsae_features({RED: 1.0, **dict.fromkeys(ACTIVE, 0.5)}, mask=HALF)
        unet, generator = pipe.unet, torch.Generator().manual_seed(0)
        size, width = unet.config.sample_size, unet.config.cross_attention_dim
        noise = torch.randn(2, unet.config.in_channels, size, size, generator=generator).to(unet.device)
        text = torch.randn(2, 77, width, generator=generator).to(unet.device)
        if checkpointing:
            unet.enable_gradient_checkpointing()
            unet.train()
        noise.requires_grad_()
        unet(noise, torch.tensor(900, device=unet.device), encoder_hidden_states=text).sample.square().sum().backward()
        found.append((noise.grad.cpu(), unet.conv_in.weight.grad.cpu()))
        unet.zero_grad()
        unet.disable_gradient_checkpointing()
        unet.eval()
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)


def test_inference_mode(device, both):
    pipes = both()
    with torch.inference_mode():
        check_same(pipes, {"red": 0.5, RED: 1.0, **dict.fromkeys(ACTIVE, 0.5)}, mask=HALF)


# Steps


def by_step(pipe, device, monkeypatch, steps: int = 4, **call) -> list[Counter]:
    """What the package did in each step: until the sampler takes it."""
    found, take = [], pipe.scheduler.step

    def step(*args, **kwargs):
        found.append(Counter(device.lines))
        taken = take(*args, **kwargs)
        device.reset()
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(pipe.scheduler, "step", step)
        device.reset()
        draw(pipe, steps, **call)
    assert len(found) == steps
    return found


READ = {"operation": "ablate"}
STEPS = {  # dictionary, features, options
    "nothing": ("shapes", {}, {}),
    "latents added": ("shapes", {RED: 1.0, 1320: 0.5}, {"clip": False}),
    "a label": ("shapes", {"red": 1.0}, {}),
    "latents added in range": ("shapes", {RED: 1.0, 1320: 0.5}, {}),
    "latents ablated": ("shapes", dict.fromkeys(ACTIVE, 1.0), READ),
    "latents ablated in both branches": ("shapes", dict.fromkeys(ACTIVE, 1.0), READ | {"apply_to": "all"}),
    **{f"{kind}, ablated": (kind, {0: 1.0, 2: 1.0}, READ) for kind in MADE if kind != "RTSAE"},
    "where": ("SparseAutoencoder", {0: 1.0}, {"where": [2, 4]}),
    "one strength for each prompt": ("SparseAutoencoder", {0: [1.0]}, {}),
    "a mask": ("SparseAutoencoder", {0: 1.0}, {"mask": HALF}),
    "a schedule": ("SparseAutoencoder", {0: torch.tensor([1.0, 0.5, 0.0])}, {}),
    "a schedule on the device": ("SparseAutoencoder", {0: torch.tensor([1.0, 0.5, 0.0], device=NAME)}, {}),
    "a function": ("SparseAutoencoder", {0: lambda progress: 1 - progress}, {}),
    "renormalised": ("SparseAutoencoder", {0: 1.0}, {"renormalise": True}),
    "a transfer": ("SparseAutoencoder", {0: 1.0}, {"operation": "transfer", "source": [2, 4]}),
    "latents erased": ("shapes", {"star": 1.0}, {"operation": "erase", "mask": HALF}),
    "latents erased, read all at once": ("SparseAutoencoder, TopK", {0: 1.0, 2: 1.0}, {"operation": "erase"}),
    "a label's maps": ("people", {"man": 1.0}, {}),
    "latents added at one site": ("people", {(SITES[0], 5): 1.0}, {"clip": False}),
    "latents added at six sites": ("people", {(site, 5): 1.0 for site in SITES}, {"clip": False}),
    "latents ablated at one site": ("people", {(SITES[0], 5): 1.0}, READ),
    "latents ablated at six sites": ("people", {(site, 5): 1.0 for site in SITES}, READ),
}


@pytest.fixture(scope="module")
def _steps():
    return {}


@pytest.fixture
def steps_of(device, both, monkeypatch, _steps):
    """`steps_of(case, place)`: what the package does in each step of the first generation of one of `STEPS`."""

    def steps(case: str, place: str) -> list[Counter]:
        if (case, place) not in _steps:
            of, features, options = STEPS[case]
            own = (
                None if of in ("shapes", "people") else {SITE: random_dictionary(of, SITE, 160, [961, 481, 1], 32, 4)}
            )
            pipe = both("people-dit" if of == "people" else "shapes-sd", own)[1]
            pipe.set_rtsae_device(place)
            pipe.set_rtsae_features(features, **options)
            _steps[case, place] = by_step(pipe, device, monkeypatch)
        return _steps[case, place]

    return steps


def later(steps: list[Counter]) -> dict[tuple[str, str], int]:
    """How often after the first step each function of the package made the host wait for the device, or copied to it:
    by kind and function."""
    found: Counter = Counter()
    for line, count in sum(steps[1:], Counter()).items():
        found[line.split()[0], line.split(": ")[0].split()[-1]] += count
    return dict(found)


@pytest.mark.filterwarnings("ignore:To read some latents")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", STEPS)
def test_steps_after_the_first_neither_wait_for_the_device_nor_copy_to_it(steps_of, case, place):
    steps = steps_of(case, place)
    assert not later(steps) and (not steps[0]) == (case == "nothing")


@pytest.mark.parametrize("steps", [3, 5])
def test_steps_that_skip_anchors_copy_nothing_either(device, both, monkeypatch, steps):
    """What they read by is known from the sampler's timesteps before the second step."""
    sae = random_dictionary("RTSAE", SITE, 160, [961, 801, 641, 481, 321, 161, 1], 32, 4)
    pipe = both("shapes-sd", {SITE: sae})[1]
    pipe.set_rtsae_features({0: 1.0, 5: 1.0}, **READ)
    assert not later(by_step(pipe, device, monkeypatch, steps))


# What is read, found, fitted and measured


CALL = {"num_inference_steps": 2, "guidance_scale": 3.0}
PAIRS = [("a star", "a star on a white background"), ("a heart", "a heart on a white background")]
WITHOUT, WITH = ([pair[i] for pair in PAIRS] for i in range(2))


def generators(count: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def small(kind: str = "RTSAE"):
    """A dictionary of few latents, that are active here and matter."""
    sae = random_dictionary(kind, SITE, 160, [667, 334, 1], 32, 4)
    tensors = sae.state_dict()
    for name, factor in (("decoder_bias", 0.0), ("modulation.weight", 0.05), ("typical_activation", 5.0)):
        if name in tensors:
            tensors[name].mul_(factor)
    sae.max_activation.copy_(100 * sae.typical_activation)
    return {SITE: sae}


@pytest.fixture
def quick(monkeypatch):
    """Less of everything that is chosen and fitted."""
    fit_less(monkeypatch, steps=2, last=2, choice=1)
    find_less(monkeypatch)


def at(place: str, pipes: list) -> list:
    """With the device's dictionary there."""
    pipes[1].set_rtsae_device(place)
    return pipes


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", OWN)
def test_recording(device, both, name, place):
    recordings = [
        record(pipe, PROMPTS[name], generator=generators(), **CALL | OWN[name] | {"output_type": "latent"})
        for pipe in at(place, both(name))
    ]
    for site in recordings[0].trajectories:
        one, other = (recording.trajectories[site] for recording in recordings)
        torch.testing.assert_close(other, one, atol=1e-3, rtol=1e-3)
        for mask in (None, HALF):
            one, other = (recording.presence(site, mask) for recording in recordings)
            torch.testing.assert_close(other, one, atol=1e-2, rtol=1e-2)
        maps = [recording.maps([(site, 5), (site, 9)]) for recording in recordings]
        torch.testing.assert_close(maps[1], maps[0], atol=1e-2, rtol=1e-2)
    one, other = ([(f.site, f.index) for f in top_features(recording)] for recording in recordings)
    assert len(set(one) & set(other)) >= 0.8 * len(one)


def check_found(tables: list) -> None:
    one, other = ({(feature.site, feature.index): feature for feature in table} for table in tables)
    assert one and one.keys() == other.keys()
    for key, feature in one.items():
        assert other[key].score == pytest.approx(feature.score, abs=0.01)
        assert other[key].verified == pytest.approx(feature.verified, abs=0.01)


@pytest.mark.parametrize("place", PLACES)
def test_finding_by_presence(device, both, place):
    check_found([
        find_features(pipe, WITH, WITHOUT, count=2, seeds=1, by="presence", verify=1, **CALL)
        for pipe in at(place, both(dictionary=small()))
    ])  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_finding_in_pictures(device, both, place):
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    check_found([find_features(pipe, [red], [blue], count=2) for pipe in at(place, both())])


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_naming(device, both, place):
    prompts = [f"a {colour} star" for colour in ("red", "blue", "green") for _ in range(3)]
    one, other = (name_features(pipe, prompts, pictures=1, **CALL) for pipe in at(place, both(dictionary=small())))
    assert one.measured == other.measured > 0 and one.words == other.words
    assert [(name.index, name.name) for name in one] == [(name.index, name.name) for name in other]


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_explaining(device, both, place):
    pipes = list(at(place, both(dictionary=small())))
    one, other = (explain(pipe, "a red star", "red", features=3, **CALL) for pipe in pipes)
    assert [entry.name for entry in one.entries] == [entry.name for entry in other.entries]
    assert [entry.share for entry in one.entries] == pytest.approx([entry.share for entry in other.entries], abs=0.02)
    graphs = [feature_graph(pipe, ledger, 2, **CALL) for pipe, ledger in zip(pipes, (one, other), strict=True)]
    assert [node.name for node in graphs[0].nodes] == [node.name for node in graphs[1].nodes] != []


SLOW = [pytest.param(kind, NAME, marks=pytest.mark.slow) for kind in ("RTSAE", "TIDE", "MixtureSAE")]


@pytest.mark.parametrize("kind, place", [("RTSAE", "cpu"), *SLOW])
def test_finding_by_effect(device, both, quick, kind, place):
    check_found([
        find_features(pipe, WITH[:1], WITHOUT[:1], 2, seeds=1, verify=1, unchanged=["a circle"], **CALL)
        for pipe in at(place, both(dictionary=small(kind)))
    ])  # fmt: skip


@pytest.mark.parametrize("rank, place", [(None, "cpu"), (2, NAME)])
def test_fitting(device, both, quick, rank, place):
    pipes = at(place, both(dictionary=small("SparseAutoencoder")))
    one, other = (fit_feature(pipe, PAIRS[:1], 4, ["a circle"], rank, progress=False, **CALL) for pipe in pipes)
    assert other.measured == pytest.approx(one.measured, abs=0.03)
    for pipe in pipes:
        pipe.add_rtsae_label("mine", one)
    check_same(pipes, {"mine": 1.0})


@pytest.mark.parametrize("place", PLACES)
def test_effects(device, both, place):
    effects = []
    for pipe in at(place, both(dictionary=small())):
        states = States(pipe, PAIRS[:1], **CALL)
        assert all(torch.isfinite(part).all() for part in states.presence(SITE)[1:])
        goal = lambda state, rows: {SITE: (state.goal[SITE] - state.present[SITE])[list(rows)]}  # noqa: E731
        effects += [states.effects(goal), states.effects(lambda state, rows: {})]
    torch.testing.assert_close(effects[2:], effects[:2], atol=1e-3, rtol=1e-3)
    assert effects[2].item() > 0.9 and abs(effects[3].item()) < 1e-6


@pytest.mark.parametrize("place", PLACES)
def test_reports(device, both, tmp_path, place):
    told = []
    for i, pipe in enumerate(at(place, both())):
        write_report(pipe, tmp_path / f"{i}.html", ["a star"], count=2, steered=1, **CALL)
        page = (tmp_path / f"{i}.html").read_text()
        told.append(json.JSONDecoder().raw_decode(page[page.index('{"base_model"') :])[0]["features"])
    for one, other in zip(*told, strict=True):
        assert one["name"] == other["name"] and other["length"] == pytest.approx(one["length"], abs=1e-3)
        assert other["curve"] == pytest.approx(one["curve"], abs=0.01)
        assert other.get("change") == pytest.approx(one.get("change"), abs=0.01)


@pytest.mark.parametrize("place", ["cpu", NAME])
@pytest.mark.parametrize("kind", [kind for kind in MADE if kind not in ("RTSAE", "MixtureSAE")])
def test_statistics(device, both, kind, place):
    measured = []
    for pipe in at(place, both(dictionary=small(kind))):
        dictionary = vars(pipe.unet)["_rtsae_controller"].adapters["default"].dictionary
        measure(pipe, dictionary, ["a star"], **CALL)
        measured.append(dictionary.sites[SITE].cpu())
    for name in ("density", "mean_activation", "typical_activation", "max_activation", "scale"):
        one, other = (getattr(sae, name) for sae in measured)
        torch.testing.assert_close(other, one, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("place", ["cpu", NAME])
def test_what_a_reconstruction_recovers(device, both, place):
    sae = random_dictionary("RTSAE", SITE, 160, [501, 1], 32, 4)
    found = [
        recovered(pipe, sae.to(where), ["a star"], generators(1), **CALL)
        for pipe, where in zip(both(dictionary={SITE: sae}), ("cpu", place), strict=True)
    ]
    assert found[1]["recovered_online"] == pytest.approx(found[0]["recovered_online"], abs=0.01)


@pytest.mark.parametrize("place", ["cpu", NAME])
@pytest.mark.parametrize("kind", ["RTSAE", "TIDE"])
def test_evaluation(device, kind, place):
    sae, rows = random_dictionary(kind, SITE, 16, [900, 500, 1], 32, 4), torch.randn(50, 3, 16)
    expected = evaluate(sae, rows, 4) | timing(sae)
    found = evaluate(sae.to(place), rows.to(place), 4) | timing(sae)
    for key in {"fvu_online", "l0_threshold", "l0_batch_topk"} & expected.keys():
        assert found[key] == pytest.approx(expected[key], rel=1e-3)
    assert found["peak"] == expected["peak"]


def test_saving_and_drawing_figures(device, both, tmp_path):
    pipes = both()
    pipes[1].set_rtsae_device(NAME)
    recording = record(pipes[1], "a star", **CALL)
    assert plot_presence(recording, ["red"]) and plot_heat_maps(recording, ["red"])
    assert plot_feature_trajectories(recording.dictionary, ["red", RED])
    assert plot_similarity(recording.dictionary, ["red", RED])
    for i, pipe in enumerate(pipes):
        pipe.save_rtsae(tmp_path / str(i))
    for path in (tmp_path / "0").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "1" / path.relative_to(tmp_path / "0")).read_bytes()


# Training


class OnTheDevice(Accelerator):
    device = torch.device(NAME, 0)


def recipe(**train) -> Recipe:
    collect = {
        "prompts": "shapes", "count": 4, "steps": 3, "guidance_scale": 3.0, "batch_size": 2, "tokens_per_image": 8,
    }  # fmt: skip
    train = {
        "num_latents": 128, "k": 2, "steps": 4, "batch_size": 32, "learning_rate": 3e-3, "dead_after": 20,
        "validate_every": 2, "checkpoint_every": 2,
    } | train  # fmt: skip
    return Recipe(pipeline="x", base_model="x", sites=[SITE], anchors=3, collect=collect, train=train)


@pytest.mark.parametrize("streams", ["cond", "both"])
def test_collecting(device, both, scorer, tmp_path, streams):
    stores, mine = [], recipe()
    mine = mine.model_copy(update={"collect": mine.collect.model_copy(update={"streams": streams})})
    for i, pipe in enumerate(both()):
        scheduler = pipe.scheduler
        try:
            anchors, store = anchor_timesteps(pipe, mine.collect, 3), TrajectoryStore(tmp_path / str(i), "x")
            device.reset()
            collect(pipe, read_samples(mine.collect, 0), mine, anchors, store, scorer.to(pipe.device))
            assert device.own["download"] == (2 if i else 0)  # one a batch
        finally:
            pipe.scheduler = scheduler
            scorer.to("cpu")
        stores.append(store)
    for one, other in zip(*(store.shards() for store in stores), strict=True):
        torch.testing.assert_close(stores[1].load(other, SITE), stores[0].load(one, SITE), atol=0.01, rtol=0.01)
        assert stores[1].load_origin(other, SITE)[2] == stores[0].load_origin(one, SITE)[2]


def trained(work: Path, one: Recipe, accelerator: type[Accelerator]):
    rows = torch.randn(8192, 3, 16, generator=torch.Generator().manual_seed(0)).half()  # seldom twice in a batch
    dynamics = LinearDynamics(3, 16)
    dynamics.scale.copy_(rows.float().square().mean((0, 2)).sqrt())
    told = torch.rand(8192, 3, generator=torch.Generator().manual_seed(1))
    data = Data({SITE: rows, f"{SITE}/told": told}, {SITE: rows[:100]}, {SITE: rows[100:256]})
    made = train_dictionaries(
        {"one": one}, data, {"one": dynamics}, {"one": SITE}, [900, 500, 1], work, accelerator(cpu=True), "data"
    )
    return made["one"].state_dict()


WAYS = {
    **{f"{kind}, {name}": {"kind": kind, "architecture": name} for kind in KINDS for name in ARCHITECTURES},
    "a latent for each step": {"layout": "per_step"},
    "bfloat16": {"precision": "bf16"},
    "in parts": {"accumulate": 2},
}
del WAYS["mixture, topk"]


@pytest.mark.parametrize("way", WAYS)
def test_training_and_resuming(device, tmp_path, monkeypatch, way):
    monkeypatch.setattr(atm, "MEMORY", 2)  # so that latents are masked, too
    one, original, saves = recipe(**WAYS[way]), Checkpoints.save, []
    expected = trained(tmp_path / "cpu", one, Accelerator)
    whole = trained(tmp_path / "whole", one, OnTheDevice)

    def save_then_die(*arguments):
        original(*arguments)
        saves.append(1)
        if len(saves) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", one, OnTheDevice)
    resumed = trained(tmp_path / "killed", one, OnTheDevice)
    assert len(saves) == 2  # two steps were kept, two were made
    for name, tensor in expected.items():
        near = torch.isclose(whole[name], tensor, atol=1e-4, rtol=1e-3).float().mean()
        assert near == 1 or way == "bfloat16" and near > 0.8, name  # where many are equal, others are the largest
        assert torch.equal(resumed[name], whole[name])


@pytest.mark.parametrize("way", WAYS)
def test_a_training_step_waits_once_in_a_hundred(device, tmp_path, monkeypatch, way):
    monkeypatch.setattr(atm, "MEMORY", 2)
    monkeypatch.setattr(trainer_module, "CHECK_EVERY", 5)
    original, counted, dead = DictionaryTrainer.update, [], []

    def counting(trainer, step):
        original(trainer, step)
        counted.append(Counter(device.lines))
        dead.append(int(trainer.dead.held.sum()))

    monkeypatch.setattr(DictionaryTrainer, "update", counting)
    trained(tmp_path, recipe(steps=10, validate_every=100, checkpoint_every=100, **WAYS[way]), OnTheDevice)
    assert max(dead) > 0  # so that there was an auxiliary loss
    for step in range(1, 10):
        new = counted[step] - counted[step - 1]
        batch = sum(count for line, count in new.items() if line.startswith("upload") and "copied" in line)
        assert batch == 2  # trajectories, and what is told of them
        assert new.total() - batch == (step == 5), new


def test_statistics_of_many_latents_are_copied_at_once(device):
    sae = random_dictionary("TIDE", SITE, 16, [900, 500, 1], 64, 4).to(NAME)
    codes = torch.randn(50, 64, device=NAME).relu()
    device.reset()
    set_statistics(sae, [codes])
    assert device.own["upload"] == 4 and torch.equal(sae.max_activation, codes.amax(0))
