"""
What a misuse is told, as one table: each sentence names what was expected, and what was found. What the Hub answers
and what damaged files hold is in dictionary/test_hub.py and dictionary/test_security.py.
"""

import ast
import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
import typer
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from disk import full_disk
from foreign import dictionary_learning, overcomplete, saelens, sdlens, sparsify
from PIL import Image
from safetensors.torch import load_file, save_file
from small_analysis import fit_less

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
from diffusers_rtsae.analysis import find
from diffusers_rtsae.analysis.effect import Intervention, States, gradient
from diffusers_rtsae.analysis.explain import explain
from diffusers_rtsae.analysis.fit import fit_feature
from diffusers_rtsae.analysis.plots import plot_crops, plot_strip
from diffusers_rtsae.analysis.prompts import read_prompt
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
from diffusers_rtsae.models import PLACES, LinearMap, MatchingPursuitSAE, QuantizedSAE, Step, TemporalSAE
from diffusers_rtsae.steering import Edit, PromptCodes
from diffusers_rtsae.worlds import WORLDS

PACKAGE = Path(diffusers_rtsae.__file__).parent
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


def explained_unread(world):
    """With a text encoder that says the same of every text."""
    last = next(m for name, m in world.pipe.text_encoder.named_modules() if name.endswith("final_layer_norm"))
    with mock.patch.object(last, "weight", torch.nn.Parameter(torch.zeros_like(last.weight))):
        explain(world.pipe, "a star", "star", "a heart", num_inference_steps=1)


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


TEXT = "text_encoder.text_model.encoder.layers.1"


def of_text(site: str = TEXT, width: int = 192, kind: type = SparseAutoencoder, **options):
    """Load a dictionary of a text encoder, and steer if there are options."""

    def steer_text(world):
        world.pipe.unload_rtsae()
        world.pipe.load_rtsae({site: kind(site, width, [900, 1], 8, 2)})
        if options:
            world.pipe.set_rtsae_features({1: options.pop("strength", 1.0)}, **options)
        return world.pipe

    return steer_text


def of_two_texts(world, **options):
    """The same, of two text encoders side by side."""
    world.pipe.text_encoder_2 = world.pipe.text_encoder
    try:
        of_text(f"{TEXT}+{TEXT.replace('encoder', 'encoder_2', 1)}", **{"width": 384} | options)(world)
    finally:
        del world.pipe.text_encoder_2


def prompt_codes(world, site: str = TEXT, tokens: int = 32):
    codes = PromptCodes(site, "a star", [""] * tokens, torch.zeros(tokens, 8), torch.ones(tokens, 192))
    pipe = of_text(strength=0.0)(world)
    pipe.set_rtsae_features({codes: 1.0})
    pipe("a star", num_inference_steps=1)


def theirs(world, case, load=load_dictionary, rename: str | None = None, **files: bytes):
    """What somebody else published, with other files, loaded if need be."""
    folder = case.write(world.empty / "theirs")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if rename:
        folder = next(folder.iterdir()).rename(world.empty / rename)
    return load(folder) if load else folder


def unnamed_pickle(world):
    (world.empty / "theirs").mkdir()
    torch.save({"encoder.weight": torch.zeros(8, 4)}, world.empty / "theirs" / "model.pt")
    convertible(world.empty / "theirs")


def with_tensor(case, name: str, tensor: torch.Tensor):
    """The files of a case with another tensor."""
    tensors = next(content for file, content in case.files.items() if file.endswith(".safetensors"))
    tensors[name] = tensor
    return case


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
        fit_less(less, steps=2, last=2)
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


def told_of(text: list[float], pooled: list[float] | None = None, prompts: int | None = None, **variables):
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


