"""
Every message that a misuse can provoke, in one table: what was done, and what is said to it, word for word. What the
Hub answers and what damaged files hold is tested where the server and the fuzzing are, in test_hub.py and
test_security.py; that nothing else is missing is tested at the end.
"""

import ast
import json
import re
import runpy
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
import typer
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from disk import full_disk
from foreign import dictionary_learning, saelens, sdlens, sparsify
from PIL import Image
from safetensors.torch import load_file, save_file

import diffusers_rtsae
from diffusers_rtsae import (
    RTSAE,
    TIDE,
    Dictionary,
    MixtureSAE,
    SparseAutoencoder,
    cli,
    denoiser,
    list_sites,
    load_dictionary,
)
from diffusers_rtsae.analysis import find, fit
from diffusers_rtsae.analysis.effect import Intervention, States, gradient
from diffusers_rtsae.analysis.fit import fit_feature
from diffusers_rtsae.analysis.plots import plot_crops, plot_strip
from diffusers_rtsae.analysis.record import Recorder, record
from diffusers_rtsae.analysis.report import write_report
from diffusers_rtsae.analysis.scorer import FactorScorer
from diffusers_rtsae.analysis.statistics import measure
from diffusers_rtsae.denoiser import Arguments, Block, CallReader, rows, training_time
from diffusers_rtsae.dictionary import (
    CONFIG_NAME,
    LABELS_NAME,
    MAPS_NAME,
    WEIGHTS_NAME,
    convertible,
    read_contents,
    save_tensors,
    search_labels,
)
from diffusers_rtsae.files import read_lines, read_pairs
from diffusers_rtsae.formats import FORMATS
from diffusers_rtsae.models import PLACES, LinearMap, Step
from diffusers_rtsae.steering import Edit
from diffusers_rtsae.worlds import WORLDS

SITE = "up_blocks.1.attentions.1"
# 32 tokens of text, no grid; and a layer that does not tell its width
TEXT_SITE = f"{SITE}.transformer_blocks.0.attn2.to_k"
SMALL = "mid_block"


@pytest.fixture
def world(steered, dictionary, draw, tmp_path):
    """The bundled pipeline with its dictionary, and the folder of a small one."""
    torch.manual_seed(0)
    labels = {"red": {"features": [{"site": SMALL, "latents": [1], "weights": [1.0]}]}}
    Dictionary({SMALL: RTSAE(SMALL, 8, [900, 500, 1], 16, 4)}, labels, {"base_model": "test"}).save(tmp_path / "small")
    return SimpleNamespace(pipe=steered, dictionary=dictionary, draw=draw, folder=tmp_path / "small", empty=tmp_path)


class Caller(DiffusionPipeline):
    """A pipeline that calls the denoiser once."""

    do_classifier_free_guidance = True

    def __init__(self, pipe: StableDiffusionPipeline):
        super().__init__()
        self.register_modules(unet=pipe.unet, scheduler=pipe.scheduler)

    @torch.no_grad()
    def __call__(
        self, rows: int, batch_size: int, unconditional: bool = False, t: float | None = 999, images: int = 1
    ):
        text = torch.zeros(rows, 32, 192)
        negative_prompt_embeds = text if unconditional else None  # noqa: F841 - this and what follows is read
        latents = torch.zeros(images, 4, 16, 16)  # noqa: F841
        self.unet(torch.zeros(rows, 4, 16, 16), 999.5, encoder_hidden_states=text)


