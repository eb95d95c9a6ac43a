"""
What a misuse is told, in one table: what was done, and what the sentence must name: what was expected, and what is
there. What the Hub answers and what damaged files hold is tested in test_hub.py and test_security.py.
"""

import ast
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

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
from diffusers_rtsae.models import PLACES, LinearMap, MatchingPursuitSAE, QuantizedSAE, Step, TemporalSAE
from diffusers_rtsae.steering import Edit
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


# what was done: how, what is raised, and the whole message, where … stands for anything
MISUSE = {
    # Pipelines and adapters
    "nothing is loaded": (unloaded, "`load_rtsae`"),
    "the last was deleted": (deleted, "`load_rtsae`"),
    "a pipeline without denoiser": (
        lambda world: DiffusionPipeline().load_rtsae(world.dictionary),
        "DiffusionPipeline",
        "'transformer'",
    ),
    "a name that is taken": (lambda world: world.pipe.load_rtsae(world.dictionary), "'default'", "`unload_rtsae`"),
    "an unknown adapter": (lambda world: world.pipe.set_rtsae("second"), "`adapter_name`", "'second'"),
    "no adapter of several": (several_adapters, "`adapter_name`", "got None"),
    "more weights than adapters": (lambda world: world.pipe.set_rtsae(["default"], [1.0, 2.0]), "got 2", "'default'"),
    "a weight that is no number": (
        lambda world: world.pipe.set_rtsae("default", float("nan")),
        "Expected finite weights, got [nan]",
    ),
    # Features
    "features without strengths": (lambda world: world.pipe.set_rtsae_features("red"), "got str"),
    "a misspelt label": (feature("purpel"), "'purpel'", "'purple'"),
    "a label like none": (feature("x"), "'x'", "colour: red"),
    "an index in quotes": (feature("1234"), "'1234'", "1234"),
    "a label of a site that is not loaded": (
        lambda world: Dictionary({"up": two_sites().sites["up"]}, two_sites().labels).features("low"),
        "'low'",
        "'up'",
    ),
    "an index of several sites": (lambda world: two_sites().features(3), "(site, 3)", "'up'"),
    "an index that is no number": (feature(1.5), "(site, index)", "got 1.5"),
    "an index that does not exist": (feature(2048), "2048", "2047"),
    "a feature of an unknown site": (feature(("up_blocks.2", 3)), "'up_blocks.2'"),
    "a strength that is no number": (steer("strong"), "'strong'"),
    "a strength that is not finite": (steer([1.0, float("inf")]), "(1.0, inf)"),
    "no strength": (steer([]), "()"),
    "a schedule of another shape": (steer(torch.zeros(2, 2, 2)), "(steps,)", "(2, 2, 2)"),
    "a schedule that is not finite": (steer(torch.tensor([0.0, float("nan")])), "got NaN"),
    "a function that gives no number": (lambda world: generate(world, {"red": lambda progress: "strong"}), "'strong'"),
    "three strengths for two prompts": (lambda world: generate(world, {"red": [1.0, 2.0, 3.0]}), "(2)", "got 3"),
    "two strengths for four prompts": (
        lambda world: generate(world, {"red": [1.0, 2.0]}, ["a star", "a heart", "a cross", "a circle"]),
        "(4)",
        "got 2",
    ),
    "three masks for two prompts": (
        lambda world: generate(world, {"red": 1.0}, mask=np.ones((3, 8, 8))),
        "(2)",
        "got 3",
    ),
    # Options
    "a misspelt option": (steer(strenght=2.0), "'strenght'", "'where'"),
    "an option that the feature decides": (steer(latents=(1,)), "'latents'", "'apply_to'"),
    "an unknown operation": (steer(operation="remove"), "`operation`", "'remove'"),
    "erasing everything": (steer(operation="erase", where="everywhere"), "expected a `mask`", "take tokens from"),
    "an unknown half": (steer(apply_to="uncond"), "`apply_to`", "'uncond'"),
    "an unknown injection": (steer(injection="step"), "`injection`", "'step'"),
    "a window before the beginning": (steer(start=-0.1), "got start", "1.0"),
    "a window after the end": (steer(end=1.5), "got start", "1.5"),
    "a window that ends before it begins": (steer(start=0.6, end=0.5), "got start", "0.5"),
    "a window that is no number": (steer(start="0.2"), "got start", "1.0"),
    "transfer from nothing": (steer(operation="transfer"), "'transfer'", "`source`"),
    "replace of nothing": (steer(operation="replace"), "'replace'", "`source`"),
    "a source that is not used": (steer(source="blue"), "`source`", "'add'"),
    "a source without features": (steer(operation="transfer", source=[]), "`source`"),
    "nowhere": (steer(where=[]), "`where`"),
    "a mask that is a path": (steer(mask="mask.png"), "PIL", "got str"),
    "a mask of one dimension": (steer(mask=np.ones(4)), "(height, width)", "(4,)"),
    "a mask of frames for pictures": (
        lambda world: generate(world, {"red": 1.0}, mask=np.ones((2, 3, 4, 5))),
        "has one frame",
        "3",
    ),
    "a mask without pixels": (steer(mask=np.ones((0, 4))), "(height, width)", "(1, 0, 4)"),
    "a mask of bytes": (steer(mask=np.array([[0, 255]])), "got values", "255"),
    "the place where no grid is": (
        lambda world: LinearMap(torch.zeros(1, 3, 2 * 8 + 1 + PLACES))(torch.zeros(1, 5, 8), Step(500, 1.0)),
        "5 lie on no grid",
        "5",
    ),
    "a mask where no grid is": (lambda world: other(world, TEXT_SITE, mask=np.ones((8, 8))), "32", "16x16"),
    # What does not fit the pipeline
    "a site that the model lacks": (
        lambda world: other(world, "up_blocks.1.attentions.7", 8),
        "UNet2DConditionModel",
        "`list_sites(denoiser)`",
    ),
    "the sites of something else": (lambda world: list_sites("unet"), "'unet'", "'transformer'"),
    "a denoiser put in the place of one with a dictionary": (replaced_denoiser, "`load_rtsae`", "`unload_rtsae`"),
    "a dictionary of another width": (
        lambda world: other(world, SITE, 8),
        "is for 8 channels, the model has 160 there.",
    ),
    "another width that shows only when running": (
        lambda world: other(world, TEXT_SITE, 8),
        "is for 8 channels, the model has 160 there.",
    ),
    "a dictionary of another model": (
        lambda world: another_model(
            world, base_model="sd15", signature=world.dictionary.config["signature"] | {"cross_attention_dim": 768}
        ),
        "15",
        "192",
    ),
    "a signature of another form": (lambda world: another_model(world, signature="UNet"), "`signature`", "'UNet'"),
    "a broken decoder": (lambda world: other(world, broken="decoder"), "[1]"),
    "a broken encoder": (lambda world: other(world, broken="encoder"), "[1]"),
    "a sampler with another unit of time": (another_sampler(Odd(), 2), "7000", "1000"),
    "a sampler that does not say its unit": (
        lambda world: training_time(1.0, SimpleNamespace(config={})),
        "SimpleNamespace",
    ),
    "a batch of an unknown layout": (
        lambda world: (feature("red")(world), Caller(world.pipe)(3, 1)),
        "supported; expected uncond + cond",
        "3",
    ),
    "guidance in another order": (
        lambda world: (steer(apply_to="contrast")(world), Caller(world.pipe)(1, 1, unconditional=True)),
        "apply_to",
        "'cond'",
    ),
    "rows that are told apart by nothing": (
        lambda world: told_of([0.0, 1.0], negative_prompt_embeds=torch.zeros(1, 3)),
        "their layout is not known",
        "2",
    ),
    "rows of two prompts at once": (
        lambda world: told_of([0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0], prompts=2),
        "draw one at a time",
    ),
    "rows at a site that are no multiple": (
        lambda world: list(CallReader().read(Arguments(["x"], (torch.zeros(2, 3),), {})).parts_of(5)),
        "frames beside one another are",
        "2",
        "5",
    ),
    "the grid of what has none": (record_without_a_grid, "32", "16x16"),
    "some of the images": (
        lambda world: (feature("red")(world), Caller(world.pipe)(1, 2, images=2)),
        "be followed: draw one alone",
        "1",
        "2",
    ),
    "a family that is refused": (lambda world: (feature("red")(world), Cosmos3Like(world.pipe)(1, 1)), "Cosmos3Like"),
    "a loop without its timestep": (
        lambda world: (feature("red")(world), Caller(world.pipe)(2, 1, t=None)),
        "999.5",
        "`t`",
    ),
    "frames at different times": (
        lambda world: (feature("red")(world), Caller(world.pipe)(2, 1, t=torch.tensor([1.0, 500.0]))),
        "an edit has one time",
    ),
    "a schedule that gives another number of strengths later": (
        lambda world: (
            world.pipe.set_rtsae_features({"red": lambda progress: 1.0 if progress < 0.5 else [1.0, 2.0]}),
            world.draw(world.pipe, ["a star"], 4, 0),
        ),
        "2 strengths at t =",
        "2",
        "1",
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
        "64",
        "16",
    ),
    "reading latents of states that were drawn without": (
        lambda world: Intervention(
            {SITE: [Edit(latents=(3,), weights=(1.0,), strength=1.0, operation="ablate", clip=False)]},
            States(world.pipe, [("a star", "a heart")], codes=False, num_inference_steps=2),
        ),
        "up_blocks",
    ),
    "choosing latents of what has no gradient": (
        lambda world: gradient(torch.zeros(()), []),
        "`rank`",
    ),
    "recording nothing": (
        lambda world: Recorder(world.pipe, [SITE]).size(SITE),
        "'up_blocks.1.attentions.1'",
        "`with`",
    ),
    "recording another number of tokens later": (recorded_at_two_sizes, "'up_blocks.1.attentions.1'", "256"),
    "a pipeline without scheduler": (without_scheduler, "at which timestep it is"),
    "a denoiser that is called with nothing": (
        lambda world: Arguments(["sample"], (), {}),
        "is called without a sample",
    ),
    "a block that returns several things": (
        lambda world: Block("x").output((torch.zeros(1), torch.zeros(1))),
        "expected a tensor",
        "`TransformerBlockRegistry`",
    ),
    # Dictionaries in memory
    "a dictionary without sites": (lambda world: Dictionary({}), "needs at least one site"),
    "a dictionary of something else": (
        lambda world: world.pipe.load_rtsae({SITE: "folder"}, "second"),
        "' under that name, got '",
    ),
    "a dictionary under another name": (
        lambda world: world.pipe.load_rtsae({"mid_block": world.dictionary.sites[SITE]}, "second"),
        "'mid_block'",
    ),
    "a site that is no path": (lambda world: Dictionary({"../up": RTSAE("../up", 8, [900, 1], 8, 2)}), "'../up'"),
    "a subfolder of what is in memory": (
        lambda world: world.pipe.load_rtsae(world.dictionary, "second", subfolder="v2"),
        "`subfolder`",
        "`dtype`",
    ),
    "a revision of what is in memory": (
        lambda world: world.pipe.load_rtsae(world.dictionary, "second", revision="v2"),
        "`subfolder`",
        "`dtype`",
    ),
    "a dtype of what is in memory": (
        lambda world: world.pipe.load_rtsae(world.dictionary, "second", dtype=torch.float16),
        "`subfolder`",
        "`dtype`",
    ),
    "an unknown layer in memory": (
        lambda world: world.pipe.load_rtsae(world.dictionary, "second", layers=["down"]),
        "'down'",
    ),
    "anchors that ascend": (lambda world: RTSAE(SMALL, 8, [1, 900], 8, 2), "`anchors`", "900"),
    "anchors that repeat": (lambda world: RTSAE(SMALL, 8, [900, 900], 8, 2), "`anchors`", "900"),
    "no anchors": (lambda world: RTSAE(SMALL, 8, [], 8, 2), "`anchors`"),
    "an unknown activation": (
        lambda world: RTSAE(SMALL, 8, [900, 1], 8, 2, activation="middle"),
        "`activation`",
        "'middle'",
    ),
    "an unknown sparsity": (
        lambda world: SparseAutoencoder(SMALL, 8, [900, 1], 8, 2, sparsity="relu"),
        "`sparsity`",
        "'relu'",
    ),
    "groups of different sizes": (
        lambda world: SparseAutoencoder(SMALL, 8, [900, 1], 8, 3, sparsity="groupmax"),
        "'groupmax'",
    ),
    "one level": (lambda world: QuantizedSAE(SMALL, 8, [900, 1], 8, 2, num_levels=1), "`num_levels`", "`centred`"),
    "a pursuit that ends before it begins": (
        lambda world: MatchingPursuitSAE(SMALL, 8, [900, 1], 8, 2, residual_threshold=-1.0),
        "`centred`",
        "`residual_threshold`",
    ),
    "a pursuit of an unknown norm": (
        lambda world: MatchingPursuitSAE(SMALL, 8, [900, 1], 8, 2, input_norm="batch"),
        "`input_norm`",
        "'batch'",
    ),
    "heads that do not divide": (
        lambda world: TemporalSAE(SMALL, 8, [900, 1], 8, 2, heads=3, key_channels=6),
        "`heads`",
        "`layers`",
    ),
    "a temporal one of an unknown sparsity": (
        lambda world: TemporalSAE(SMALL, 8, [900, 1], 8, 2, "output", "relu", heads=2, key_channels=4),
        "`sparsity`",
        "'relu'",
    ),
    "an unknown norm of the input": (
        lambda world: SparseAutoencoder(SMALL, 8, [900, 1], 8, 2, input_norm="batch"),
        "`centred`",
        "'batch'",
    ),
    "a scale of time that is no number": (
        lambda world: TIDE(SMALL, 8, [900, 1], 8, 2, time_scale=float("nan")),
        "`flip_sin_to_cos`",
        "`downscale_freq_shift`",
    ),
    "an odd embedding of time": (
        lambda world: TIDE(SMALL, 8, [900, 1], 8, 2, time_channels=7),
        "`time_channels`",
        "got 7",
    ),
    "experts of different sizes": (
        lambda world: MixtureSAE(SMALL, 8, [900, 1], 8, 2, num_experts=4, shared_latents=2),
        "got 4",
    ),
    "unknown metadata": (
        lambda world: MixtureSAE(SMALL, 8, [900, 1], 8, 2, num_experts=2, metadata=["hour"]),
        "`metadata`",
        "'hour'",
    ),
    "trajectories of another width": (
        lambda world: world.dictionary.sites[SITE].encode(torch.zeros(2, 3, 8)),
        "(batch, 1 to 3 anchors, 160 channels)",
        "(2, 3, 8)",
    ),
    "trajectories of too many anchors": (
        lambda world: world.dictionary.sites[SITE].encode(torch.zeros(2, 4, 160)),
        "(batch, 1 to 3 anchors, 160 channels)",
        "(2, 4, 160)",
    ),
    "one activation": (
        lambda world: world.dictionary.sites[SITE].encode(torch.zeros(160)),
        "(batch, 1 to 3 anchors, 160 channels)",
        "(160,)",
    ),
    # Folders
    "nothing": (lambda world: load_dictionary(None), "got NoneType"),
    "an empty string": (lambda world: load_dictionary(""), "got an"),
    "one RTSAE": (lambda world: load_dictionary(world.dictionary.sites[SITE]), "got RTSAE"),
    "a Hub id that is not in the cache": (
        lambda world: load_dictionary("org/none", cache_dir=world.empty / "cache", local_files_only=True),
        OSError,
        "'org/none'",
    ),
    "a folder that does not exist": (
        lambda world: load_dictionary(world.empty / "nowhere", local_files_only=True),
        OSError,
        "be fetched from the Hub:",
    ),
    "a folder of something else": (
        lambda world: load_dictionary(world.empty),
        OSError,
        "rtsae_config.json",
        "'small'",
    ),
    "a folder of somebody else's": (
        lambda world: read_contents(sdlens().write(world.empty / "theirs")),
        OSError,
        "SDLens",
        "OUT",
    ),
    "a folder without labels": (replaced(LABELS_NAME, None), OSError, "labels.json", "'rtsae_config.json'"),
    "a subfolder that does not exist": (local(subfolder="v2"), OSError, "rtsae_config.json"),
    "a subfolder outside": (local(subfolder="../small"), "`subfolder`", "'../small'"),
    "a revision of a folder": (local(revision="v1"), "`revision`"),
    "a download without the network": (
        lambda world: load_dictionary("org/name", force_download=True, local_files_only=True),
        "`force_download`",
        "`local_files_only`",
    ),
    "a name as dtype": (local(dtype="float16"), "`dtype`", "'float16'"),
    "a dtype that weights cannot have": (local(dtype=torch.float64), "`dtype`", "got torch.float64"),
    "one layer without a list": (local(layers=SMALL), "`layers`", "'mid_block'"),
    "an unknown layer": (local(layers=["mid_blocks"]), "'mid_blocks'", "'mid_block'"),
    # Files
    "damaged JSON": (replaced(LABELS_NAME, b"{"), "labels.json", "(char 1)"),
    "JSON of something else": (replaced(CONFIG_NAME, b"[]"), "rtsae_config.json", "got list"),
    "another format": (rewritten(CONFIG_NAME, format_version=99), "rtsae_config.json", "99"),
    "a base model that is no name": (rewritten(CONFIG_NAME, base_model=3), "rtsae_config.json", "got 3"),
    "sites that are no paths": (rewritten(CONFIG_NAME, sites=["../up"]), "rtsae_config.json", "'../up'"),
    "a label of another form": (rewritten(LABELS_NAME, red=[1]), "labels.json", "`seen`"),
    "a label of an unknown site": (label(site="up"), "labels.json", "'mid_block'"),
    "a label of a latent that does not exist": (label(latents=[16]), "labels.json", "15"),
    "a label with weights that are no numbers": (label(weights=["1"]), "labels.json", "'1'"),
    "a label that acts where nothing is": (label(where=[]), "`where`", "'red'"),
    "a label with options of no edit": (
        rewritten(
            LABELS_NAME,
            red={"features": [{"site": SMALL, "latents": [1], "weights": [1.0]}], "edit": {"apply_to": "none"}},
        ),
        "labels.json",
        "'none'",
    ),
    "a part of a label without bounds": (label(operation="ablate"), "labels.json", "got None"),
    "a part of a label that is no part": (label(bounds=[0, 1], operation="set"), "labels.json", "'set'"),
    "a label of a map that is not there": (
        label(bounds=[0, 1], latents=[], weights=[], map="red"),
        "labels.json",
        "'red'",
    ),
    "labels without their maps": (
        lambda world: Dictionary(world.dictionary.sites, world.dictionary.labels),
        "'white'",
    ),
    "the path of a label that has nothing but a map": (
        lambda world: Dictionary(
            world.dictionary.sites,
            {"own": {"features": [{"site": next(iter(world.dictionary.sites)), "latents": [], "map": "own"}]}},
            maps={"own": torch.zeros(1, 3, 17)},
        ).trajectory("own"),
        "'own'",
    ),
    "a map of another shape": (maps(red=torch.zeros(2, 3, 8)), "'red'", "mid_block"),
    "a map that is none": (maps(red=torch.zeros(8)), "'red'", "(rank, anchors, 2 channels + 1)"),
    "a map that is not finite": (maps(red=torch.full((1, 3, 17), float("nan"))), "NaN", "'red'"),
    "damaged maps": (maps(b"maps"), OSError, "damaged or no safetensors file:"),
    "saving a map that is too large": (
        lambda world: save_tensors({"red": torch.tensor([1e9])}, world.empty / "maps.safetensors"),
        "'red'",
        "16",
    ),
    "pairs in a file that cannot be read": (lambda world: read_pairs(world.empty / "none.json"), "none.json", "JSON"),
    "pairs in a file of something else": (lambda world: read_pairs(world.folder / LABELS_NAME), "labels.json"),
    "a map that takes away": (
        lambda world: Edit(latents=(1,), weights=(1.0,), strength=1.0, map=torch.zeros(1, 3, 17)),
        "takes no latents",
    ),
    "a site without safetensors": (replaced(f"{SMALL}/{WEIGHTS_NAME}", None), OSError, "config.json", "'config.json'"),
    "damaged weights": (replaced(f"{SMALL}/{WEIGHTS_NAME}", b"weights"), OSError, "diffusion_pytorch_model"),
    "weights that are not finite": (
        weights(threshold=torch.tensor([0.0, float("nan"), 0.0])),
        "diffusion_pytorch_model",
        "'threshold'",
    ),
    "weights of another shape": (weights(threshold=torch.zeros(4)), "diffusion_pytorch_model", "'threshold'"),
    "a configuration of another site": (rewritten(f"{SMALL}/config.json", site="up"), "config.json", "'up'"),
    "a configuration of a kind of somebody else": (
        rewritten(f"{SMALL}/config.json", _class_name="UNet2DConditionModel"),
        "config.json",
        "'UNet2DConditionModel'",
    ),
    "a configuration without width": (rewritten(f"{SMALL}/config.json", in_channels=None), "config.json", "got None"),
    "a configuration with other anchors": (rewritten(f"{SMALL}/config.json", anchors=[0.5]), "config.json", "0.5"),
    "a configuration with an activation that is no word": (
        rewritten(f"{SMALL}/config.json", activation=[]),
        "`activation`",
    ),
    "a configuration with another activation": (
        rewritten(f"{SMALL}/config.json", activation="middle"),
        "`activation`",
    ),
    "a configuration of nothing known": (rewritten(f"{SMALL}/config.json", anchors=[1, 900]), "config.json", "900"),
    "saving what is not finite": (save_nan, "'decoder'", "16"),
    "saving through a link": (save_through_link, OSError, "mid_block"),
    # Presets
    "an unknown preset": (lambda world: world.pipe.set_rtsae_preset("sunset"), "'sunset'"),
    "a preset without features": (lambda world: preset(world, {"options": {}}), "presets.json", "`options`"),
    "a preset of no feature": (lambda world: preset(world, {"features": [[1.5, 1.0]]}), "presets.json", "1.5"),
    "a preset without strength": (
        lambda world: preset(world, {"features": [["red", "much"]]}),
        "presets.json",
        "'much'",
    ),
    "a preset with an option that is none": (
        lambda world: preset(world, {"features": [["red", 1.0]], "options": {"start": 2}}),
        "presets.json",
        "'mine'",
    ),
    # Analysis
    "recording an unknown activation": (
        lambda world: Recorder(world.pipe, [SITE], activation="middle"),
        "`activation`",
        "'middle'",
    ),
    "recording a part of guidance that is not there": (record_a_stream_that_is_not_there, "'perturbed'", "'cond'"),
    "trajectories that were not recorded": (record_elsewhere, "'mid_block'"),
    "tracing features of two sites": (trace_two_sites, "'mid_block'", "', '"),
    "tracing nothing": (lambda world: recorded(world).maps([]), "site, got [] at []"),
    "recording a site that the dictionary has not": (
        lambda world: recorded(world, sites=["mid_block"]),
        "'mid_block'",
    ),
    "recording two kinds of activation": (record_two_kinds, "['output', 'update']", "'mid_block'"),
    "an empty mask": (lambda world: recorded(world).presence(SITE, torch.zeros(8, 8)), "at least one token"),
    "presence in none of denoising": (
        lambda world: find.find_features(world.pipe, ["a star"], ["a heart"], until=0),
        "got 0",
    ),
    "finding without examples": (lambda world: find.find_features(world.pipe, ["a star"], []), "got 1"),
    "finding with examples of two kinds": (
        lambda world: find.find_features(
            world.pipe, ["a star"], [Image.new("RGB", (64, 64))], by="presence", num_inference_steps=1
        ),
        "got a mix",
    ),
    "a scorer of another architecture": (
        lambda world: FactorScorer({"colour": ["red", "blue"]}, architecture="none"),
        "`architecture`",
        "'none'",
    ),
    "finding by something else": (
        lambda world: find.find_features(world.pipe, ["a star"], ["a heart"], by="colour"),
        "'effect'",
        "'colour'",
    ),
    "finding the effect of prompts that are no pairs": (
        lambda world: find.find_features(world.pipe, ["a star"], ["a heart", "a circle"]),
        "got 1",
        "'presence'",
    ),
    "a strip of nothing": (lambda world: plot_strip(find.FeatureTable()), "find_features"),
    "fitting without pairs": (fitted(()), "(from, to)", "got none"),
    "fitting what is no pair": (fitted(("a star",)), "(from, to)", "'a star'"),
    "fitting equal prompts": (fitted((("a star", "a star"),)), "'a star'", "`unchanged`"),
    "fitting no latents": (fitted(latents=0), "got latents"),
    "fitting a prompt that is too long": (fitted((("a star " * 40, "a heart"),)), "32"),
    "fitting without text": (
        lambda world: fit_feature(Caller(world.pipe), [("a star", "a heart")], progress=False),
        "Caller takes no `prompt`",
    ),
    "fitting in a denoiser that is broken": (fitted_in_a_broken_denoiser, "NaN", "16"),
    "fitting a compiled denoiser": (fitted_when_compiled, "got a compiled one", "torch.compile"),
    "fitting with latents that do nothing": (fitted_with_nothing, "an effect on these pairs"),
    "verifying without prompts": (
        lambda world: find.find_features(
            world.pipe, *[[Image.new("RGB", (64, 64), c)] for c in ("red", "white")], verify=True
        ),
        "negative prompts",
        "got none",
    ),
    "pictures for a pipeline that cannot read them": (
        lambda world: find.record_images(flow_pipeline(world), []),
        "StableDiffusionPipeline",
        "FlowMatchEulerDiscreteScheduler",
    ),
    "a label that is not there": (lambda world: search_labels(world.dictionary, "reddish"), "'reddish'"),
    "crops of what is active nowhere": (
        lambda world: plot_crops([recorded(world)], quiet_feature(world)),
        "got none",
    ),
    # What others published
    "a published one whose folder says nothing": (
        lambda world: theirs(world, sparsify(), rename="sae"),
        "`site`",
        "`subfolder`",
    ),
    "several published ones of a site": (
        lambda world: load_dictionary(sparsify().write(sparsify().write(world.empty / "a").parent / "b").parent),
        "up_blocks",
        "`subfolder`",
    ),
    "a published pickle": (lambda world: theirs(world, sdlens()), "state_dict", "OUT"),
    "a published file that is none": (
        lambda world: theirs(world, saelens("standard"), **{f"{SITE}/sae_weights.safetensors": b"x"}),
        OSError,
        "sae_weights",
    ),
    "a pickle of other things": (
        lambda world: convertible(theirs(world, dictionary_learning("AutoEncoder"), None, **{f"{SITE}/ae.pt": b"x"})),
        OSError,
        "or holds more than tensors:",
    ),
    "a published one without a number": (lambda world: theirs(world, sparsify(k="many")), "cfg.json", "'many'"),
    "a published one that was scaled by what is not told": (
        lambda world: theirs(world, saelens("standard", normalize_activations="expected_average_only_in")),
        "cfg.json",
        "'expected_average_only_in'",
    ),
    "a published one of an unknown kind": (lambda world: theirs(world, saelens("crosscoder")), "'crosscoder'"),
    "a published one whose class nothing says": (
        lambda world: theirs(world, overcomplete("SAE"), **{f"{SITE}/overcomplete.json": b"{}"}),
        "`class`",
    ),
    "a published one without a threshold": (
        lambda world: theirs(
            world, overcomplete("SAE"), **{f"{SITE}/overcomplete.json": b'{"class": "BatchTopKSAE"}'}
        ),
        "'running_threshold'",
    ),
    "a published one that may round or not": (
        lambda world: theirs(
            world, overcomplete("QSAE"), **{f"{SITE}/overcomplete.json": b'{"class": "QSAE", "hard": "no"}'}
        ),
        "'hard'",
        "'no'",
    ),
    "a published one whose rows are not normalised": (
        lambda world: theirs(world, with_tensor(overcomplete("SAE"), "dictionary._weights", torch.randn(24, 6))),
        "overcomplete.safetensors has a dictionary that is not normal",
    ),
    "a published one with a deep encoder": (
        lambda world: theirs(
            world, with_tensor(overcomplete("SAE"), "encoder.mlp_blocks.0.0.weight", torch.zeros(6, 6))
        ),
        "overcomplete.safetensors has an encoder of many layers; only",
    ),
    "a published one whose latents are normalised together": (
        lambda world: theirs(world, with_tensor(overcomplete("SAE"), "encoder.final_block.1.weight", torch.ones(24))),
        "overcomplete.safetensors normalises all latents of a token t",
    ),
    "a site for several": (
        lambda world: load_dictionary(
            sparsify().write(sparsify().write(world.empty / "a").parent / "b").parent, site=SITE
        ),
        "`site`",
        "`subfolder`",
    ),
    "a site for what says it": (lambda world: load_dictionary(world.folder, site=SITE), "`site`"),
    "a published one with other tensors": (
        lambda world: theirs(world, sparsify(d_in=7)),
        "'encoder.weight'",
        "(24, 6)",
    ),
    "a published one of an unknown class": (
        lambda world: convertible(theirs(world, dictionary_learning("CrossCoder"), None)),
        "config.json",
        "'CrossCoder'",
    ),
    "exporting what adds two things": (
        lambda world: Dictionary({SMALL: SparseAutoencoder(SMALL, 8, [1], 8, 2, skip=True)}).export(
            "saelens", world.empty
        ),
        "SAELens has nothing like the settings of mid_block: threshol",
    ),
    "exporting trajectories": (lambda world: world.dictionary.export("saelens", world.empty), "SAELens", "up_blocks"),
    "exporting to a format that is only read": (
        lambda world: FORMATS["sparsify"].export(world.dictionary.sites[SITE], None),
        "sparsify is read, and not written.",
    ),
    "exporting for an unknown library": (
        lambda world: world.dictionary.export("keras", world.empty),
        "`layout`",
        "'keras'",
    ),
    "measuring on nothing": (
        lambda world: measure(world.pipe, world.dictionary, []),
        "at least one prompt",
        "single steps",
    ),
    "measuring with another model": (
        lambda world: measure(
            world.pipe,
            Dictionary({SITE: SparseAutoencoder(SITE, 8, [1], 8, 2)}),
            ["a star"],
            num_inference_steps=1,
        ),
        "up_blocks",
        "160",
    ),
    "a linear map of what is read": (map_of_a_transcoder, "up_blocks"),
    # The command line
    "converting with prompts alone": (
        lambda world: cli.convert("org/name", world.empty, prompts=Path("prompts.txt")),
        "--pipeline",
        "--prompts",
    ),
    "the command line without its packages": (command_line_without_typer, SystemExit, '"diffusers-rtsae[analysis]"'),
    "bundled files that are not there": (
        train_without_the_trainer,
        "commands.py is missing: install diffusers-rtsae again.",
    ),
    "a name that the package has not": (
        lambda world: diffusers_rtsae.RTSAEs,
        AttributeError,
        "'diffusers_rtsae'",
        "'RTSAEs'",
    ),
    "a world that is not bundled": (
        lambda world: cli.common.parse_world("mars"),
        typer.BadParameter,
        "'shapes'",
        "'mars'",
    ),
    "a guidance that is no number": (lambda world: cli.common.finite(float("nan")), typer.BadParameter, "got nan"),
    "a feature twice": (lambda world: cli.steer("a star", ["red=1", "blue=1", "red=2"]), "'red'"),
    "an empty prompt to find": (lambda world: cli.find(["a star", " "], ["a heart"]), "--with"),
    "a picture of no format": (
        lambda world: cli.steer("a star", ["red=1"], out=Path("star.doc")),
        ".jpg, .jpeg, .webp, .tif, .tiff",
    ),
    "a picture where a folder is": (
        lambda world: cli.common.check_output(world.empty),
        OSError,
        "another name to write to",
    ),
    "a picture below a file": (
        lambda world: cli.common.check_output(world.folder / "rtsae_config.json" / "star.png"),
        OSError,
        "rtsae_config.json",
    ),
    "a picture where nothing may be written": (
        lambda world: cli.common.check_output(Path("/proc/star.png")),
        OSError,
        "/proc/star.png cannot be written:",
    ),
    "prompts in another encoding": (no_utf8, "UTF", "'ein gr\\xf6\\xdferer Stern'"),
    "a file instead of a dictionary": (
        lambda world: load_dictionary(world.folder / "rtsae_config.json"),
        OSError,
        "rtsae_config.json",
    ),
    "a full disk": (save_on_a_full_disk, OSError, "could not be written:"),
    "a demonstration without labels": (demo_without_labels, "no labels to steer with"),
    "steering with nothing": (lambda world: cli.steer("a star"), "1.5", "--preset"),
    "fitting without pairs on the command line": (lambda world: cli.fit("red"), "--from", "--pairs"),
    "fitting half a pair": (lambda world: cli.fit("red", ["a star"], []), "--from", "got 1"),
    "a strip without --verify": (
        lambda world: cli.find(["a star"], ["a heart"], strip=Path("strip.png")),
        "--strip",
        "--verify",
    ),
    "a preset and options": (lambda world: cli.steer("a star", preset="sunset", start=0.5), "--start", "--operation"),
    "a feature without strength": (lambda world: cli.common.parse_strengths(["red"]), "FEATURE", "'red'"),
    "a report on another pipeline without prompts": (lambda world: cli.report(pipeline="another"), "--prompts"),
    "a report without prompts": (lambda world: report_of_nothing(world, ()), "to look for features in"),
    "a report of no features": (report_of_nothing, "`count`"),
    "the app without gradio": (app_without_gradio, ModuleNotFoundError, "'gradio'"),
}


@pytest.mark.parametrize("case", MISUSE.values(), ids=MISUSE)
def test_misuse_is_told_what_was_expected_and_what_exists(world, case):
    misuse, *named = case
    kind = named.pop(0) if isinstance(named[0], type) else ValueError
    with pytest.raises(kind) as caught:
        misuse(world)
    told = str(caught.value)
    assert [name for name in named if name not in told] == [], told


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