# what was done: how, what is raised if not a `ValueError`, and what the sentence says was expected and found, in its
# order, where … stands for anything
MISUSE = {
    # Pipelines and adapters
    "nothing is loaded": (unloaded, "No dictionary is loaded … call `load_rtsae`"),
    "the last was deleted": (deleted, "No dictionary is loaded … call `load_rtsae`"),
    "a pipeline without denoiser": (lambda world: DiffusionPipeline().load_rtsae(world.dictionary),
        "DiffusionPipeline has no denoiser … a component of ['unet', 'transformer',"),
    "a name that is taken": (lambda world: world.pipe.load_rtsae(world.dictionary),
        "'default' is loaded already … another `adapter_name` … `unload_rtsae`"),
    "an unknown adapter": (lambda world: world.pipe.set_rtsae("second"),
        "`adapter_name` to be one of ['default'] … got 'second'"),
    "no adapter of several": (several_adapters, "one of ['default', 'second'] … got None"),
    "more weights than adapters": (lambda world: world.pipe.set_rtsae(["default"], [1.0, 2.0]),
        "one weight per adapter … got 2 weights for ['default']"),
    "a weight that is no number": (lambda world: world.pipe.set_rtsae("default", float("nan")),
        "Expected finite weights … got [nan]"),
    # Features
    "features without strengths": (lambda world: world.pipe.set_rtsae_features("red"),
        "a dict {label or index: strength} … got str"),
    "a misspelt label": (feature("purpel"), "no feature labelled 'purpel' … Did you mean ['purple']"),
    "a label like none": (feature("x"),
        "no feature labelled 'x' … It has background: white, black … colour: red, orange"),
    "an index in quotes": (feature("1234"), "no feature labelled '1234' … 1234, without quotes"),
    "a label of a site that is not loaded": (
        lambda world: Dictionary({"up": two_sites().sites["up"]}, two_sites().labels).features("low"),
        "'low' lives at ['down'] … loaded are ['up']"),
    "an index of several sites": (lambda world: two_sites().features(3), "use (site, 3) … a site of ['down', 'up']"),
    "an index that is no number": (feature(1.5), "a label, an index or (site, index) … got 1.5"),
    "an index that does not exist": (feature(2048), f"Feature 2048 does not exist … {SITE} has features 0 to 2047"),
    "a feature of an unknown site": (feature(("up_blocks.2", 3)),
        "no site 'up_blocks.2' … It has ['up_blocks.1.attentions.1']"),
    "a strength that is no number": (steer("strong"), "a finite number or a list of them … got 'strong'"),
    "a strength that is not finite": (steer([1.0, float("inf")]),
        "a finite number or a list of them … got (1.0, inf)"),
    "no strength": (steer([]), "a finite number or a list of them … got ()"),
    "a schedule of another shape": (steer(torch.zeros(2, 2, 2)), "(steps,) or (steps, prompts) … got shape (2, 2, 2)"),
    "a schedule that is not finite": (steer(torch.tensor([0.0, float("nan")])),
        "must hold finite numbers … got NaN or inf"),
    "a function that gives no number": (lambda world: generate(world, {"red": lambda progress: "strong"}),
        "gave 'strong' at progress 0 … expected finite numbers"),
    "three strengths for two prompts": (lambda world: generate(world, {"red": [1.0, 2.0, 3.0]}),
        "1 or as many strengths as prompts (2) … got 3"),
    "two strengths for four prompts": (
        lambda world: generate(world, {"red": [1.0, 2.0]}, ["a star", "a heart", "a cross", "a circle"]),
        "1 or as many strengths as prompts (4) … got 2"),
    "three masks for two prompts": (lambda world: generate(world, {"red": 1.0}, mask=np.ones((3, 8, 8))),
        "1 or as many masks as prompts (2) … got 3"),
    # Options
    "a misspelt option": (steer(strenght=2.0), "Unknown option 'strenght' … an edit has ['apply_to', 'clip',"),
    "an option that the feature decides": (steer(latents=(1,)),
        "Unknown option 'latents' … an edit has ['apply_to', 'clip',"),
    "an unknown operation": (steer(operation="remove"), "`operation` must be one of ['add', 'set', … got 'remove'"),
    "erasing everything": (steer(operation="erase", where="everywhere"), "Erasing everywhere … expected a `mask`"),
    "an unknown half": (steer(apply_to="uncond"),
        "`apply_to` must be one of ['cond', 'all', 'contrast'] … got 'uncond'"),
    "an unknown injection": (steer(injection="step"),
        "`injection` must be one of ['trajectory', 'residual'] … got 'step'"),
    "a window before the beginning": (steer(start=-0.1), "0 <= start <= end <= 1 … got start=-0.1"),
    "a window after the end": (steer(end=1.5), "0 <= start <= end <= 1 … end=1.5"),
    "a window that ends before it begins": (steer(start=0.6, end=0.5),
        "0 <= start <= end <= 1 … got start=0.6, end=0.5"),
    "a window that is no number": (steer(start="0.2"), "0 <= start <= end <= 1 … got start='0.2'"),
    "transfer from nothing": (steer(operation="transfer"), "'transfer' needs a `source` … at the same site"),
    "replace of nothing": (steer(operation="replace"), "'replace' needs a `source` … at the same site"),
    "a source that is not used": (steer(source="blue"), "`source` is for 'transfer' and 'replace' … not for 'add'"),
    "a source without features": (steer(operation="transfer", source=[]),
        "`source` names no latent of this site … act nowhere"),
    "nowhere": (steer(where=[]), "`where` names no latent of this site … act nowhere"),
    "a mask that is a path": (steer(mask="mask.png"), "a PIL image, an array or a tensor … got str"),
    "a mask of one dimension": (steer(mask=np.ones(4)), "must be (height, width), … got shape (4,)"),
    "a mask of frames for pictures": (lambda world: generate(world, {"red": 1.0}, mask=np.ones((2, 3, 4, 5))),
        "a mask for a picture, which has one frame … got one for 3 frames"),
    "a mask without pixels": (steer(mask=np.ones((0, 4))), "must be (height, width), … got shape (1, 0, 4)"),
    "a mask of bytes": (steer(mask=np.array([[0, 255]])), "must lie in [0, 1] … got values from 0 to 255"),
    "the place where no grid is": (
        lambda world: LinearMap(torch.zeros(1, 3, 2 * 8 + 1 + PLACES))(torch.zeros(1, 5, 8), Step(500, 1.0)),
        "reads where in the picture a token is … these 5 lie on no grid"),
    "a mask where no grid is": (lambda world: other(world, TEXT_SITE, mask=np.ones((8, 8))),
        f"32 tokens of {TEXT_SITE} out over a 16x16 latent … masks need a grid"),
    # What does not fit the pipeline
    "a site that the model lacks": (lambda world: other(world, "up_blocks.1.attentions.7", 8),
        "no site 'up_blocks.1.attentions.7' … closest are ['up_blocks.1.attentions.1'"),
    "a text encoder that the pipeline lacks": (of_text("text_encoder_2.encoder.block.1"),
        "has no 'text_encoder_2' that text_encoder_2.encoder.block.1 could lie in … its text encoders are "
        "['text_encoder']"),
    "a layer that the text encoder lacks": (of_text("text_encoder.encoder.layers.9"),
        "CLIPTextModel has no site 'text_encoder.encoder.layers.9' … closest are ['text_encoder.encoder.layers."),
    "a text encoder of another width": (of_text(width=8), f"{TEXT} is for 8 channels … the model has 192"),
    "a trajectory of a text": (of_text(kind=RTSAE), f"RTSAE depends on the time of denoising … {TEXT} runs once … "
        "expected a kind without time, such as SparseAutoencoder"),
    "a window of time for a text": (of_text(start=0.5), f"{TEXT} runs once … `start`, `end` and schedules"),
    "a schedule for a text": (of_text(strength=torch.ones(3)), f"{TEXT} runs once … `start`, `end` and schedules"),
    "a mask over a text": (of_text(mask=np.ones((8, 8))), f"{TEXT} are those of a text … are for pictures"),
    "two texts of another width": (lambda world: of_two_texts(world, width=192),
        "is for 192 channels … the model has 384"),
    "latents that two texts read together": (lambda world: of_two_texts(world, strength=1.0),
        "run one after the other … expected operation='add' with clip=False"),
    "codes of another dictionary": (lambda world: prompt_codes(world, "text_encoder_2.encoder.block.1"),
        f"codes of 'a star' are of text_encoder_2.encoder.block.1 … this dictionary has ['{TEXT}']"),
    "codes of a longer text": (lambda world: prompt_codes(world, tokens=40),
        f"added at {TEXT} was read on a text of 40 tokens … got one of 32 … the same `max_sequence_length`"),
    "reading a prompt without a text encoder": (lambda world: read_prompt(world.pipe, "a star"),
        "one of the sites in text encoders, [] … got None"),
    "reading several prompts": (lambda world: read_prompt(of_text()(world), ["a star"]),
        "one prompt as a string … got list"),
    "fitting at a text encoder": (lambda world: fit_feature(of_text()(world), [("a star", "a heart")]),
        f"{TEXT} lies in a text encoder … `analysis.prompts.read_prompt` … this needs a site of the denoiser"),
    "recording a text encoder that is not there": (lambda world: Recorder(world.pipe, ["text_encoder_3.block.0"]),
        "StableDiffusionPipeline has no 'text_encoder_3' … it has ['unet', 'text_encoder']"),
    "the sites of something else": (lambda world: list_sites("unet"),
        "str has no denoiser … a component of ['unet', 'transformer',"),
    "a denoiser put in the place of one with a dictionary": (replaced_denoiser,
        "The unet was replaced … none of the dictionaries ['default'] … call `load_rtsae`"),
    "a dictionary of another width": (lambda world: other(world, SITE, 8),
        f"dictionary of {SITE} is for 8 channels … the model has 160"),
    "another width that shows only when running": (lambda world: other(world, TEXT_SITE, 8),
        f"dictionary of {TEXT_SITE} is for 8 channels … the model has 160"),
    "a dictionary of another model": (lambda world: another_model(
            world, base_model="sd15", signature=world.dictionary.config["signature"] | {"cross_attention_dim": 768}
        ), "is for sd15 … cross_attention_dim 768 there, 192 here"),
    "a signature of another form": (lambda world: another_model(world, signature="UNet"),
        "`signature` in rtsae_config.json must be an object … got 'UNet'"),
    "a broken decoder": (lambda world: other(world, broken="decoder"),
        f"dictionary of {SITE} … NaN or inf in rows [1]"),
    "a broken encoder": (lambda world: other(world, broken="encoder"),
        f"dictionary of {SITE} … NaN or inf in rows [1]"),
    "a sampler with another unit of time": (another_sampler(Odd(), 2),
        "Odd calls with timestep 7000 … expected 0 to 1000"),
    "a sampler that does not say its unit": (lambda world: training_time(1.0, SimpleNamespace(config={})),
        "SimpleNamespace does not say … how many training steps there are"),
    "a batch of an unknown layout": (lambda world: (feature("red")(world), Caller(world.pipe)(3, 1)),
        "3 rows for each image … expected uncond + cond"),
    "guidance in another order": (
        lambda world: (steer(apply_to="contrast")(world), Caller(world.pipe)(1, 1, unconditional=True)),
        "another guidance branch before the conditional one … Use apply_to='cond'"),
    "rows that are told apart by nothing": (
        lambda world: told_of([0.0, 1.0], negative_prompt_embeds=torch.zeros(1, 3)),
        "Some of the 2 rows … their layout is not known"),
    "rows of two prompts at once": (lambda world: told_of([0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0], prompts=2),
        "the text of one prompt and the pooled text of another … draw one at a time"),
    "rows at a site that are no multiple": (
        lambda world: list(CallReader().read(Arguments(["x"], (torch.zeros(2, 3),), {})).parts_of(5)),
        "with 2 rows and has 5 at this site … expected a multiple"),
    "the grid of what has none": (record_without_a_grid, f"32 tokens of {TEXT_SITE} … a 16x16 latent"),
    "some of the images": (lambda world: (feature("red")(world), Caller(world.pipe)(1, 2, images=2)),
        "for 1 of 2 images at a time … draw one alone"),
    "a family that is refused": (lambda world: (feature("red")(world), Cosmos3Like(world.pipe)(1, 1)),
        "Cosmos3Like cannot be followed … packs prompts into one sequence"),
    "a loop without its timestep": (lambda world: (feature("red")(world), Caller(world.pipe)(2, 1, t=None)),
        "at 999.5, which is none of its sampler's timesteps … no variable `t` … expected either"),
    "frames at different times": (
        lambda world: (feature("red")(world), Caller(world.pipe)(2, 1, t=torch.tensor([1.0, 500.0]))),
        "at different times in one call … an edit has one time"),
    "a schedule that gives another number of strengths later": (lambda world: (
            world.pipe.set_rtsae_features({"red": lambda progress: 1.0 if progress < 0.5 else [1.0, 2.0]}),
            world.draw(world.pipe, ["a star"], 4, 0),
        ), "2 strengths at t = 251 … for 1 rows"),
    "another number of tokens later": (lambda world: (
            world.pipe.set_rtsae_features({(SITE, i): 1.0 for i in range(40)}, operation="ablate"),
            [
                world.pipe.unet(torch.zeros(1, 4, size, size), t, torch.zeros(1, 32, 192))
                for size, t in ((16, 900), (16, 500))
            ],
            world.pipe.unet.get_submodule(SITE)(torch.zeros(1, 160, 4, 4), torch.zeros(1, 32, 192)),
        ), f"Expected 64 tokens at {SITE} as at the step before … got 16"),
    "reading latents of states that were drawn without": (lambda world: Intervention(
            {SITE: [Edit(latents=(3,), weights=(1.0,), strength=1.0, operation="ablate", clip=False)]},
            States(world.pipe, [("a star", "a heart")], codes=False, num_inference_steps=2),
        ), f"edits at {SITE} read latents … expected states drawn with codes=True"),
    "choosing latents of what has no gradient": (lambda world: gradient(torch.zeros(()), {SITE: torch.zeros(2)}),
        f"this denoiser gives none at {SITE} … its prediction depends on … a linear map (`rank`) needs none"),
    "recording nothing": (lambda world: Recorder(world.pipe, [SITE]).size(SITE),
        f"Nothing was recorded at '{SITE}' … inside the `with` block"),
    "recording another number of tokens later": (recorded_at_two_sizes,
        "one number of tokens at all steps … has [64, 256]"),
    "a pipeline without scheduler": (without_scheduler, "Caller has no scheduler … says at which timestep it is"),
    "a denoiser that is called with nothing": (lambda world: Arguments(["sample"], (), {}),
        "The denoiser is called … without a sample"),
    "a block that returns several things": (lambda world: Block("x").output((torch.zeros(1), torch.zeros(1))),
        "returns 2 things … expected a tensor, … `TransformerBlockRegistry`"),
    # Dictionaries in memory
    "a dictionary without sites": (lambda world: Dictionary({}), "needs at least one site … got none"),
    "a dictionary of something else": (lambda world: world.pipe.load_rtsae({SITE: "folder"}, "second"),
        f"a dictionary of site '{SITE}' … got 'str'"),
    "a dictionary under another name": (
        lambda world: world.pipe.load_rtsae({"mid_block": world.dictionary.sites[SITE]}, "second"),
        f"a dictionary of site 'mid_block' … got '{SITE}'"),
    "a site that is no path": (lambda world: Dictionary({"../up": RTSAE("../up", 8, [900, 1], 8, 2)}),
        "the path of a module … got '../up'"),
    "a subfolder of what is in memory": (
        lambda world: world.pipe.load_rtsae(world.dictionary, "second", subfolder="v2"),
        "`site`, `subfolder`, `revision` and `dtype` are for folders … a dictionary was passed"),
    "a revision of what is in memory": (lambda world: world.pipe.load_rtsae(world.dictionary, "second", revision="v2"),
        "`site`, `subfolder`, `revision` and `dtype` are for folders … a dictionary was passed"),
    "a dtype of what is in memory": (
        lambda world: world.pipe.load_rtsae(world.dictionary, "second", dtype=torch.float16),
        "`site`, `subfolder`, `revision` and `dtype` are for folders … a dictionary was passed"),
    "an unknown layer in memory": (lambda world: world.pipe.load_rtsae(world.dictionary, "second", layers=["down"]),
        f"no site 'down' … It has ['{SITE}']"),
    "anchors that ascend": (lambda world: RTSAE(SMALL, 8, [1, 900], 8, 2),
        "`anchors` must be strictly descending timesteps … got [1, 900]"),
    "anchors that repeat": (lambda world: RTSAE(SMALL, 8, [900, 900], 8, 2),
        "`anchors` must be strictly descending timesteps … got [900, 900]"),
    "no anchors": (lambda world: RTSAE(SMALL, 8, [], 8, 2),
        "`anchors` must be strictly descending timesteps … got []"),
    "an unknown activation": (lambda world: RTSAE(SMALL, 8, [900, 1], 8, 2, activation="middle"),
        "`activation` of RTSAE must be one of ['output', 'update'] … got 'middle'"),
    "an unknown sparsity": (lambda world: SparseAutoencoder(SMALL, 8, [900, 1], 8, 2, sparsity="relu"),
        "`sparsity` must be one of ['threshold', 'topk', … got 'relu'"),
    "groups of different sizes": (lambda world: SparseAutoencoder(SMALL, 8, [900, 1], 8, 3, sparsity="groupmax"),
        "k must divide the number of latents … got 8 with 3"),
    "one level": (lambda world: QuantizedSAE(SMALL, 8, [900, 1], 8, 2, num_levels=1),
        "`num_levels` from 2 to 1024 … got 1, True and True"),
    "a pursuit that ends before it begins": (
        lambda world: MatchingPursuitSAE(SMALL, 8, [900, 1], 8, 2, residual_threshold=-1.0),
        "a number from 0 up as `residual_threshold` … and -1.0"),
    "a pursuit of an unknown norm": (lambda world: MatchingPursuitSAE(SMALL, 8, [900, 1], 8, 2, input_norm="batch"),
        "`input_norm` must be one of [None, 'layer', 'length'] … got 'batch'"),
    "heads that do not divide": (lambda world: TemporalSAE(SMALL, 8, [900, 1], 8, 2, heads=3, key_channels=6),
        "`heads` that divide 8 latents … got 3, 6 and 1"),
    "a temporal one of an unknown sparsity": (
        lambda world: TemporalSAE(SMALL, 8, [900, 1], 8, 2, "output", "relu", heads=2, key_channels=4),
        "`sparsity` 'topk' or 'threshold' … got 'relu'"),
    "an unknown norm of the input": (lambda world: SparseAutoencoder(SMALL, 8, [900, 1], 8, 2, input_norm="batch"),
        "`input_norm` one of [None, 'layer', 'length'] … and 'batch'"),
    "a scale of time that is no number": (lambda world: TIDE(SMALL, 8, [900, 1], 8, 2, time_scale=float("nan")),
        "numbers `time_scale` and `downscale_freq_shift` … got True, nan and 0.0"),
    "an odd embedding of time": (lambda world: TIDE(SMALL, 8, [900, 1], 8, 2, time_channels=7),
        "`time_channels` … got 7"),
    "experts of different sizes": (lambda world: MixtureSAE(SMALL, 8, [900, 1], 8, 2, num_experts=4, shared_latents=2),
        "two experts or more, of as many latents each … got 4 experts and 2 shared"),
    "unknown metadata": (lambda world: MixtureSAE(SMALL, 8, [900, 1], 8, 2, num_experts=2, metadata=["hour"]),
        "`metadata` must be some of ['time', 'row', … got ['hour']"),
    "trajectories of another width": (lambda world: world.dictionary.sites[SITE].encode(torch.zeros(2, 3, 8)),
        "(batch, 1 to 3 anchors, 160 channels) … got shape (2, 3, 8)"),
    "trajectories of too many anchors": (lambda world: world.dictionary.sites[SITE].encode(torch.zeros(2, 4, 160)),
        "(batch, 1 to 3 anchors, 160 channels) … got shape (2, 4, 160)"),
    "one activation": (lambda world: world.dictionary.sites[SITE].encode(torch.zeros(160)),
        "(batch, 1 to 3 anchors, 160 channels) … got shape (160,)"),
    # Folders
    "nothing": (lambda world: load_dictionary(None), "a Hub id, a folder or a dict … got NoneType"),
    "an empty string": (lambda world: load_dictionary(""), "a Hub id, a folder or a dict … got an empty string"),
    "one RTSAE": (lambda world: load_dictionary(world.dictionary.sites[SITE]),
        "a Hub id, a folder or a dict … got RTSAE"),
    "a Hub id that is not in the cache": (
        lambda world: load_dictionary("org/none", cache_dir=world.empty / "cache", local_files_only=True),
        OSError, "'org/none' is no folder here … not in the cache"),
    "a folder that does not exist": (lambda world: load_dictionary(world.empty / "nowhere", local_files_only=True),
        OSError, "nowhere' is no folder here … namespace/repo_name"),
    "a folder of something else": (lambda world: load_dictionary(world.empty),
        OSError, "expected rtsae_config.json in it … found ['small'] … Did you mean ["),
    "a folder of somebody else's": (lambda world: read_contents(sdlens().write(world.empty / "theirs")),
        OSError, "holds files of SDLens … diffusers-rtsae convert"),
    "a pickle of another name": (unnamed_pickle,
        OSError, "expected rtsae_config.json in it … known by the names of their files … overcomplete.pt"),
    "a folder without labels": (replaced(LABELS_NAME, None),
        OSError, "expected labels.json in it … found ['README.md', 'mid_block', 'rtsae_config.json']"),
    "a subfolder that does not exist": (local(subfolder="v2"),
        OSError, "expected rtsae_config.json in it … found nothing"),
    "a subfolder outside": (local(subfolder="../small"), "must lie inside the folder or repository … got '../small'"),
    "a revision of a folder": (local(revision="v1"), "`revision` is for the Hub … small' is a folder here"),
    "a download without the network": (
        lambda world: load_dictionary("org/name", force_download=True, local_files_only=True),
        "`force_download` and `local_files_only` … exclude each other"),
    "a name as dtype": (local(dtype="float16"), "`dtype` to be one of [torch.float16, … got 'float16'"),
    "a dtype that weights cannot have": (local(dtype=torch.float64),
        "`dtype` to be one of [torch.float16, … got torch.float64"),
    "one layer without a list": (local(layers=SMALL), "`layers` as a list of sites … got the string 'mid_block'"),
    "an unknown layer": (local(layers=["mid_blocks"]), "no site 'mid_blocks' … Did you mean ['mid_block']"),
    # Files
    "damaged JSON": (replaced(LABELS_NAME, b"{"), "labels.json is not valid JSON … line 1 column 2"),
    "JSON of something else": (replaced(CONFIG_NAME, b"[]"), "rtsae_config.json must hold a JSON object … got list"),
    "another format": (rewritten(CONFIG_NAME, format_version=99),
        "rtsae_config.json has format version 99 … this version reads 1"),
    "a base model that is no name": (rewritten(CONFIG_NAME, base_model=3),
        "rtsae_config.json must name its `base_model` … got 3"),
    "sites that are no paths": (rewritten(CONFIG_NAME, sites=["../up"]), "`sites` as module paths … got ['../up']"),
    "a label of another form": (rewritten(LABELS_NAME, red=[1]),
        "labels.json: label 'red' … an object with a list `features`"),
    "a label of an unknown site": (label(site="up"), "labels.json: each feature of 'red' … a site of ['mid_block']"),
    "a label of a latent that does not exist": (label(latents=[16]),
        "labels.json: 'red' names latent 16 … mid_block has 0 to 15"),
    "a label with weights that are no numbers": (label(weights=["1"]),
        "weights of 'red' must be finite numbers … got ['1']"),
    "a label that acts where nothing is": (label(where=[]), "`where` of 'red' names no latent … act nowhere"),
    "a label with options of no edit": (rewritten(
            LABELS_NAME,
            red={"features": [{"site": SMALL, "latents": [1], "weights": [1.0]}], "edit": {"apply_to": "none"}},
        ), "`apply_to` must be one of ['cond', 'all', 'contrast'] … got 'none'"),
    "a part of a label without bounds": (label(operation="ablate"),
        "`bounds` of 'red' must be two numbers around 0 … got None"),
    "a part of a label that is no part": (label(bounds=[0, 1], operation="set"),
        "a part of 'red' must 'add' or 'ablate' … got 'set'"),
    "a label of a map that is not there": (label(bounds=[0, 1], latents=[], weights=[], map="red"),
        "'red' must name one of the maps … got 'red'"),
    "labels without their maps": (lambda world: Dictionary(world.dictionary.sites, world.dictionary.labels),
        "The label 'white' has a map of its own … which is missing"),
    "the path of a label that has nothing but a map": (lambda world: Dictionary(
            world.dictionary.sites,
            {"own": {"features": [{"site": next(iter(world.dictionary.sites)), "latents": [], "map": "own"}]}},
            maps={"own": torch.zeros(1, 3, 17)},
        ).trajectory("own"), "'own' moves no latents … is seen by none"),
    "a map of another shape": (maps(red=torch.zeros(2, 3, 8)),
        "The map of 'red' has another shape … than mid_block needs"),
    "a map that is none": (maps(red=torch.zeros(8)),
        "'red' is no map … expected (rank, anchors, 2 channels + 1) floats"),
    "a map that is not finite": (maps(red=torch.full((1, 3, 17), float("nan"))),
        "maps.safetensors … NaN or inf in 'red'"),
    "damaged maps": (maps(b"maps"), OSError, "maps.safetensors is damaged or no safetensors file … header too small"),
    "saving a map that is too large": (
        lambda world: save_tensors({"red": torch.tensor([1e9])}, world.empty / "maps.safetensors"),
        "'red' holds NaN, inf … too large for float16"),
    "pairs in a file that cannot be read": (lambda world: read_pairs(world.empty / "none.json"),
        "none.json cannot be read as JSON … No such file"),
    "pairs in a file of something else": (lambda world: read_pairs(world.folder / LABELS_NAME),
        "labels.json must hold … a list of [from, to] prompts"),
    "a map that takes away": (
        lambda world: Edit(latents=(1,), weights=(1.0,), strength=1.0, map=torch.zeros(1, 3, 17)),
        "An edit with `map` takes no latents … operation='add' and clip=False"),
    "a site without safetensors": (replaced(f"{SMALL}/{WEIGHTS_NAME}", None),
        OSError, "Expected config.json and diffusion_pytorch_model.safetensors … found ['config.json']"),
    "damaged weights": (replaced(f"{SMALL}/{WEIGHTS_NAME}", b"weights"),
        OSError, "diffusion_pytorch_model.safetensors is damaged or no safetensors file … header too small"),
    "weights that are not finite": (weights(threshold=torch.tensor([0.0, float("nan"), 0.0])),
        "diffusion_pytorch_model.safetensors … NaN or inf in 'threshold'"),
    "weights of another shape": (weights(threshold=torch.zeros(4)),
        "do not fit its config.json … 'threshold' has shape [4] instead of [3]"),
    "a configuration of another site": (rewritten(f"{SMALL}/config.json", site="up"),
        "config.json must be of site 'mid_block' … got 'up'"),
    "a configuration of a kind of somebody else": (
        rewritten(f"{SMALL}/config.json", _class_name="UNet2DConditionModel"),
        "its kind as one of ['RTSAE', … got 'UNet2DConditionModel'"),
    "a configuration without width": (rewritten(f"{SMALL}/config.json", in_channels=None),
        "`in_channels` as a positive int … got None"),
    "a configuration with other anchors": (rewritten(f"{SMALL}/config.json", anchors=[0.5]),
        "`anchors` as a list of 1 to 1000 timesteps … got [0.5]"),
    "a configuration with an activation that is no word": (rewritten(f"{SMALL}/config.json", activation=[]),
        "`activation` as a string … got []"),
    "a configuration with another activation": (rewritten(f"{SMALL}/config.json", activation="middle"),
        "config.json describes no dictionary … one of ['output', 'update'] … got 'middle'"),
    "a configuration of nothing known": (rewritten(f"{SMALL}/config.json", anchors=[1, 900]),
        "config.json describes no dictionary … strictly descending … got [1, 900]"),
    "saving what is not finite": (save_nan, "'decoder' of mid_block holds NaN … too large for torch.float16"),
    "saving through a link": (save_through_link, OSError, "mid_block is a link … nothing is written through one"),
    # Presets
    "an unknown preset": (lambda world: world.pipe.set_rtsae_preset("sunset"), "no preset 'sunset' … It has []"),
    "a preset without features": (lambda world: preset(world, {"options": {}}),
        "presets.json: preset 'mine' … a list `features` of [feature, strength]"),
    "a preset of no feature": (lambda world: preset(world, {"features": [[1.5, 1.0]]}),
        "'mine' has feature 1.5 … a label, an index or [site, index]"),
    "a preset without strength": (lambda world: preset(world, {"features": [["red", "much"]]}),
        "'mine' has strength 'much' … a finite number or a list of them"),
    "a preset with an option that is none": (
        lambda world: preset(world, {"features": [["red", 1.0]], "options": {"start": 2}}),
        "presets.json: 'mine' cannot be used … 0 <= start <= end <= 1 … got start=2"),
    # Analysis
    "recording an unknown activation": (lambda world: Recorder(world.pipe, [SITE], activation="middle"),
        "`activation` must be one of ['output', 'update', 'input'] … got 'middle'"),
    "recording a part of guidance that is not there": (record_a_stream_that_is_not_there,
        "the guidance branches ['cond', 'perturbed'] … got ['cond']"),
    "trajectories that were not recorded": (record_elsewhere,
        f"Nothing was recorded at 'mid_block' … recorded were ['{SITE}']"),
    "tracing features of two sites": (trace_two_sites, f"features of one site … at ['mid_block', '{SITE}']"),
    "tracing nothing": (lambda world: recorded(world).maps([]), "features of one site … got [] at []"),
    "recording a site that the dictionary has not": (lambda world: recorded(world, sites=["mid_block"]),
        f"no site 'mid_block' … It has ['{SITE}']"),
    "recording two kinds of activation": (record_two_kinds,
        "sites that all read the same activation … got ['output', 'update'] at ['mid_block'"),
    "an empty mask": (lambda world: recorded(world).presence(SITE, torch.zeros(8, 8)),
        "a mask that covers at least one token … got an empty one"),
    "presence in none of denoising": (lambda world: find.find_features(world.pipe, ["a star"], ["a heart"], until=0),
        "0 < until <= 1 … got 0"),
    "finding without examples": (lambda world: find.find_features(world.pipe, ["a star"], []),
        "positive and negative examples … got 1 and 0"),
    "finding with examples of two kinds": (lambda world: find.find_features(
            world.pipe, ["a star"], [Image.new("RGB", (64, 64))], by="presence", num_inference_steps=1
        ), "either prompts or pictures … got a mix"),
    "a scorer of another architecture": (lambda world: FactorScorer({"colour": ["red", "blue"]}, architecture="none"),
        "`architecture` must be 'convolution' or 'attention' … got 'none'"),
    "finding by something else": (lambda world: find.find_features(world.pipe, ["a star"], ["a heart"], by="colour"),
        "by='effect', for prompts, or 'presence' … got 'colour'"),
    "finding the effect of prompts that are no pairs": (
        lambda world: find.find_features(world.pipe, ["a star"], ["a heart", "a circle"]),
        "as many prompts with the concept as without … got 1 and 2 … by='presence'"),
    "a strip of nothing": (lambda world: plot_strip(find.FeatureTable()),
        "a table of verified features … got none … verify=True"),
    "fitting without pairs": (fitted(()), "pairs (from, to) of prompts … got none"),
    "fitting what is no pair": (fitted(("a star",)), "pairs (from, to) of prompts … got 'a star'"),
    "fitting equal prompts": (fitted((("a star", "a star"),)),
        "the two prompts of a pair to differ … got 'a star' twice … `unchanged`"),
    "fitting no latents": (fitted(latents=0), "at least one latent, or a rank … got latents=0"),
    "fitting a prompt that is too long": (fitted((("a star " * 40, "a heart"),)),
        "82 tokens is cut off at 32 … 'a star a star"),
    "explaining a word that the prompt has not": (lambda world: explain(world.pipe, "a star", "tar"),
        "a word of the prompt 'a star' … got 'tar'"),
    "explaining by the prompt itself": (lambda world: explain(world.pipe, "a star", "star", "a star"),
        "another prompt to compare 'a star' with … without the word … got the same"),
    "explaining a word that is dropped": (lambda world: explain(world.pipe, "a RED star", "RED", "a red star"),
        "the same tokens of 'a RED star' and 'a red star' … a word that it does not drop"),
    "explaining a word that changes nothing": (explained_unread,
        "'a star' and 'a heart' get the same predictions … a word that the model knows"),
    "fitting without text": (lambda world: fit_feature(Caller(world.pipe), [("a star", "a heart")], progress=False),
        "An effect compares prompts … Caller takes no `prompt`"),
    "fitting in a denoiser that is broken": (fitted_in_a_broken_denoiser,
        "finite numbers from the denoiser … got NaN or inf … float32 or bfloat16"),
    "fitting a compiled denoiser": (fitted_when_compiled,
        "a denoiser that gives gradients … got a compiled one … without torch.compile"),
    "fitting with latents that do nothing": (fitted_with_nothing,
        "a latent that has an effect on these pairs … the dictionary has none"),
    "verifying without prompts": (lambda world: find.find_features(
            world.pipe, *[[Image.new("RGB", (64, 64), c)] for c in ("red", "white")], verify=True
        ), "negative prompts to verify features on … got none"),
    "pictures for a pipeline that cannot read them": (lambda world: find.record_images(flow_pipeline(world), []),
        "a scheduler with alphas_cumprod … and FlowMatchEulerDiscreteScheduler"),
    "a label that is not there": (lambda world: search_labels(world.dictionary, "reddish"),
        "No label contains 'reddish' … Did you mean ['red']"),
    "crops of what is active nowhere": (lambda world: plot_crops([recorded(world)], quiet_feature(world)),
        "pictures in which ' … got none"),
    # What others published
    "a published one whose folder says nothing": (lambda world: theirs(world, sparsify(), rename="sae"),
        "sae says which site it is of … by `site` … by `subfolder`"),
    "several published ones of a site": (
        lambda world: load_dictionary(sparsify().write(sparsify().write(world.empty / "a").parent / "b").parent),
        f"has several of {SITE} … one of ['a', 'b'] by `subfolder`"),
    "a published pickle": (lambda world: theirs(world, sdlens()),
        "state_dict.pth', which are not loaded … diffusers-rtsae convert"),
    "a published file that is none": (
        lambda world: theirs(world, saelens("standard"), **{f"{SITE}/sae_weights.safetensors": b"x"}),
        OSError, "sae_weights.safetensors is damaged or no safetensors file … header too small"),
    "a pickle of other things": (
        lambda world: convertible(theirs(world, dictionary_learning("AutoEncoder"), None, **{f"{SITE}/ae.pt": b"x"})),
        OSError, "ae.pt is damaged … holds more than tensors"),
    "a published one without a number": (lambda world: theirs(world, sparsify(k="many")),
        "cfg.json must have 'k' as a positive int … got 'many'"),
    "a published one that was scaled by what is not told": (
        lambda world: theirs(world, saelens("standard", normalize_activations="expected_average_only_in")),
        "normalize_activations = 'expected_average_only_in' … is in no file"),
    "a published one of an unknown kind": (lambda world: theirs(world, saelens("crosscoder")),
        "architecture = 'crosscoder' … a kind that is not known here"),
    "a published one whose class nothing says": (
        lambda world: theirs(world, overcomplete("SAE"), **{f"{SITE}/overcomplete.json": b"{}"}),
        "overcomplete.json says class = None … name the `class`"),
    "a published one without a threshold": (lambda world: theirs(
            world, overcomplete("SAE"), **{f"{SITE}/overcomplete.json": b'{"class": "BatchTopKSAE"}'}
        ), "must have 'running_threshold' as a number … got None"),
    "a published one that may round or not": (lambda world: theirs(
            world, overcomplete("QSAE"), **{f"{SITE}/overcomplete.json": b'{"class": "QSAE", "hard": "no"}'}
        ), "must have 'hard' as true or false … got 'no'"),
    "a published one whose rows are not normalised": (
        lambda world: theirs(world, with_tensor(overcomplete("SAE"), "dictionary._weights", torch.randn(24, 6))),
        "a dictionary that is not normalised … call eval()"),
    "a published one with a deep encoder": (lambda world: theirs(
            world, with_tensor(overcomplete("SAE"), "encoder.mlp_blocks.0.0.weight", torch.zeros(6, 6))
        ), "an encoder of many layers … only a linear one"),
    "a published one whose latents are normalised together": (
        lambda world: theirs(world, with_tensor(overcomplete("SAE"), "encoder.final_block.1.weight", torch.ones(24))),
        "normalises all latents of a token together … none is one row"),
    "a site for several": (lambda world: load_dictionary(
            sparsify().write(sparsify().write(world.empty / "a").parent / "b").parent, site=SITE
        ), f"`site` says what one autoencoder is of … has several … one of ['a/unet.{SITE}'"),
    "a site for what says it": (lambda world: load_dictionary(world.folder, site=SITE),
        "`site` says what somebody else's files are of … small says it itself"),
    "a published one with other tensors": (lambda world: theirs(world, sparsify(d_in=7)),
        "'encoder.weight' as floats of shape (28, 7) … found float32 of shape (24, 6)"),
    "a published one of an unknown class": (
        lambda world: convertible(theirs(world, dictionary_learning("CrossCoder"), None)),
        "a `dict_class` that is known here … got 'CrossCoder'"),
    "exporting what adds two things": (
        lambda world: Dictionary({SMALL: SparseAutoencoder(SMALL, 8, [1], 8, 2, skip=True)}).export(
            "saelens", world.empty
        ),
        "SAELens has nothing like … mid_block: threshold, output"),
    "exporting trajectories": (lambda world: world.dictionary.export("saelens", world.empty),
        f"SAELens has nothing like … the RTSAE of {SITE}"),
    "exporting to a format that is only read": (
        lambda world: FORMATS["sparsify"].export(world.dictionary.sites[SITE], None),
        "sparsify is read … not written"),
    "exporting for an unknown library": (lambda world: world.dictionary.export("keras", world.empty),
        "`layout` must be one of ['saelens'] … got 'keras'"),
    "measuring on nothing": (lambda world: measure(world.pipe, world.dictionary, []),
        "at least one prompt … a dictionary that reads single steps"),
    "measuring with another model": (lambda world: measure(
            world.pipe,
            Dictionary({SITE: SparseAutoencoder(SITE, 8, [1], 8, 2)}),
            ["a star"],
            num_inference_steps=1,
        ), f"dictionary of {SITE} is for 8 channels … the model has 160"),
    "a linear map of what is read": (map_of_a_transcoder,
        f"reads the output of {SITE} … got one that reads its input"),
    # The command line
    "converting with prompts alone": (lambda world: cli.convert("org/name", world.empty, prompts=Path("prompts.txt")),
        "both --pipeline and --prompts … or neither"),
    "the command line without its packages": (command_line_without_typer,
        SystemExit, 'needs typer … "diffusers-rtsae[analysis]"'),
    "bundled files that are not there": (train_without_the_trainer,
        "commands.py is missing … install diffusers-rtsae again"),
    "a name that the package has not": (lambda world: diffusers_rtsae.RTSAEs,
        AttributeError, "module 'diffusers_rtsae' … no attribute 'RTSAEs'"),
    "a world that is not bundled": (lambda world: cli.common.parse_world("mars"),
        typer.BadParameter, "expected one of ['shapes', 'people'] … got 'mars'"),
    "a guidance that is no number": (lambda world: cli.common.finite(float("nan")),
        typer.BadParameter, "expected a finite number … got nan"),
    "a feature twice": (lambda world: cli.steer("a star", ["red=1", "blue=1", "red=2"]),
        "'red' is given twice … expected one strength"),
    "an empty prompt to find": (lambda world: cli.find(["a star", " "], ["a heart"]),
        "A prompt of --with is empty … expected words"),
    "a picture of no format": (lambda world: cli.steer("a star", ["red=1"], out=Path("star.doc")),
        "star.doc must end in … .png, .jpg,"),
    "a picture where a folder is": (lambda world: cli.common.check_output(world.empty),
        OSError, "is a folder … expected another name"),
    "a picture below a file": (lambda world: cli.common.check_output(world.folder / "rtsae_config.json" / "star.png"),
        OSError, "star.png cannot be written … rtsae_config.json is a file"),
    "a picture where nothing may be written": (lambda world: cli.common.check_output(Path("/proc/star.png")),
        OSError, "/proc/star.png cannot be written … No such file"),
    "prompts in another encoding": (no_utf8, "prompts.txt, line 3: expected text in UTF-8 … got b'ein gr\\xf6"),
    "a file instead of a dictionary": (lambda world: load_dictionary(world.folder / "rtsae_config.json"),
        OSError, "rtsae_config.json is a file … expected the folder of a dictionary, or a Hub id"),
    "a full disk": (save_on_a_full_disk,
        OSError, "diffusion_pytorch_model.safetensors could not be written … File too large"),
    "a demonstration without labels": (demo_without_labels, "The dictionary has no labels … to steer with"),
    "steering with nothing": (lambda world: cli.steer("a star"), "either features, like red=1.5 … or --preset"),
    "fitting without pairs on the command line": (lambda world: cli.fit("red"), "either --from and --to … or --pairs"),
    "fitting half a pair": (lambda world: cli.fit("red", ["a star"], []), "as many --from as --to … got 1 and 0"),
    "a strip without --verify": (lambda world: cli.find(["a star"], ["a heart"], strip=Path("strip.png")),
        "A --strip shows what verified features do … expected --verify"),
    "a preset and options": (lambda world: cli.steer("a star", preset="sunset", start=0.5),
        "A preset brings its own … --start, --end, --mask and --operation"),
    "a feature without strength": (lambda world: cli.common.parse_strengths(["red"]),
        "Expected FEATURE=STRENGTH … got 'red'"),
    "a report on another pipeline without prompts": (lambda world: cli.report(pipeline="another"),
        "another pipeline needs --prompts … one prompt a line"),
    "a report without prompts": (lambda world: report_of_nothing(world, ()),
        "Expected prompts to look for features in … got none"),
    "a report of no features": (report_of_nothing, "Expected features to report … no labels, and `count` is 0"),
    "the app without gradio": (app_without_gradio, ModuleNotFoundError, "No module named … 'gradio'"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISUSE.values(), ids=MISUSE)
def test_misuse_is_told_what_was_expected_and_what_exists(world, case):
    misuse, kind, said = case if len(case) == 3 else (case[0], ValueError, case[1])
    parts = said.split(" … ")
    assert len(parts) > 1
    with pytest.raises(kind) as caught:
        misuse(world)
    told = str(caught.value)
    assert re.search(".*".join(map(re.escape, parts)), told, re.DOTALL), told


def messages(source: str):
    """The kind of each `raise` in a module, and the words it is sure to say."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Raise) or node.exc is None:
            continue
        if isinstance(node.exc, ast.Name) and node.exc.id.startswith("_"):  # caught inside, and said by nobody
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
            yield kind, "".join(part.value for part in parts if isinstance(part, ast.Constant))


def test_every_message_is_written_out_where_it_is_raised():
    said = [one for path in PACKAGE.rglob("*.py") for one in messages(path.read_text())]
    assert {kind for kind, _ in said} == {
        *(
            "ValueError",
            "OSError",
            "SystemExit",
            "typer.BadParameter",
            "AttributeError",
            "ModuleNotFoundError",
            "torch.OutOfMemoryError",
        )
    }
    assert not [words for _, words in said if len(words) < 10]