class Odd(diffusers.DDIMScheduler):
    """A sampler that counts in a unit of its own."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.timesteps * 0 + 7000


class Cosmos3Like(Caller):
    """Of a family that is refused."""


Cosmos3Like.__name__ = "Cosmos3Like"


def recorded_at_two_sizes(world):
    with Recorder(world.pipe, [SITE]) as recorder:
        for size, t in ((16, 900), (32, 500)):
            world.pipe.unet(torch.zeros(1, 4, size, size), t, torch.zeros(1, 32, 192))
    recorder.trajectories(SITE)


def steer(value=1.0, **options):
    return lambda world: world.pipe.set_rtsae_features({"red": value}, **options)


def feature(name):
    return lambda world: world.pipe.set_rtsae_features({name: 1.0})


def generate(world, features, prompts=("a star", "a heart"), steps=1, **options):
    world.pipe.set_rtsae_features(features, **options)
    world.draw(world.pipe, prompts, steps=steps)


def other(world, site: str = SITE, channels: int = 160, broken: str | None = None, **options) -> None:
    """Steer with a new dictionary, in which latent 1 may be broken."""
    rtsae = RTSAE(site, channels, [900, 1], 8, 2).requires_grad_(False)
    if broken:
        getattr(rtsae, broken)[1] = float("nan")
    world.pipe.unload_rtsae()
    world.pipe.load_rtsae({site: rtsae})
    generate(world, {1: 1.0}, **options)


def theirs(world, case, load=load_dictionary, rename: str | None = None, **files: bytes):
    """What somebody else published, with other files, loaded if need be."""
    folder = case.write(world.empty / "theirs")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if rename:
        folder = next(folder.iterdir()).rename(world.empty / rename)
    return load(folder) if load else folder


def map_of_a_transcoder(world):
    sae = SparseAutoencoder(SITE, 160, [667, 1], 8, 2, activation="input", centred=False)
    world.pipe.unload_rtsae()
    world.pipe.load_rtsae({SITE: sae})
    fit_feature(world.pipe, [("a blue star", "a red star")], rank=1, num_inference_steps=1)


def two_sites() -> Dictionary:
    labels = {"low": {"features": [{"site": "down", "latents": [1], "weights": [1.0]}]}}
    return Dictionary({site: RTSAE(site, 8, [900, 1], 8, 2) for site in ("down", "up")}, labels)


def rewritten(name: str, **changes):
    """The small folder with other values in a JSON file."""

    def load(world):
        path = world.folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        load_dictionary(world.folder)

    return load


def label(**changes):
    entry = {"site": SMALL, "latents": [1], "weights": [1.0]} | changes
    return rewritten(LABELS_NAME, red={"features": [entry]})


def replaced(name: str, content: bytes | None):
    """The small folder with another file there, or none."""

    def load(world):
        (world.folder / name).unlink()
        if content is not None:
            (world.folder / name).write_bytes(content)
        load_dictionary(world.folder)

    return load


def weights(**changes):
    """The small folder with other tensors."""

    def load(world):
        path = world.folder / SMALL / WEIGHTS_NAME
        save_file(load_file(path) | changes, path)
        load_dictionary(world.folder)

    return load


def maps(content: bytes | None = None, **tensors):
    """The small folder with a label that has a map of its own."""

    def load(world):
        entry = {"site": SMALL, "latents": [], "weights": [], "bounds": [0, 1], "map": "red"}
        (world.folder / LABELS_NAME).write_text(json.dumps({"red": {"features": [entry]}}))
        path = world.folder / MAPS_NAME
        path.write_bytes(content) if content else save_file(tensors, path)
        load_dictionary(world.folder)

    return load


def fitted(pairs=(("a star", "a heart"),), latents=1, **call):
    return lambda world: fit_feature(world.pipe, pairs, latents, progress=False, num_inference_steps=1, **call)


def fitted_in_a_broken_denoiser(world):
    bias = world.pipe.unet.conv_out.bias
    kept = bias.detach().clone()
    try:
        bias.data[0] = float("nan")
        fitted()(world)
    finally:
        bias.data.copy_(kept)


def fitted_when_compiled(world):
    """As people do it: the pipeline holds what `torch.compile` returned."""
    plain = world.pipe.unet
    try:
        world.pipe.unet = torch.compile(plain)
        fitted()(world)
    finally:
        world.pipe.unet = plain


def fitted_with_nothing(world):
    """A dictionary whose latents write nothing."""
    rtsae = RTSAE(SITE, 160, [900, 1], 8, 2).requires_grad_(False)
    rtsae.decoder.zero_()
    world.pipe.unload_rtsae()
    world.pipe.load_rtsae({SITE: rtsae})
    patch = pytest.MonkeyPatch()
    with patch.context() as less:
        for name in ("_PICTURES", "_LAST", "_STEPS", "_CHOICE"):
            less.setattr(fit, name, 2)
        fitted()(world)


def local(**options):
    return lambda world: load_dictionary(world.folder, **options)


def save_nan(world):
    broken = RTSAE(SMALL, 8, [900, 1], 8, 2).requires_grad_(False)
    broken.decoder[3] = float("nan")
    Dictionary({SMALL: broken}).save(world.empty / "new")


def save_through_link(world):
    (world.empty / "link").mkdir()
    (world.empty / "link" / SMALL).symlink_to(world.folder)
    load_dictionary(world.folder).save(world.empty / "link")


def another_model(world, **config):
    world.pipe.unload_rtsae()
    world.pipe.load_rtsae(Dictionary(world.dictionary.sites, {}, world.dictionary.config | config))


def another_sampler(scheduler, steps):
    def misuse(world):
        world.pipe.scheduler = scheduler
        generate(world, {"red": 1.0}, steps=steps)

    return misuse


def metadata_name(text: list[float], pooled: list[float] | None = None, prompts: int | None = None, **variables):
    """What rows are that carry these numbers as their texts."""
    given = {"encoder_hidden_states": text, "pooled_projections": text if pooled is None else pooled}
    told = {name: torch.tensor(values)[:, None].expand(-1, 3) for name, values in given.items()}
    arguments = Arguments(["sample", *told], (torch.zeros(len(text), 4),), told)
    caller = denoiser.Caller(object(), denoiser.Family(""), variables, denoiser.Generation(), 0, "")
    return rows.roles_of(arguments, caller, rows.Drawn(len(text), prompts), False, rows.Turn())


def record_without_a_grid(world):
    with Recorder(world.pipe, [TEXT_SITE]) as recorder:
        world.draw(world.pipe, steps=1)
    recorder.size(TEXT_SITE)


def without_scheduler(world):
    feature("red")(world)
    pipe = Caller(world.pipe)
    pipe.scheduler = None
    pipe(2, 1)


def replaced_denoiser(world):
    before = world.pipe.unet
    try:
        world.pipe.unet = UNet2DConditionModel.from_config(before.config)
        world.draw(world.pipe, steps=1)
    finally:
        world.pipe.unet = before


def unloaded(world):
    world.pipe.unload_rtsae()
    world.pipe.set_rtsae_features({"red": 1.0})


def deleted(world):
    world.pipe.delete_rtsae("default")
    world.pipe.set_rtsae_features({"red": 1.0})


def several_adapters(world):
    world.pipe.load_rtsae(world.dictionary, "second")
    world.pipe.set_rtsae_features({"red": 1.0})


def record_elsewhere(world):
    with Recorder(world.pipe, [SITE]) as recorder:
        world.draw(world.pipe, steps=1)
    recorder.trajectories("mid_block")


def record_a_stream_that_is_not_there(world):
    with Recorder(world.pipe, [SITE], streams=("cond", "perturbed")) as recorder:
        world.draw(world.pipe, steps=1)
    recorder.trajectories(SITE)


def preset(world, content):
    Dictionary(world.dictionary.sites, {}, {}, {"mine": content}).preset("mine")


def flow_pipeline(world):
    world.pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    return world.pipe


def quiet_feature(world):
    return SITE, int(recorded(world).presence(SITE).sum((0, 1)).argmin())


def trace_two_sites(world):
    world.pipe.unload_rtsae()
    sites = ("mid_block", SITE)
    world.pipe.load_rtsae({site: RTSAE(site, n, [900, 1], 8, 2) for site, n in zip(sites, (192, 160), strict=True)})
    recorded(world).maps([(site, 1) for site in sites])


def record_two_kinds(world):
    world.pipe.unload_rtsae()
    kinds = {"mid_block": (192, "output"), SITE: (160, "update")}
    world.pipe.load_rtsae({site: RTSAE(site, n, [900, 1], 8, 2, kind) for site, (n, kind) in kinds.items()})
    recorded(world)


def recorded(world, **options):
    return record(world.pipe, "a star", num_inference_steps=1, **options)


def demo_without_labels(world):
    Dictionary(world.dictionary.sites, {}, world.dictionary.config).save(world.empty / "unlabelled")
    cli.demo(world.empty / "out", WORLDS["shapes"], None, world.empty / "unlabelled", steps=1, prompts=1)


def train_without_the_trainer(world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.training, "ROOT", world.empty)
        cli.training.run_trainer("train", [])


def no_utf8(world):
    (world.empty / "prompts.txt").write_bytes("a star\n\nein größerer Stern\n".encode("latin-1"))
    read_lines(world.empty / "prompts.txt")


def save_on_a_full_disk(world):
    with full_disk(1_000_000):  # labels fit, rows do not
        world.dictionary.save(world.empty / "saved")


def command_line_without_typer(world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "typer", None)  # what Python finds where it is not installed
        runpy.run_path(cli.common.__file__)


def app_without_gradio(world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gradio", None)
        for name in [name for name in sys.modules if name.startswith("diffusers_rtsae.app")]:
            patch.delitem(sys.modules, name)
        cli.app_()


def report_of_nothing(world, prompts=("a star",)):
    world.pipe.unload_rtsae()
    world.pipe.load_rtsae(Dictionary(world.dictionary.sites, {}, world.dictionary.config))
    write_report(world.pipe, world.empty / "report.html", prompts, count=0)


# what was done: how, what is raised, and the whole message, where … stands for anything
MISUSE = {
    # Pipelines and adapters
    "nothing is loaded": (unloaded, ValueError, "No dictionary is loaded; call `load_rtsae` first."),
    "the last was deleted": (deleted, ValueError, "No dictionary is loaded; call `load_rtsae` first."),
    "a pipeline without denoiser": (
        lambda world: DiffusionPipeline().load_rtsae(world.dictionary),
        ValueError,
        "DiffusionPipeline has no denoiser: expected a component of ['unet', 'transformer', …].",
    ),
    "a name that is taken": (
        lambda world: world.pipe.load_rtsae(world.dictionary),
        ValueError,
        "A dictionary named 'default' is loaded already; pass another `adapter_name` or call `unload_rtsae`.",
    ),
    "an unknown adapter": (
        lambda world: world.pipe.set_rtsae("second"),
        ValueError,
        "Expected `adapter_name` to be one of ['default'], got 'second'.",
    ),
    "no adapter of several": (
        several_adapters,
        ValueError,
        "Expected `adapter_name` to be one of ['default', 'second'], got None.",
    ),
    "more weights than adapters": (
        lambda world: world.pipe.set_rtsae(["default"], [1.0, 2.0]),
        ValueError,
        "Expected one weight per adapter, got 2 weights for ['default'].",
    ),
    "a weight that is no number": (
        lambda world: world.pipe.set_rtsae("default", float("nan")),
        ValueError,
        "Expected finite weights, got [nan].",
    ),
    # Features
    "features without strengths": (
        lambda world: world.pipe.set_rtsae_features("red"),
        ValueError,
        "Expected features as a dict {label or index: strength}, got str.",
    ),
    "a misspelt label": (
        feature("purpel"),
        ValueError,
        "The dictionary has no feature labelled 'purpel'. Did you mean ['purple', …]?",
    ),
    "a label like none": (
        feature("x"),
        ValueError,
        "The dictionary has no feature labelled 'x'. It has ['black', 'blue', …, 'white', 'yellow'].",
    ),
    "an index in quotes": (
        feature("1234"),
        ValueError,
        "The dictionary has no feature labelled '1234'; the feature of that index is 1234, without quotes.",
    ),
    "a label of a site that is not loaded": (
        lambda world: Dictionary({"up": two_sites().sites["up"]}, two_sites().labels).features("low"),
        ValueError,
        "'low' lives at ['down'], of which none is loaded; loaded are ['up'].",
    ),
    "an index of several sites": (
        lambda world: two_sites().features(3),
        ValueError,
        "Several sites are loaded, so feature 3 needs one: use (site, 3) with a site of ['down', 'up'].",
    ),
    "an index that is no number": (
        feature(1.5),
        ValueError,
        "Expected a label, an index or (site, index) as a feature, got 1.5.",
    ),
    "an index that does not exist": (
        feature(2048),
        ValueError,
        f"Feature 2048 does not exist: the dictionary of {SITE} has features 0 to 2047.",
    ),
    "a feature of an unknown site": (
        feature(("up_blocks.2", 3)),
        ValueError,
        f"The dictionary has no site 'up_blocks.2'. Did you mean ['{SITE}']?",
    ),
    "a strength that is no number": (
        steer("strong"),
        ValueError,
        "A strength must be a finite number or a list of them, one per prompt; got 'strong'.",
    ),
    "a strength that is not finite": (
        steer([1.0, float("inf")]),
        ValueError,
        "A strength must be a finite number or a list of them, one per prompt; got (1.0, inf).",
    ),
    "no strength": (
        steer([]),
        ValueError,
        "A strength must be a finite number or a list of them, one per prompt; got ().",
    ),
    "a schedule of another shape": (
        steer(torch.zeros(2, 2, 2)),
        ValueError,
        "A schedule must be a tensor (steps,) or (steps, prompts), got shape (2, 2, 2).",
    ),
    "a schedule that is not finite": (
        steer(torch.tensor([0.0, float("nan")])),
        ValueError,
        "A schedule must hold finite numbers, got NaN or inf.",
    ),
    "a function that gives no number": (
        lambda world: generate(world, {"red": lambda progress: "strong"}),
        ValueError,
        "The schedule gave 'strong' at progress 0, expected finite numbers.",
    ),
    "three strengths for two prompts": (
        lambda world: generate(world, {"red": [1.0, 2.0, 3.0]}),
        ValueError,
        "Expected 1 or as many strengths as prompts (2), got 3.",
    ),
    "two strengths for four prompts": (
        lambda world: generate(world, {"red": [1.0, 2.0]}, ["a star", "a heart", "a cross", "a circle"]),
        ValueError,
        "Expected 1 or as many strengths as prompts (4), got 2.",
    ),
    "three masks for two prompts": (
        lambda world: generate(world, {"red": 1.0}, mask=np.ones((3, 8, 8))),
        ValueError,
        "Expected 1 or as many masks as prompts (2), got 3.",
    ),
    # Options
    "a misspelt option": (
        steer(strenght=2.0),
        ValueError,
        "Unknown option 'strenght'; an edit has ['apply_to', 'clip', 'end', 'injection', 'mask', 'operation', "
        "'renormalise', 'source', 'start', 'where'].",
    ),
    "an option that the feature decides": (
        steer(latents=(1,)),
        ValueError,
        "Unknown option 'latents'; an edit has ['apply_to', …].",
    ),
    "an unknown operation": (
        steer(operation="erase"),
        ValueError,
        "`operation` must be one of ['add', 'set', 'scale', 'clamp', 'ablate', 'ablate_to_mean', 'transfer', "
        "'replace'], got 'erase'.",
    ),
    "an unknown half": (
        steer(apply_to="uncond"),
        ValueError,
        "`apply_to` must be one of ['cond', 'all', 'contrast'], got 'uncond'.",
    ),
    "an unknown injection": (
        steer(injection="step"),
        ValueError,
        "`injection` must be one of ['trajectory', 'residual'], got 'step'.",
    ),
    "a window before the beginning": (
        steer(start=-0.1),
        ValueError,
        "Expected 0 <= start <= end <= 1, got start=-0.1, end=1.0.",
    ),
    "a window after the end": (steer(end=1.5), ValueError, "Expected 0 <= start <= end <= 1, got start=0.0, end=1.5."),
    "a window that ends before it begins": (
        steer(start=0.6, end=0.5),
        ValueError,
        "Expected 0 <= start <= end <= 1, got start=0.6, end=0.5.",
    ),
    "a window that is no number": (
        steer(start="0.2"),
        ValueError,
        "Expected 0 <= start <= end <= 1, got start='0.2', end=1.0.",
    ),
    "transfer from nothing": (
        steer(operation="transfer"),
        ValueError,
        "'transfer' needs a `source` feature at the same site to take from.",
    ),
    "replace of nothing": (
        steer(operation="replace"),
        ValueError,
        "'replace' needs a `source` feature at the same site to take from.",
    ),
    "a source that is not used": (
        steer(source="blue"),
        ValueError,
        "`source` is for 'transfer' and 'replace', not for 'add'.",
    ),
    "a source without features": (
        steer(operation="transfer", source=[]),
        ValueError,
        "`source` names no latent of this site, so the edit would act nowhere.",
    ),
    "nowhere": (steer(where=[]), ValueError, "`where` names no latent of this site, so the edit would act nowhere."),
    "a mask that is a path": (
        steer(mask="mask.png"),
        ValueError,
        "A mask must be a PIL image, an array or a tensor, got str.",
    ),
    "a mask of one dimension": (
        steer(mask=np.ones(4)),
        ValueError,
        "A mask must be (height, width), (prompts or frames, height, width) or (prompts, frames, height, width), got "
        "shape (4,).",
    ),
    "a mask of frames for pictures": (
        lambda world: generate(world, {"red": 1.0}, mask=np.ones((2, 3, 4, 5))),
        ValueError,
        "The mask is for 3 frames, and a picture has one.",
    ),
    "a mask without pixels": (
        steer(mask=np.ones((0, 4))),
        ValueError,
        "A mask must be (height, width), (prompts or frames, height, width) or (prompts, frames, height, width), got "
        "shape (1, 0, 4).",
    ),
    "a mask of bytes": (
        steer(mask=np.array([[0, 255]])),
        ValueError,
        "A mask must lie in [0, 1], got values from 0 to 255.",
    ),
    "the place where no grid is": (
        lambda world: LinearMap(torch.zeros(1, 3, 2 * 8 + 1 + PLACES))(torch.zeros(1, 5, 8), Step(500, 1.0)),
        ValueError,
        "A label's map reads where in the picture a token is, and these 5 lie on no grid.",
    ),
    "a mask where no grid is": (
        lambda world: other(world, TEXT_SITE, mask=np.ones((8, 8))),
        ValueError,
        "Cannot lay 32 tokens of … out over a 16x16 latent of 1 frames; spatial masks need a grid.",
    ),
    # What does not fit the pipeline
    "a site that the model lacks": (
        lambda world: other(world, "up_blocks.1.attentions.7", 8),
        ValueError,
        f"UNet2DConditionModel has no site 'up_blocks.1.attentions.7'. The closest are […'{SITE}'…]; "
        "`list_sites(denoiser)` has all.",
    ),
    "the sites of something else": (
        lambda world: list_sites("unet"),
        ValueError,
        "str has no denoiser: expected a component of ['unet', 'transformer', …].",
    ),
    "a denoiser put in the place of one with a dictionary": (
        replaced_denoiser,
        ValueError,
        "The unet was replaced after `load_rtsae`, and the new one has none of the dictionaries ['default']: call "
        "`load_rtsae` again, or `unload_rtsae` first to go on without.",
    ),
    "a dictionary of another width": (
        lambda world: other(world, SITE, 8),
        ValueError,
        f"The dictionary of {SITE} is for 8 channels, the model has 160 there.",
    ),
    "another width that shows only when running": (
        lambda world: other(world, TEXT_SITE, 8),
        ValueError,
        f"The dictionary of {TEXT_SITE} is for 8 channels, the model has 160 there.",
    ),
    "a dictionary of another model": (
        lambda world: another_model(
            world, base_model="sd15", signature=world.dictionary.config["signature"] | {"cross_attention_dim": 768}
        ),
        ValueError,
        "The dictionary is for sd15, which is no match for this pipeline: cross_attention_dim 768 there, 192 here.",
    ),
    "a signature of another form": (
        lambda world: another_model(world, signature="UNet"),
        ValueError,
        "The `signature` in rtsae_config.json must be an object, got 'UNet'.",
    ),
    "a broken decoder": (
        lambda world: other(world, broken="decoder"),
        ValueError,
        f"The dictionary of {SITE} holds NaN or inf in rows [1].",
    ),
    "a broken encoder": (
        lambda world: other(world, broken="encoder"),
        ValueError,
        f"The dictionary of {SITE} holds NaN or inf in rows [1].",
    ),
    "a sampler with another unit of time": (
        another_sampler(Odd(), 2),
        ValueError,
        "Odd calls with timestep 7000, expected 0 to 1000: a sampler that counts time in another unit cannot be "
        "followed.",
    ),
    "a sampler that does not say its unit": (
        lambda world: training_time(1.0, SimpleNamespace(config={})),
        ValueError,
        "SimpleNamespace does not say how many training steps there are: a sampler that counts time in another unit "
        "cannot be followed.",
    ),
    "a batch of an unknown layout": (
        lambda world: (feature("red")(world), Caller(world.pipe)(3, 1)),
        ValueError,
        "Caller calls the denoiser with 3 rows for each image: this layout of guidance is not supported; expected "
        "uncond + cond.",
    ),
    "guidance in another order": (
        lambda world: (steer(apply_to="contrast")(world), Caller(world.pipe)(1, 1, unconditional=True)),
        ValueError,
        "This pipeline calls the denoiser for another part of guidance before the conditional one, which "
        "apply_to='contrast' follows. Use apply_to='cond'.",
    ),
    "rows that are told apart by nothing": (
        lambda world: metadata_name([0.0, 1.0], negative_prompt_embeds=torch.zeros(1, 3)),
        ValueError,
        "Some of the 2 rows that the denoiser is called with carry the negative prompt, and their layout is not "
        "known.",
    ),
    "rows of two prompts at once": (
        lambda world: metadata_name([0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0], prompts=2),
        ValueError,
        "object gives an image the text of one prompt and the pooled text of another, where there are several prompts "
        "and several images of each: draw one at a time.",
    ),
    "rows at a site that are no multiple": (
        lambda world: list(CallReader().read(Arguments(["x"], (torch.zeros(2, 3),), {})).parts_of(5)),
        ValueError,
        "The denoiser is called with 2 rows and has 5 at this site: expected a multiple, as frames beside one another "
        "are.",
    ),
    "the grid of what has none": (
        record_without_a_grid,
        ValueError,
        "Cannot lay 32 tokens of … out over a 16x16 latent.",
    ),
    "some of the images": (
        lambda world: (feature("red")(world), Caller(world.pipe)(1, 2, images=2)),
        ValueError,
        "The denoiser is called for 1 of 2 images at a time, which cannot be followed: draw one alone.",
    ),
    "a family that is refused": (
        lambda world: (feature("red")(world), Cosmos3Like(world.pipe)(1, 1)),
        ValueError,
        "Cosmos3Like cannot be followed: it packs prompts into one sequence, which has no rows.",
    ),
    "a loop without its timestep": (
        lambda world: (feature("red")(world), Caller(world.pipe)(2, 1, t=None)),
        ValueError,
        "Caller calls its denoiser at 999.5, which is none of its sampler's timesteps, and has no variable `t` that "
        "says where it is: expected either.",
    ),
    "frames at different times": (
        lambda world: (feature("red")(world), Caller(world.pipe)(2, 1, t=torch.tensor([1.0, 500.0]))),
        ValueError,
        "Caller denoises frames or images at different times in one call: that cannot be followed, as an edit has one "
        "time.",
    ),
    "a schedule that gives another number of strengths later": (
        lambda world: (
            world.pipe.set_rtsae_features({"red": lambda progress: 1.0 if progress < 0.5 else [1.0, 2.0]}),
            world.draw(world.pipe, ["a star"], 4, 0),
        ),
        ValueError,
        "A schedule gives 2 strengths at t = …, for 1 rows.",
    ),
    "another number of tokens later": (
        lambda world: (
            world.pipe.set_rtsae_features({(SITE, i): 1.0 for i in range(40)}, operation="ablate"),
            [
                world.pipe.unet(torch.zeros(1, 4, size, size), t, torch.zeros(1, 32, 192))
                for size, t in ((16, 900), (16, 500))
            ],
            world.pipe.unet.get_submodule(SITE)(torch.zeros(1, 160, 4, 4), torch.zeros(1, 32, 192)),
        ),
        ValueError,
        "There were 64 tokens at up_blocks.1.attentions.1 and are 16 now: latents that are read from the past of each "
        "token cannot follow that.",
    ),
    "reading latents of states that were drawn without": (
        lambda world: Intervention(
            {SITE: [Edit(latents=(3,), weights=(1.0,), strength=1.0, operation="ablate", clip=False)]},
            States(world.pipe, [("a star", "a heart")], codes=False, num_inference_steps=2),
        ),
        ValueError,
        "Latents of up_blocks.1.attentions.1 are read, and these states were drawn without: codes=True.",
    ),
    "choosing latents of what has no gradient": (
        lambda world: gradient(torch.zeros(()), []),
        ValueError,
        "The denoiser gives no gradient, and by that latents are chosen; a linear map needs none.",
    ),
    "recording nothing": (
        lambda world: Recorder(world.pipe, [SITE]).size(SITE),
        ValueError,
        "Nothing was recorded at 'up_blocks.1.attentions.1': run the pipeline inside the `with` block first.",
    ),
    "recording another number of tokens later": (
        recorded_at_two_sizes,
        ValueError,
        "'up_blocks.1.attentions.1' has [64, 256] tokens at one step or text and another: expected one number.",
    ),
    "a pipeline without scheduler": (
        without_scheduler,
        ValueError,
        "Caller has no scheduler that says at which timestep it is.",
    ),
    "a denoiser that is called with nothing": (
        lambda world: Arguments(["sample"], (), {}),
        ValueError,
        "The denoiser is called without a sample.",
    ),
    "a block that returns several things": (
        lambda world: Block("x").output((torch.zeros(1), torch.zeros(1))),
        ValueError,
        "This block returns 2 things, and which of them are the image's hidden states is not known: expected a "
        "tensor, a tensor with skip connections, or a class that `denoiser/blocks.py` or diffusers' "
        "`TransformerBlockRegistry` lists.",
    ),
    # Dictionaries in memory
    "a dictionary without sites": (lambda world: Dictionary({}), ValueError, "A dictionary needs at least one site."),
    "a dictionary of something else": (
        lambda world: world.pipe.load_rtsae({SITE: "folder"}, "second"),
        ValueError,
        f"Expected a dictionary of site '{SITE}' under that name, got 'str'.",
    ),
    "a dictionary under another name": (
        lambda world: world.pipe.load_rtsae({"mid_block": world.dictionary.sites[SITE]}, "second"),
        ValueError,
        f"Expected a dictionary of site 'mid_block' under that name, got '{SITE}'.",
    ),
    "a site that is no path": (
        lambda world: Dictionary({"../up": RTSAE("../up", 8, [900, 1], 8, 2)}),
        ValueError,
        "A site is the path of a module, got '../up'.",
    ),
    "a subfolder of what is in memory": (
        lambda world: world.pipe.load_rtsae(world.dictionary, "second", subfolder="v2"),
        ValueError,
        "`subfolder`, `revision` and `dtype` are for folders and the Hub, but a dictionary was passed.",
    ),
    "a revision of what is in memory": (
        lambda world: world.pipe.load_rtsae(world.dictionary, "second", revision="v2"),
        ValueError,
        "`subfolder`, `revision` and `dtype` are for folders and the Hub, but a dictionary was passed.",
    ),
    "a dtype of what is in memory": (
        lambda world: world.pipe.load_rtsae(world.dictionary, "second", dtype=torch.float16),
        ValueError,
        "`subfolder`, `revision` and `dtype` are for folders and the Hub, but a dictionary was passed.",
    ),
    "an unknown layer in memory": (
        lambda world: world.pipe.load_rtsae(world.dictionary, "second", layers=["down"]),
        ValueError,
        f"The dictionary has no site 'down'. It has ['{SITE}'].",
    ),
    "anchors that ascend": (
        lambda world: RTSAE(SMALL, 8, [1, 900], 8, 2),
        ValueError,
        "`anchors` must be strictly descending timesteps, got [1, 900].",
    ),
    "anchors that repeat": (
        lambda world: RTSAE(SMALL, 8, [900, 900], 8, 2),
        ValueError,
        "`anchors` must be strictly descending timesteps, got [900, 900].",
    ),
    "no anchors": (
        lambda world: RTSAE(SMALL, 8, [], 8, 2),
        ValueError,
        "`anchors` must be strictly descending timesteps, got [].",
    ),
    "an unknown activation": (
        lambda world: RTSAE(SMALL, 8, [900, 1], 8, 2, activation="middle"),
        ValueError,
        "`activation` of RTSAE must be one of ['output', 'update'], got 'middle'.",
    ),
    "an unknown sparsity": (
        lambda world: SparseAutoencoder(SMALL, 8, [900, 1], 8, 2, sparsity="relu"),
        ValueError,
        "`sparsity` must be one of ['threshold', 'topk', 'batch_topk', 'sample_topk'], with k up to 8, got 'relu' "
        "with 2.",
    ),
    "an unknown norm of the input": (
        lambda world: SparseAutoencoder(SMALL, 8, [900, 1], 8, 2, input_norm="batch"),
        ValueError,
        "`centred` must be a bool and `input_norm` one of [None, 'layer', 'length'], got True and 'batch'.",
    ),
    "a scale of time that is no number": (
        lambda world: TIDE(SMALL, 8, [900, 1], 8, 2, time_scale=float("nan")),
        ValueError,
        "Expected bools `undone` and `flip_sin_to_cos`, and numbers `time_scale` and `downscale_freq_shift`, got "
        "True, True, nan and 0.0.",
    ),
    "an odd embedding of time": (
        lambda world: TIDE(SMALL, 8, [900, 1], 8, 2, time_channels=7),
        ValueError,
        "`time_channels` must be an even number, got 7.",
    ),
    "experts of different sizes": (
        lambda world: MixtureSAE(SMALL, 8, [900, 1], 8, 2, num_experts=4, shared_latents=2),
        ValueError,
        "Expected two experts or more, of as many latents each, of the 8 without those shared; got 4 experts and 2 "
        "shared.",
    ),
    "unknown metadata": (
        lambda world: MixtureSAE(SMALL, 8, [900, 1], 8, 2, num_experts=2, metadata=["hour"]),
        ValueError,
        "`metadata` must be some of ['time', 'row', 'column', 'guidance'], got ['hour'].",
    ),
    "trajectories of another width": (
        lambda world: world.dictionary.sites[SITE].encode(torch.zeros(2, 3, 8)),
        ValueError,
        "Expected trajectories (batch, 1 to 3 anchors, 160 channels), got shape (2, 3, 8).",
    ),
    "trajectories of too many anchors": (
        lambda world: world.dictionary.sites[SITE].encode(torch.zeros(2, 4, 160)),
        ValueError,
        "Expected trajectories (batch, 1 to 3 anchors, 160 channels), got shape (2, 4, 160).",
    ),
    "one activation": (
        lambda world: world.dictionary.sites[SITE].encode(torch.zeros(160)),
        ValueError,
        "Expected trajectories (batch, 1 to 3 anchors, 160 channels), got shape (160,).",
    ),
    # Folders
    "nothing": (
        lambda world: load_dictionary(None),
        ValueError,
        "Expected a Hub id, a folder or a dict of dictionaries by site, got NoneType.",
    ),
    "an empty string": (
        lambda world: load_dictionary(""),
        ValueError,
        "Expected a Hub id, a folder or a dict of dictionaries by site, got an empty string.",
    ),
    "one RTSAE": (
        lambda world: load_dictionary(world.dictionary.sites[SITE]),
        ValueError,
        "Expected a Hub id, a folder or a dict of dictionaries by site, got RTSAE.",
    ),
    "a Hub id that is not in the cache": (
        lambda world: load_dictionary("org/none", cache_dir=world.empty / "cache", local_files_only=True),
        OSError,
        "'org/none' is no folder here, and no dictionary that could be fetched from the Hub: it is not in the cache, "
        "or not all of it, and nothing may be downloaded.",
    ),
    "a folder that does not exist": (
        lambda world: load_dictionary(world.empty / "nowhere", local_files_only=True),
        OSError,
        "'…nowhere' is no folder here, and no dictionary that could be fetched from the Hub: …",
    ),
    "a folder of something else": (
        lambda world: load_dictionary(world.empty),
        OSError,
        "… is no dictionary: expected rtsae_config.json in it, found ['small']. Did you mean ['…small']?",
    ),
    "a folder of somebody else's": (
        lambda world: read_contents(sdlens().write(world.empty / "theirs")),
        OSError,
        "… holds files of SDLens, which say neither labels nor how active latents are; this makes a dictionary of "
        "them: diffusers-rtsae convert …theirs OUT",
    ),
    "a folder without labels": (
        replaced(LABELS_NAME, None),
        OSError,
        "… is no dictionary: expected labels.json in it, found ['README.md', 'mid_block', 'rtsae_config.json'].",
    ),
    "a subfolder that does not exist": (
        local(subfolder="v2"),
        OSError,
        "…v2 is no dictionary: expected rtsae_config.json in it, found nothing.",
    ),
    "a subfolder outside": (
        local(subfolder="../small"),
        ValueError,
        "`subfolder` must lie inside the folder or repository, got '../small'.",
    ),
    "a revision of a folder": (
        local(revision="v1"),
        ValueError,
        "`revision` is for the Hub, but '…small' is a folder here.",
    ),
    "a download without the network": (
        lambda world: load_dictionary("org/name", force_download=True, local_files_only=True),
        ValueError,
        "`force_download` and `local_files_only` exclude each other.",
    ),
    "a name as dtype": (
        local(dtype="float16"),
        ValueError,
        "Expected `dtype` to be one of [torch.float16, torch.bfloat16, torch.float32], got 'float16'.",
    ),
    "a dtype that weights cannot have": (
        local(dtype=torch.float64),
        ValueError,
        "Expected `dtype` to be one of [torch.float16, torch.bfloat16, torch.float32], got torch.float64.",
    ),
    "one layer without a list": (
        local(layers=SMALL),
        ValueError,
        "Expected `layers` as a list of sites, got the string 'mid_block'.",
    ),
    "an unknown layer": (
        local(layers=["mid_blocks"]),
        ValueError,
        "The dictionary has no site 'mid_blocks'. Did you mean ['mid_block']?",
    ),
    # Files
    "damaged JSON": (
        replaced(LABELS_NAME, b"{"),
        ValueError,
        "…labels.json is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    "JSON of something else": (
        replaced(CONFIG_NAME, b"[]"),
        ValueError,
        "…rtsae_config.json must hold a JSON object, got list.",
    ),
    "another format": (
        rewritten(CONFIG_NAME, format_version=99),
        ValueError,
        "…rtsae_config.json has format version 99, this version reads 1.",
    ),
    "a base model that is no name": (
        rewritten(CONFIG_NAME, base_model=3),
        ValueError,
        "…rtsae_config.json must name its `base_model`, got 3.",
    ),
    "sites that are no paths": (
        rewritten(CONFIG_NAME, sites=["../up"]),
        ValueError,
        "…rtsae_config.json must list its `sites` as module paths, got ['../up'].",
    ),
    "a label of another form": (
        rewritten(LABELS_NAME, red=[1]),
        ValueError,
        "…labels.json: label 'red' must be an object with a list `features` and, if any, an object `edit` and a list "
        "`seen`.",
    ),
    "a label of an unknown site": (
        label(site="up"),
        ValueError,
        "…labels.json: each feature of 'red' needs a site of ['mid_block'], and as many weights as latents.",
    ),
    "a label of a latent that does not exist": (
        label(latents=[16]),
        ValueError,
        "…labels.json: 'red' names latent 16, but mid_block has 0 to 15.",
    ),
    "a label with weights that are no numbers": (
        label(weights=["1"]),
        ValueError,
        "…labels.json: the weights of 'red' must be finite numbers, got ['1'].",
    ),
    "a label that acts where nothing is": (
        label(where=[]),
        ValueError,
        "…labels.json: `where` of 'red' names no latent, so the edit would act nowhere.",
    ),
    "a label with options of no edit": (
        rewritten(
            LABELS_NAME,
            red={"features": [{"site": SMALL, "latents": [1], "weights": [1.0]}], "edit": {"apply_to": "none"}},
        ),
        ValueError,
        "…labels.json: 'red' cannot be used: `apply_to` must be one of ['cond', 'all', 'contrast'], got 'none'.",
    ),
    "a part of a label without bounds": (
        label(operation="ablate"),
        ValueError,
        "…labels.json: the `bounds` of 'red' must be two numbers around 0, got None.",
    ),
    "a part of a label that is no part": (
        label(bounds=[0, 1], operation="set"),
        ValueError,
        "…labels.json: a part of 'red' must 'add' or 'ablate', got 'set'.",
    ),
    "a label of a map that is not there": (
        label(bounds=[0, 1], latents=[], weights=[], map="red"),
        ValueError,
        "…labels.json: 'red' must name one of the maps and no latents, got 'red'.",
    ),
    "labels without their maps": (
        lambda world: Dictionary(world.dictionary.sites, world.dictionary.labels),
        ValueError,
        "The label 'white' has a map of its own, which is missing.",
    ),
    "the path of a label that has nothing but a map": (
        lambda world: Dictionary(
            world.dictionary.sites,
            {"own": {"features": [{"site": next(iter(world.dictionary.sites)), "latents": [], "map": "own"}]}},
            maps={"own": torch.zeros(1, 3, 17)},
        ).trajectory("own"),
        ValueError,
        "The label 'own' moves no latents and is seen by none.",
    ),
    "a map of another shape": (
        maps(red=torch.zeros(2, 3, 8)),
        ValueError,
        "The map of 'red' has another shape than mid_block needs.",
    ),
    "a map that is none": (
        maps(red=torch.zeros(8)),
        ValueError,
        "…maps.safetensors: 'red' is no map: expected (rank, anchors, 2 channels + 1) floats.",
    ),
    "a map that is not finite": (
        maps(red=torch.full((1, 3, 17), float("nan"))),
        ValueError,
        "…maps.safetensors holds NaN or inf in 'red'.",
    ),
    "damaged maps": (
        maps(b"maps"),
        OSError,
        "…maps.safetensors is damaged or no safetensors file: …",
    ),
    "saving a map that is too large": (
        lambda world: save_tensors({"red": torch.tensor([1e9])}, world.empty / "maps.safetensors"),
        ValueError,
        "'red' holds NaN, inf, or what is too large for float16.",
    ),
    "pairs in a file that cannot be read": (
        lambda world: read_pairs(world.empty / "none.json"),
        ValueError,
        "…none.json cannot be read as JSON: …",
    ),
    "pairs in a file of something else": (
        lambda world: read_pairs(world.folder / LABELS_NAME),
        ValueError,
        "…labels.json must hold a list of [from, to] prompts.",
    ),
    "a map that takes away": (
        lambda world: Edit(latents=(1,), weights=(1.0,), strength=1.0, map=torch.zeros(1, 3, 17)),
        ValueError,
        "A map adds, unclipped, and to no latents.",
    ),
    "a site without safetensors": (
        replaced(f"{SMALL}/{WEIGHTS_NAME}", None),
        OSError,
        "Expected config.json and diffusion_pytorch_model.safetensors (safetensors only) in …mid_block, found "
        "['config.json'].",
    ),
    "damaged weights": (
        replaced(f"{SMALL}/{WEIGHTS_NAME}", b"weights"),
        OSError,
        "…diffusion_pytorch_model.safetensors is damaged or no safetensors file: …",
    ),
    "weights that are not finite": (
        weights(threshold=torch.tensor([0.0, float("nan"), 0.0])),
        ValueError,
        "…diffusion_pytorch_model.safetensors holds NaN or inf in 'threshold'.",
    ),
    "weights of another shape": (
        weights(threshold=torch.zeros(4)),
        ValueError,
        "The weights in …diffusion_pytorch_model.safetensors do not fit its config.json: 'threshold' has shape [4] "
        "instead of [3].",
    ),
    "a configuration of another site": (
        rewritten(f"{SMALL}/config.json", site="up"),
        ValueError,
        "…config.json must be of site 'mid_block', got 'up'.",
    ),
    "a configuration of a kind of somebody else": (
        rewritten(f"{SMALL}/config.json", _class_name="UNet2DConditionModel"),
        ValueError,
        "…config.json must name its kind as one of ['RTSAE', 'SparseAutoencoder', 'TIDE', 'MixtureSAE'], got "
        "'UNet2DConditionModel'.",
    ),
    "a configuration without width": (
        rewritten(f"{SMALL}/config.json", in_channels=None),
        ValueError,
        "…config.json: expected `in_channels` as a positive int, got None.",
    ),
    "a configuration with other anchors": (
        rewritten(f"{SMALL}/config.json", anchors=[0.5]),
        ValueError,
        "…config.json: expected `anchors` as a list of 1 to 1000 timesteps, got [0.5].",
    ),
    "a configuration with an activation that is no word": (
        rewritten(f"{SMALL}/config.json", activation=[]),
        ValueError,
        "…config.json: expected `activation` as a string, got [].",
    ),
    "a configuration with another activation": (
        rewritten(f"{SMALL}/config.json", activation="middle"),
        ValueError,
        "…config.json describes no dictionary: `activation` of RTSAE must be one of …",
    ),
    "a configuration of nothing known": (
        rewritten(f"{SMALL}/config.json", anchors=[1, 900]),
        ValueError,
        "…config.json describes no dictionary: `anchors` must be strictly descending timesteps, got [1, 900].",
    ),
    "saving what is not finite": (
        save_nan,
        ValueError,
        "'decoder' of mid_block holds NaN, inf, or what is too large for torch.float16.",
    ),
    "saving through a link": (save_through_link, OSError, "…mid_block is a link, and nothing is written through one."),
    # Presets
    "an unknown preset": (
        lambda world: world.pipe.set_rtsae_preset("sunset"),
        ValueError,
        "The dictionary has no preset 'sunset'. …",
    ),
    "a preset without features": (
        lambda world: preset(world, {"options": {}}),
        ValueError,
        "presets.json: preset 'mine' must be an object with a list `features` of [feature, strength] and, if any, an "
        "object `options`.",
    ),
    "a preset of no feature": (
        lambda world: preset(world, {"features": [[1.5, 1.0]]}),
        ValueError,
        "presets.json: 'mine' has feature 1.5, expected a label, an index or [site, index].",
    ),
    "a preset without strength": (
        lambda world: preset(world, {"features": [["red", "much"]]}),
        ValueError,
        "presets.json: 'mine' has strength 'much', expected a finite number or a list of them.",
    ),
    "a preset with an option that is none": (
        lambda world: preset(world, {"features": [["red", 1.0]], "options": {"start": 2}}),
        ValueError,
        "presets.json: 'mine' cannot be used: …",
    ),
    # Analysis
    "recording an unknown activation": (
        lambda world: Recorder(world.pipe, [SITE], activation="middle"),
        ValueError,
        "`activation` must be one of ['output', 'update', 'input'], got 'middle'.",
    ),
    "recording a part of guidance that is not there": (
        record_a_stream_that_is_not_there,
        ValueError,
        "The step at … has no ['perturbed'], it has ['cond'].",
    ),
    "trajectories that were not recorded": (
        record_elsewhere,
        ValueError,
        f"Nothing was recorded at 'mid_block'; recorded were ['{SITE}'].",
    ),
    "tracing features of two sites": (
        trace_two_sites,
        ValueError,
        f"Expected features that live at one site, got [('mid_block', 1), ('{SITE}', 1)] at ['mid_block', '{SITE}'].",
    ),
    "tracing nothing": (
        lambda world: recorded(world).maps([]),
        ValueError,
        "Expected features that live at one site, got [] at [].",
    ),
    "recording a site that the dictionary has not": (
        lambda world: recorded(world, sites=["mid_block"]),
        ValueError,
        f"The dictionary has no site 'mid_block'. It has ['{SITE}'].",
    ),
    "recording two kinds of activation": (
        record_two_kinds,
        ValueError,
        f"Expected sites of one kind of activation, got ['output', 'update'] at ['mid_block', '{SITE}'].",
    ),
    "an empty mask": (
        lambda world: recorded(world).presence(SITE, torch.zeros(8, 8)),
        ValueError,
        "The mask is empty.",
    ),
    "presence in none of denoising": (
        lambda world: find.find_features(world.pipe, ["a star"], ["a heart"], until=0),
        ValueError,
        "Expected 0 < until <= 1, got 0.",
    ),
    "finding without examples": (
        lambda world: find.find_features(world.pipe, ["a star"], []),
        ValueError,
        "Expected positive and negative examples, got 1 and 0.",
    ),
    "finding with examples of two kinds": (
        lambda world: find.find_features(
            world.pipe, ["a star"], [Image.new("RGB", (64, 64))], by="presence", num_inference_steps=1
        ),
        ValueError,
        "Expected examples of one kind: prompts or pictures, for positive and negative alike.",
    ),
    "a scorer of another architecture": (
        lambda world: FactorScorer({"colour": ["red", "blue"]}, architecture="none"),
        ValueError,
        "`architecture` must be 'convolution' or 'attention', got 'none'.",
    ),
    "finding by something else": (
        lambda world: find.find_features(world.pipe, ["a star"], ["a heart"], by="colour"),
        ValueError,
        "Expected by='effect', for prompts, or 'presence', got 'colour'.",
    ),
    "finding the effect of prompts that are no pairs": (
        lambda world: find.find_features(world.pipe, ["a star"], ["a heart", "a circle"]),
        ValueError,
        "Expected as many prompts with the concept as without, one to one; got 1 and 2. by='presence' takes any "
        "number.",
    ),
    "a strip of nothing": (
        lambda world: plot_strip(find.FeatureTable()),
        ValueError,
        "Nothing in this table is verified: call find_features with verify=True.",
    ),
    "fitting without pairs": (fitted(()), ValueError, "Expected pairs (from, to) of prompts, got none."),
    "fitting what is no pair": (
        fitted(("a star",)),
        ValueError,
        "Expected pairs (from, to) of prompts, got 'a star'.",
    ),
    "fitting equal prompts": (
        fitted((("a star", "a star"),)),
        ValueError,
        "The prompts of a pair must differ, or there is no effect to have a share of: both are 'a star'. Prompts in "
        "which nothing is to change go in `unchanged`.",
    ),
    "fitting no latents": (
        fitted(latents=0),
        ValueError,
        "Expected at least one latent, or a rank of at least one, got latents=0.",
    ),
    "fitting a prompt that is too long": (
        fitted((("a star " * 40, "a heart"),)),
        ValueError,
        "A prompt of … tokens is cut off at 32, perhaps before the concept: 'a star …",
    ),
    "fitting without text": (
        lambda world: fit_feature(Caller(world.pipe), [("a star", "a heart")], progress=False),
        ValueError,
        "An effect is that of a prompt, and Caller takes none.",
    ),
    "fitting in a denoiser that is broken": (
        fitted_in_a_broken_denoiser,
        ValueError,
        "The denoiser, or its gradient, is NaN or inf here; float32 or bfloat16 may help.",
    ),
    "fitting a compiled denoiser": (
        fitted_when_compiled,
        ValueError,
        "Effects are gradients through the denoiser, and a compiled one gives none; load a plain one.",
    ),
    "fitting with latents that do nothing": (
        fitted_with_nothing,
        ValueError,
        "No latent of the dictionary has an effect on these pairs.",
    ),
    "verifying without prompts": (
        lambda world: find.find_features(
            world.pipe, *[[Image.new("RGB", (64, 64), c)] for c in ("red", "white")], verify=True
        ),
        ValueError,
        "Features are verified on negative prompts, and there are none.",
    ),
    "pictures for a pipeline that cannot read them": (
        lambda world: find.record_images(flow_pipeline(world), []),
        ValueError,
        "Pictures can be read with a StableDiffusionPipeline and its noise schedule only, not with "
        "StableDiffusionPipeline and FlowMatchEulerDiscreteScheduler.",
    ),
    "a label that is not there": (
        lambda world: search_labels(world.dictionary, "reddish"),
        ValueError,
        "No label contains 'reddish'. …",
    ),
    "crops of what is active nowhere": (
        lambda world: plot_crops([recorded(world)], quiet_feature(world)),
        ValueError,
        "… is active in none of these pictures.",
    ),
    # What others published
    "a published one whose folder says nothing": (
        lambda world: theirs(world, sparsify(), rename="sae"),
        ValueError,
        "No name in …sae says which site it is of: name the site by `layers`, and if there are several, one folder of "
        "['.'] by `subfolder`.",
    ),
    "several published ones of a site": (
        lambda world: load_dictionary(sparsify().write(sparsify().write(world.empty / "a").parent / "b").parent),
        ValueError,
        "… has several of up_blocks.1.attentions.1: choose one of ['a', 'b'] by `subfolder`.",
    ),
    "a published pickle": (
        lambda world: theirs(world, sdlens()),
        ValueError,
        "… has pickles, …state_dict.pth', which are not loaded; this makes safetensors of them: diffusers-rtsae "
        "convert … OUT",
    ),
    "a published file that is none": (
        lambda world: theirs(world, saelens("standard"), **{f"{SITE}/sae_weights.safetensors": b"x"}),
        OSError,
        "…sae_weights.safetensors is damaged or no safetensors file: …",
    ),
    "a pickle of other things": (
        lambda world: convertible(theirs(world, dictionary_learning("AutoEncoder"), None, **{f"{SITE}/ae.pt": b"x"})),
        OSError,
        "…ae.pt is damaged, or holds more than tensors: …",
    ),
    "a published one without a number": (
        lambda world: theirs(world, sparsify(k="many")),
        ValueError,
        "…cfg.json must have 'k' as a positive int, got 'many'.",
    ),
    "a published one that was scaled by what is not told": (
        lambda world: theirs(world, saelens("standard", normalize_activations="expected_average_only_in")),
        ValueError,
        "…cfg.json says normalize_activations = 'expected_average_only_in', and the factor that it was trained with "
        "is in no file.",
    ),
    "a published one of an unknown kind": (
        lambda world: theirs(world, saelens("matching_pursuit")),
        ValueError,
        "…cfg.json says architecture = 'matching_pursuit', and it is of a kind that is not known here.",
    ),
    "a transcoder around which something passes": (
        lambda world: theirs(world, sparsify(transcode=True, skip_connection=True)),
        ValueError,
        "…cfg.json says skip_connection = True, and the linear path around a transcoder has no place here.",
    ),
    "a published one with other tensors": (
        lambda world: theirs(world, sparsify(d_in=7)),
        ValueError,
        "…sae.safetensors must hold 'encoder.weight' as floats of shape (28, 7), found float32 of shape (24, 6).",
    ),
    "a published one of an unknown class": (
        lambda world: convertible(theirs(world, dictionary_learning("CrossCoder"), None)),
        ValueError,
        "…config.json must name a `dict_class` that is known here, got 'CrossCoder'.",
    ),
    "exporting trajectories": (
        lambda world: world.dictionary.export("saelens", world.empty),
        ValueError,
        "SAELens has nothing like the RTSAE of up_blocks.1.attentions.1.",
    ),
    "exporting to a format that is only read": (
        lambda world: FORMATS["sparsify"].export(world.dictionary.sites[SITE], None),
        ValueError,
        "sparsify is read, and not written.",
    ),
    "exporting for an unknown library": (
        lambda world: world.dictionary.export("keras", world.empty),
        ValueError,
        "`layout` must be one of ['saelens'], got 'keras'.",
    ),
    "measuring on nothing": (
        lambda world: measure(world.pipe, world.dictionary, []),
        ValueError,
        "Statistics are measured on one prompt or more, for dictionaries of single steps.",
    ),
    "measuring with another model": (
        lambda world: measure(
            world.pipe,
            Dictionary({SITE: SparseAutoencoder(SITE, 8, [1], 8, 2)}),
            ["a star"],
            num_inference_steps=1,
        ),
        ValueError,
        "The dictionary of up_blocks.1.attentions.1 is for 8 channels, not for 160.",
    ),
    "a linear map of what is read": (
        map_of_a_transcoder,
        ValueError,
        "A linear map needs the output of up_blocks.1.attentions.1, of which the dictionary reads the input.",
    ),
    # The command line
    "converting with prompts alone": (
        lambda world: cli.convert("org/name", world.empty, prompts=Path("prompts.txt")),
        ValueError,
        "Expected both --pipeline and --prompts, or neither.",
    ),
    "the command line without its packages": (
        command_line_without_typer,
        SystemExit,
        'The command line needs typer: pip install "diffusers-rtsae[analysis]"',
    ),
    "bundled files that are not there": (
        train_without_the_trainer,
        ValueError,
        "…commands.py is missing: install diffusers-rtsae again.",
    ),
    "a name that the package has not": (
        lambda world: diffusers_rtsae.RTSAEs,
        AttributeError,
        "module 'diffusers_rtsae' has no attribute 'RTSAEs'",
    ),
    "a world that is not bundled": (
        lambda world: cli.common.parse_world("mars"),
        typer.BadParameter,
        "expected one of ['shapes', 'people'], got 'mars'.",
    ),
    "a guidance that is no number": (
        lambda world: cli.common.finite(float("nan")),
        typer.BadParameter,
        "expected a finite number, got nan.",
    ),
    "a feature twice": (
        lambda world: cli.steer("a star", ["red=1", "blue=1", "red=2"]),
        ValueError,
        "The feature 'red' is given twice: expected one strength of each.",
    ),
    "an empty prompt to find": (
        lambda world: cli.find(["a star", " "], ["a heart"]),
        ValueError,
        "A prompt of --with is empty: expected words.",
    ),
    "a picture of no format": (
        lambda world: cli.steer("a star", ["red=1"], out=Path("star.doc")),
        ValueError,
        "star.doc must end in .png, .jpg, .jpeg, .webp, .tif, .tiff.",
    ),
    "a picture where a folder is": (
        lambda world: cli.common.check_output(world.empty),
        OSError,
        "… is a folder: expected another name to write to.",
    ),
    "a picture below a file": (
        lambda world: cli.common.check_output(world.folder / "rtsae_config.json" / "star.png"),
        OSError,
        "… cannot be written: …rtsae_config.json is a file.",
    ),
    "a picture where nothing may be written": (
        lambda world: cli.common.check_output(Path("/proc/star.png")),
        OSError,
        "/proc/star.png cannot be written: ….",
    ),
    "prompts in another encoding": (
        no_utf8,
        ValueError,
        "…prompts.txt, line 3: expected text in UTF-8, got b'ein gr\\xf6\\xdferer Stern'.",
    ),
    "a file instead of a dictionary": (
        lambda world: load_dictionary(world.folder / "rtsae_config.json"),
        OSError,
        "…rtsae_config.json is a file: expected the folder of a dictionary, or a Hub id.",
    ),
    "a full disk": (
        save_on_a_full_disk,
        OSError,
        "… could not be written: …",
    ),
    "a demonstration without labels": (
        demo_without_labels,
        ValueError,
        "The dictionary has no labels to steer with.",
    ),
    "steering with nothing": (
        lambda world: cli.steer("a star"),
        ValueError,
        "Expected either features, like red=1.5, or --preset.",
    ),
    "fitting without pairs on the command line": (
        lambda world: cli.fit("red"),
        ValueError,
        "Expected either --from and --to, or --pairs.",
    ),
    "fitting half a pair": (
        lambda world: cli.fit("red", ["a star"], []),
        ValueError,
        "Expected as many --from as --to, got 1 and 0.",
    ),
    "a strip without --verify": (
        lambda world: cli.find(["a star"], ["a heart"], strip=Path("strip.png")),
        ValueError,
        "A --strip shows what verified features do: expected --verify with how many.",
    ),
    "a preset and options": (
        lambda world: cli.steer("a star", preset="sunset", start=0.5),
        ValueError,
        "A preset brings its own --start, --end, --mask and --operation.",
    ),
    "a feature without strength": (
        lambda world: cli.common.parse_strengths(["red"]),
        ValueError,
        "Expected FEATURE=STRENGTH, like red=1.5 or 1234=-0.5, got 'red'.",
    ),
    "a report on another pipeline without prompts": (
        lambda world: cli.report(pipeline="another"),
        ValueError,
        "A report on another pipeline needs --prompts, a text file with one prompt a line.",
    ),
    "a report without prompts": (
        lambda world: report_of_nothing(world, ()),
        ValueError,
        "A report needs prompts to look for features in.",
    ),
    "a report of no features": (
        report_of_nothing,
        ValueError,
        "There is nothing to report: the dictionary has no labels, and `count` is 0.",
    ),
    "the app without gradio": (
        app_without_gradio,
        ModuleNotFoundError,
        "No module named 'gradio'",
    ),
}

# messages that need a server, a browser or huge files: what the tests elsewhere look for, and in which file
ELSEWHERE = {
    "it has no rtsae_config.json, and no files of a format that is read here.": (
        "it has no rtsae_config.json",
        "dictionary/test_dictionary.py",
    ),
    "… arrived damaged: its SHA-256 is … instead of … .": (
        "arrived damaged: its SHA-256 is",
        "dictionary/test_dictionary.py",
    ),
    "… could not be pushed to the Hub: …": ("could not be pushed to the Hub: ", "dictionary/test_dictionary.py"),
    "… is no folder here, not in the cache, and the Hub does not answer: …": (
        "not in the cache, and the Hub does not answer: ",
        "dictionary/test_dictionary.py",
    ),
    "The Hub could not be asked for dictionaries: …": (
        "The Hub could not be asked for dictionaries: ",
        "dictionary/test_dictionary.py",
    ),
    "Say what to draw: the prompt is empty.": ("Say what to draw", "test_app.py"),
    "The seed is empty: expected a number.": ("The seed is empty", "test_app.py"),
    "Choose a feature first: a preset of none does nothing.": ("a preset of none", "test_app.py"),
    "Choose a feature first, then see where it is active.": ("then see where it is active", "test_app.py"),
    "Choose a feature first, then see what its strengths do.": ("then see what its strengths do", "test_app.py"),
    "The new feature needs a name.": ("needs a name", "test_app.py"),
    "There is a feature … already: choose another name.": ("There is a feature 'red' already", "test_app.py"),
    "Expected as many prompts with it as without, got … and ….": ("as without, got 1 and 0", "test_app.py"),
    "… was run at other steps than …: record it alone.": ("was run at other steps than", "test_caches.py"),
    "The unconditional call has … tokens at …, the conditional one …: apply_to='contrast' cannot follow it there. Use "
    "apply_to='cond'.": ("apply_to='contrast' cannot follow it there", "denoiser/test_call.py"),
    "… does not say which text is the negative one: expected it in a variable of its call with `negative` or `uncond` "
    "in its name.": ("does not say which text is the negative one", "steering/test_custom_pipelines.py"),
    "The backward pass calls the denoiser again, and an edit cannot know as which call: have its blocks checkpointed, "
    "by `enable_gradient_checkpointing`, instead of the whole.": (
        "have its blocks checkpointed",
        "steering/test_custom_pipelines.py",
    ),
    "Nothing is painted: features act everywhere.": ("Nothing is painted", "test_app.py"),
    "… is too large: expected at most … MB of JSON.": ("is too large", "dictionary/test_security.py"),
    "… is nested more than … levels deep.": ("nested more than 32 levels deep", "dictionary/test_security.py"),
}


@pytest.mark.parametrize(("misuse", "kind", "message"), MISUSE.values(), ids=MISUSE)
def test_misuse_says(world, misuse, kind, message):
    pattern = re.escape(message).replace("…", ".*")
    with pytest.raises(kind, match=rf"(?s)\A{pattern}\Z"):
        misuse(world)


def messages(source: str):
    """The kind and the message of each `raise` in a module, as a regular expression in which anything may vary."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Raise) or node.exc is None:
            continue
        assert isinstance(node.exc, ast.Call), f"write the message out: {ast.unparse(node)}"
        kind, text = ast.unparse(node.exc.func), node.exc.args[0]
        if kind == "gr.Error" or kind.startswith("_"):  # the app passes on what was raised; caught and said elsewhere
            continue
        for said in (text.body, text.orelse) if isinstance(text, ast.IfExp) else (text,):
            if isinstance(said, ast.Constant) and isinstance(said.value, int):
                continue  # the status a process exits with
            assert isinstance(said, ast.JoinedStr | ast.Constant), f"write the message out: {ast.unparse(node)}"
            parts = said.values if isinstance(said, ast.JoinedStr) else [said]
            constant = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            assert sum(map(len, filter(None, constant))) >= 10, f"say more: {ast.unparse(node)}"
            yield kind, "".join(".*" if part is None else re.escape(part) for part in constant)


def test_every_message_has_its_misuse():
    package, tests = Path(diffusers_rtsae.__file__).parent, Path(__file__).parent
    said = [(kind, m) for path in sorted(package.rglob("*.py")) for kind, m in messages(path.read_text())]
    assert {kind for kind, _ in said} == {
        *("ValueError", "OSError", "SystemExit", "typer.BadParameter", "AttributeError", "ModuleNotFoundError")
    }
    expected = Counter(message for _, message in said)
    found = Counter()
    for message in [message for _, _, message in MISUSE.values()] + list(ELSEWHERE):
        fitting = [pattern for pattern in expected if re.fullmatch(pattern, message, re.DOTALL)]
        assert fitting, f"nothing says {message!r}"
        found[max(fitting, key=lambda pattern: len(pattern.replace(".*", "")))] += 1  # the one with most words
    missing = [pattern for pattern, count in expected.items() if found[pattern] < count]
    assert not missing, f"no test provokes {missing}"
    for text, file in ELSEWHERE.values():
        assert text in (tests / file).read_text(), f"{file} does not provoke {text!r}"
