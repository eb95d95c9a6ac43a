"""Autoencoders in the formats of others: read, encoded, decoded and steered as their publishers' formulas say."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from foreign import (
    CASES,
    SITE,
    Case,
    D,
    K,
    M,
    concept_steerers,
    dictionary_learning,
    diffract,
    rand,
    sdlens,
    sparsify,
    topk,
)
from hub_server import Repository
from huggingface_hub import constants
from small_pipelines import FLUX_TEXT, XL_TEXT, flux, sd3

from diffusers_rtsae import TIDE, Dictionary, Edit, SparseAutoencoder, cli, load_dictionary
from diffusers_rtsae.analysis.effect import Intervention, States, first_order
from diffusers_rtsae.analysis.record import Recorder
from diffusers_rtsae.analysis.statistics import measure
from diffusers_rtsae.dictionary import convertible
from diffusers_rtsae.formats import find
from diffusers_rtsae.steering import PlanState, SitePlan

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore:.*how active its latents are", "ignore:To read some latents")


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    torch.manual_seed(0)
    case = CASES[request.param]()
    case.write(tmp_path / "theirs")
    return case


def opened(case: Case, folder: Path) -> Dictionary:
    pickled = any(name.endswith((".pt", ".pth")) for name in case.files)
    return (convertible if pickled else load_dictionary)(folder / "theirs")


def test_it_is_read_as_its_publisher_says(case, tmp_path):
    dictionary = opened(case, tmp_path)
    (site, sae), x, t = next(iter(dictionary.sites.items())), torch.randn(12, D), 481.0
    assert site == getattr(case, "site", SITE) and type(sae).__name__ == case.kind
    assert sae.config.activation == case.activation and sae.config.num_latents == M
    z = case.encode(x, t)
    assert 0 < (z > 0).float().mean() < 0.9
    torch.testing.assert_close(sae.encode_step(x, t), z, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sae.decode_step(z, t, x), case.decode(z, x), atol=1e-5, rtol=1e-4)
    at = list(sae.config.anchors).index(481)
    whole = sae.reconstruct(x[:, None].expand(-1, at + 1, -1))[:, at]
    torch.testing.assert_close(whole, case.decode(z, x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("operation, strength", [("add", 0.7), ("scale", 2.0), ("ablate", 1.0), ("set", 0.5)])
def test_it_is_steered_as_its_publisher_says(case, tmp_path, operation, strength):
    """Δ = decode(z′) − decode(z), with the error of the autoencoder kept."""
    sae = next(iter(opened(case, tmp_path).sites.values()))
    x, rows, t = torch.randn(1, 12, D), [4, 7], 481.0
    unit = sae.typical_activation[rows]
    edit = Edit(latents=tuple(rows), weights=(1.0, 1.0), strength=strength, operation=operation)
    change = SitePlan(sae, [edit], None).conditional(PlanState(), x, t, None)
    z = case.encode(x[0], t)
    wanted = z.clone()
    wanted[:, rows] = {
        "add": z[:, rows] + strength * unit, "scale": strength * z[:, rows], "ablate": 0 * z[:, rows],
        "set": (strength * unit).expand(12, 2),
    }[operation]  # fmt: skip
    expected = case.decode(wanted, x[0]) - case.decode(z, x[0])
    torch.testing.assert_close(change[0].expand(12, D), expected, atol=1e-5, rtol=1e-4)


def test_it_is_the_same_once_saved(case, tmp_path):
    """What is converted is one of ours, and loads as such."""
    before = opened(case, tmp_path)
    before.save(tmp_path / "ours")
    after, site = load_dictionary(tmp_path / "ours"), next(iter(before.sites))
    x = torch.randn(12, D)
    old, new = before.sites[site], after.sites[site]
    said = [{name: value for name, value in sae.config.items() if name[0] != "_"} for sae in (old, new)]
    assert said[0] == said[1]
    torch.testing.assert_close(old.decoder.half(), new.decoder)
    assert (new.gain(x) is None) == (old.gain(x) is None)
    assert (old.encode_step(x, 481.0) - new.encode_step(x, 481.0)).abs().median() < 1e-3


@torch.no_grad()
def test_negative_latents_become_latents_of_their_own(tmp_path):
    """sparsify's old `signed`: the k largest by absolute value, which keep their sign."""
    case = sparsify(signed=True)
    sae, x = load_dictionary(case.write(tmp_path)).sites[SITE], torch.randn(12, D)
    tensors = case.files[f"unet.{SITE}/sae.safetensors"]
    values = (x - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]
    theirs = values * (topk(values.abs(), K) > 0)
    assert (theirs < 0).any() and (theirs > 0).any()
    z = sae.encode_step(x, 1.0)
    torch.testing.assert_close(z[:, :M] - z[:, M:], theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sae.decode_step(z, 1.0), theirs @ tensors["W_dec"] + tensors["b_dec"])


def test_the_site_of_a_text_encoder_says_whose_file_it_is(tmp_path):
    """SDLens and Concept Steerers have files of the same names, of a block's update and of a layer's output."""
    both = "text_encoder.text_model.encoder.layers.10.28"
    concept_steerers(both, "safetensors").write(tmp_path / "xl")
    ((site, sae),) = load_dictionary(tmp_path / "xl").sites.items()
    assert site == "text_encoder.text_model.encoder.layers.10+text_encoder_2.text_model.encoder.layers.28"
    assert sae.config.activation == "output"
    load_dictionary(tmp_path / "xl").save(tmp_path / "ours")
    assert list(load_dictionary(tmp_path / "ours").sites) == [site]
    t5 = "text_encoder_2.encoder.block.22"  # for FLUX they name it as if it were a layer of CLIP
    assert load_dictionary(tmp_path / "xl", site=t5).sites[t5].config.activation == "output"
    assert load_dictionary(tmp_path / "xl", site="mid_block").sites["mid_block"].config.activation == "update"
    folder = sdlens("safetensors").write(tmp_path / "sdlens")
    assert load_dictionary(folder, site=t5).sites[t5].config.activation == "output"


def test_convert_is_told_the_site_of_one_autoencoder(tmp_path):
    """Also where the name of its folder says another, as of a language model's layer."""
    folder = sparsify().write(tmp_path) / f"unet.{SITE}"
    folder.rename(tmp_path / "layers.9")
    cli.convert(str(tmp_path), tmp_path / "ours", ["mid_block"])
    assert list(load_dictionary(tmp_path / "ours").sites) == ["mid_block"]


def test_statistics_that_a_file_has_are_taken(tmp_path):
    case = sdlens()
    sae = convertible(case.write(tmp_path)).sites[SITE]
    torch.testing.assert_close(sae.typical_activation, case.typical)
    assert sae.max_activation.min() > 1e30 and sae.density[0] == pytest.approx(K / M)


def test_a_folder_says_the_site():
    names = {
        "unet.down_blocks.2.attentions.1_k10_hidden5120_auxk256_bs4096_lr0.0001/final": "down_blocks.2.attentions.1",
        "unet.mid_block_k10_hidden5120": "mid_block", "unet.conv_in": "conv_in", "mid_block": "mid_block",
        "transformer.transformer_blocks.18": "transformer_blocks.18",
        "transformer_blocks.3/run 1": "transformer_blocks.3",
        "saes": None, "run 1": None, "..": None,
    }  # fmt: skip
    for folder, site in names.items():
        assert [one.site for one in find([f"{folder}/cfg.json", f"{folder}/sae.safetensors"])] == [site]


def test_the_nearest_of_a_site_is_taken_and_subfolders_choose(tmp_path):
    sparsify().write(tmp_path)
    sparsify(k=1).write(tmp_path / "coco")
    assert load_dictionary(tmp_path).sites[SITE].config.k == K
    assert load_dictionary(tmp_path, subfolder="coco").sites[SITE].config.k == 1
    assert load_dictionary(tmp_path / "coco" / f"unet.{SITE}").sites[SITE].config.k == 1  # by its own name
    assert load_dictionary(tmp_path, subfolder=f"coco/unet.{SITE}", layers=[SITE]).sites[SITE].config.k == 1
    sparsify(k=2).write(tmp_path / "laion")
    (tmp_path / f"unet.{SITE}" / "cfg.json").unlink()
    with pytest.raises(ValueError, match=rf"has several of {SITE}: choose one of \['coco', 'laion'\] by `subfolder`."):
        load_dictionary(tmp_path)


def test_a_site_that_no_name_says_is_told(tmp_path):
    folder = sparsify().write(tmp_path) / f"unet.{SITE}"
    folder.rename(tmp_path / "my sae")
    with pytest.raises(ValueError, match="No name in .* says which site it is of: name the site by `site`"):
        load_dictionary(tmp_path / "my sae")
    assert list(load_dictionary(tmp_path / "my sae", layers=["mid_block"]).sites) == ["mid_block"]
    (tmp_path / "my sae").rename(tmp_path / "sae_v1.5")  # which is no path of a module
    for told in ({"site": "mid_block"}, {"layers": ["mid_block"]}):
        assert list(load_dictionary(tmp_path / "sae_v1.5", **told).sites) == ["mid_block"]


def on_hub(hub, folder: Path, name: str = "org/saes") -> None:
    hub.repositories[name] = Repository()
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    hub.repositories[name].commit(files | {"README.md": b"x", "more.pkl": b"y"})


def test_a_repository_is_read_by_what_is_asked_for(hub, tmp_path, monkeypatch):
    """As `load_rtsae("bcywinski/SAeUron", layers=[…])` reads it."""
    sparsify(batch_topk=True).write(tmp_path)
    (tmp_path / f"unet.{SITE}").rename(tmp_path / "unet.up_blocks.1.attentions.2")
    case = sparsify(batch_topk=True)
    case.write(tmp_path)
    sparsify(k=1).write(tmp_path / "coco")
    on_hub(hub, tmp_path, "bcywinski/SAeUron")
    with pytest.warns(UserWarning, match="does not say how active its latents are"):
        dictionary = load_dictionary("bcywinski/SAeUron", layers=[SITE])
    assert sorted(hub.downloads()) == [f"unet.{SITE}/cfg.json", f"unet.{SITE}/sae.safetensors"]
    x = torch.randn(12, D)
    torch.testing.assert_close(dictionary.sites[SITE].encode_step(x, 1.0), case.encode(x, 1.0), atol=1e-5, rtol=1e-4)
    assert dictionary.config == {
        "base_model": "CompVis/stable-diffusion-v1-4", "license": "apache-2.0", "layout": "sparsify",
        "source": "bcywinski/SAeUron",
    }  # fmt: skip
    assert list(load_dictionary("bcywinski/SAeUron").sites) == [SITE, "up_blocks.1.attentions.2"]
    assert load_dictionary("bcywinski/SAeUron", subfolder="coco").sites[SITE].config.k == 1
    with pytest.raises(ValueError, match="The dictionary has no site 'mid_block'"):
        load_dictionary("bcywinski/SAeUron", layers=["mid_block"])
    count = len(hub.downloads())
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load_dictionary("bcywinski/SAeUron", layers=[SITE])
    load_dictionary("bcywinski/SAeUron", layers=[SITE], local_files_only=True)
    assert len(hub.downloads()) == count


def test_pickles_are_left_on_the_hub_and_converted(hub, tmp_path, capsys):
    on_hub(hub, sdlens().write(tmp_path / "theirs"))
    message = (
        "org/saes has pickles, '.*state_dict.pth', which are not loaded; .*: diffusers-rtsae convert org/saes OUT"
    )
    with pytest.raises(ValueError, match=message):
        load_dictionary("org/saes")
    with pytest.raises(ValueError, match="has pickles"):
        load_dictionary(tmp_path / "theirs")
    assert hub.downloads() == []
    cli.convert("org/saes", tmp_path / "ours", as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["sites"] == [SITE] and told["statistics"] == "as the files say, or left at 1"
    assert load_dictionary(tmp_path / "ours").config["source"] == "org/saes"
    assert not list((tmp_path / "ours").rglob("*.pt*"))


def test_the_command_line_measures_what_it_converts(tmp_path, monkeypatch, pipe, capsys):
    monkeypatch.setattr("foreign.D", 160)
    (tmp_path / "prompts.txt").write_text("a star\n\na heart\n")
    source, prompts = sparsify(num_latents=M).write(tmp_path / "theirs"), tmp_path / "prompts.txt"
    cli.convert(str(source), tmp_path / "ours", [SITE], pipeline=str(EXAMPLES / "shapes-sd"), prompts=prompts, steps=2)
    assert "statistics: measured on 2 prompts" in capsys.readouterr().out
    sae = load_dictionary(tmp_path / "ours").sites[SITE]
    assert (sae.typical_activation != 1).any() and sae.max_activation.max() < 1e6 and sae.density.sum() <= K + 1e-3
    assert "Converted from files of sparsify, trained by others." in (tmp_path / "ours" / "README.md").read_text()
    pipe.load_rtsae(tmp_path / "ours")


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_a_converted_pickle_runs_nothing(tmp_path):
    case = dictionary_learning("AutoEncoder")
    case.write(tmp_path)
    torch.save(case.files[f"{SITE}/ae.pt"] | {"more": Evil(tmp_path / "evil")}, tmp_path / SITE / "ae.pt")
    with pytest.raises(OSError, match="ae.pt is damaged, or holds more than tensors"):
        convertible(tmp_path)
    assert not (tmp_path / "evil").exists()


def small(kind: str, site: str = SITE, width: int = 160, **options):
    sae = TIDE if kind == "TIDE" else SparseAutoencoder
    sae = sae(site, width, [961, 481, 1], 32, 4, **options).requires_grad_(False).eval()
    sae.encoder_bias.normal_()
    sae.typical_activation.fill_(5.0)
    sae.max_activation.fill_(50.0)
    return sae


OPTIONS = {
    "a transcoder": {"activation": "input", "centred": False},
    "an input norm": {"input_norm": "layer"},
    "BatchTopK": {"sparsity": "batch_topk"},
}


class Keep:
    """A forward hook that keeps the input and the output of the first call."""

    def __init__(self, module: torch.nn.Module):
        self.first, self.handle = None, module.register_forward_hook(self)

    def __call__(self, module, args, output) -> None:
        if self.first is None:
            self.first = args[0].clone(), (output if torch.is_tensor(output) else output[0]).clone()


@pytest.mark.parametrize("name", OPTIONS)
def test_it_acts_in_a_pipeline(pipe, draw, name):
    sae, module = small("SparseAutoencoder", **OPTIONS[name]), pipe.unet.get_submodule(SITE)
    plainly = Keep(module)
    plain = draw(pipe, steps=2)
    plainly.handle.remove()
    pipe.load_rtsae({SITE: sae})
    assert (draw(pipe, steps=2) == plain).all()
    pipe.set_rtsae_features({3: 1.0}, apply_to="cond")
    steered = Keep(module)
    assert (draw(pipe, steps=2) != plain).any()
    steered.handle.remove()
    (before, out), (_, moved) = plainly.first, steered.first
    assert torch.equal(out[:2], moved[:2])  # the unconditional half
    x = (before if name == "a transcoder" else out)[2:].flatten(2).mT
    z = sae.encode_step(x, 999.0)
    changed = z.clone()
    changed[..., 3] += 5.0
    delta = sae.decode_step(changed, 999.0, x) - sae.decode_step(z, 999.0, x)
    torch.testing.assert_close((moved - out)[2:].flatten(2).mT, delta, atol=1e-4, rtol=1e-3)


TEXT_STREAM = {
    "SD3": (sd3, XL_TEXT | {"height": 16, "width": 16}),
    "Flux": (flux, FLUX_TEXT),
}


@pytest.mark.parametrize("name", TEXT_STREAM)
@pytest.mark.parametrize("kind", ["sae", "transcoder"])
def test_text_streams_and_the_timestep_as_the_transformer_is_called_with_it(tmp_path, monkeypatch, name, kind):
    build, call = TEXT_STREAM[name]
    pipeline, _, width = build(None)
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr("diffusers_rtsae.formats.diffract.FLUX_WIDTH", width if name == "Flux" else 0)
    monkeypatch.setattr("foreign.D", width)
    case = diffract(f"{kind}_txt_0.pt")
    case.write(tmp_path)
    dictionary = convertible(tmp_path)
    site, times = "transformer_blocks.0.ff_context", []
    block = pipeline.transformer.get_submodule(site)

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return pipeline(num_inference_steps=2, generator=generator, output_type="latent", **call).images

    def tick(module, args, kwargs) -> None:
        times.append(float(kwargs["timestep"].flatten()[0]))

    pipeline.transformer.register_forward_pre_hook(tick, with_kwargs=True)
    plainly = Keep(block)
    plain = draw()
    pipeline.load_rtsae(dictionary)
    assert torch.equal(draw(), plain)
    inputs, output = plainly.first
    z = case.encode((inputs if kind == "transcoder" else output)[-2:], times[0])
    latent = int(z.sum((0, 1)).argmax())
    pipeline.set_rtsae_features({latent: 3.0}, operation="scale", apply_to="cond", clip=False)
    steered = Keep(block)
    assert not torch.equal(draw(), plain)
    _, moved = steered.first
    delta = 2.0 * z[..., [latent]] * case.directions[latent]
    torch.testing.assert_close((moved - output)[-2:], delta, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="Cannot lay 7 tokens of"):
        pipeline.set_rtsae_features({2: 1.0}, mask=torch.ones(4, 4))
        draw()
    with Recorder(pipeline, [site], activation=dictionary.sites[site].config.activation) as recorder:
        pipeline.unload_rtsae()
        draw()
    assert recorder.trajectories(site).shape == (2, 7, 2, width) and recorder.size(site) == (1, 7)


def test_statistics_are_measured_on_prompts(pipe):
    for sparsity in ("threshold", "batch_topk"):
        sae = small("SparseAutoencoder", sparsity=sparsity)
        dictionary = Dictionary({SITE: sae})
        measure(pipe, dictionary, ["a star", "a heart"], num_inference_steps=2)
        with Recorder(pipe, [SITE]) as recorder:
            pipe(["a star", "a heart"], num_inference_steps=2,
                 generator=[torch.Generator().manual_seed(i) for i in range(2)])  # fmt: skip
        h = recorder.trajectories(SITE)
        codes = torch.stack([sae.encode_step(h[:, :, i].half().float(), t) for i, t in enumerate(recorder.timesteps)])
        codes = codes.flatten(0, 2)
        torch.testing.assert_close(sae.density, (codes > 0).float().mean(0), atol=2e-3, rtol=0)
        torch.testing.assert_close(sae.mean_activation, codes.mean(0), atol=1e-2, rtol=1e-2)
        alive = sae.density > 0
        torch.testing.assert_close(sae.max_activation[alive], codes.amax(0)[alive], atol=1e-2, rtol=1e-2)
        assert (sae.typical_activation <= sae.max_activation).all() and (sae.scale > 0.1).all()
        assert dictionary.config["signature"]["class"] == "UNet2DConditionModel"
        assert sae.config.k == (4 if sparsity != "threshold" else max(1, round(float(sae.density.sum()))))


@pytest.mark.parametrize("name", ["a transcoder", "an input norm"])
def test_fitting_predicts_what_steering_does(pipe, name):
    sae = small("SparseAutoencoder", **OPTIONS[name])
    pipe.load_rtsae({SITE: sae})
    states = States(pipe, [("a blue star", "a red star")], seed=3, num_inference_steps=1, guidance_scale=3.0)
    state, plan = next(iter(states.all())), SitePlan(sae, EDITS, None)
    model, tokens = Intervention({SITE: EDITS}, states), state.present[SITE][:1]
    change = plan.conditional(PlanState(), tokens, state.timestep, None)
    torch.testing.assert_close(model(state, [0])[SITE](tokens), change, atol=1e-4, rtol=1e-4)
    order = first_order(model, 1, torch.Generator(), candidates={SITE: [5]})[SITE]
    assert order.added.isfinite().all() and order.removed.isfinite().all()


EDITS = [
    Edit(latents=(3,), weights=(1.5,), strength=1.0, clip=False),
    Edit(latents=(5,), weights=(0.7,), strength=1.0, operation="ablate", clip=False),
]


EXPORTED = {
    "ReLU": ({}, "standard"),
    "JumpReLU": ({"sparsity": "threshold", "centred": False}, "jumprelu"),
    "TopK": ({"sparsity": "topk"}, "topk"),
    "a layer norm": ({"input_norm": "layer"}, "jumprelu"),
    "a length": ({"input_norm": "length"}, "standard"),
    "a transcoder": ({"activation": "input", "centred": False}, "transcoder"),
    "a JumpReLU transcoder": ({"activation": "input", "centred": False}, "jumprelu_transcoder"),
    "a skip transcoder": ({"activation": "input", "centred": False, "skip": True}, "skip_transcoder"),
    "a transcoder of a length": (
        {"activation": "input", "centred": False, "input_norm": "length", "undone": False},
        "jumprelu_transcoder",
    ),
}


def exported(name: str, folder: Path):
    options, architecture = EXPORTED[name]
    sae = small("SparseAutoencoder", width=D, **options)
    sae.decoder_bias.normal_()
    if "jumprelu" in architecture:
        sae.threshold.uniform_(0, 0.5)
    Dictionary({SITE: sae}, config={"base_model": "org/base"}).export("saelens", folder)
    return sae


@pytest.mark.parametrize("name", EXPORTED)
def test_what_is_exported_is_read_again(tmp_path, name):
    sae, x = exported(name, tmp_path), torch.randn(12, D)
    config = json.loads((tmp_path / SITE / "cfg.json").read_text())
    assert config["architecture"] == EXPORTED[name][1] and config["metadata"]["hook_name"] == SITE
    again = load_dictionary(tmp_path).sites[SITE]
    z = sae.encode_step(x, 1.0)
    torch.testing.assert_close(again.encode_step(x, 1.0), z)
    torch.testing.assert_close(again.decode_step(z, 1.0, x), sae.decode_step(z, 1.0, x))
    assert not list(tmp_path.rglob("*.partial"))


def pickled_model(tmp_path: Path, monkeypatch, steps) -> tuple[Path, torch.nn.Module]:
    """A model as overcomplete pickles it, of classes that are gone afterwards; its `steps` are an attribute."""
    theirs = ModuleType("overcomplete.sae.base")
    monkeypatch.setitem(sys.modules, "overcomplete", ModuleType("overcomplete"))
    monkeypatch.setitem(sys.modules, "overcomplete.sae", ModuleType("overcomplete.sae"))
    monkeypatch.setitem(sys.modules, "overcomplete.sae.base", theirs)

    def normalize_l2(x):
        return F.normalize(x)

    for name in ("TopKSAE", "MLPEncoder", "DictionaryLayer"):
        setattr(theirs, name, type(name, (torch.nn.Module,), {"__module__": theirs.__name__}))
    normalize_l2.__module__, normalize_l2.__qualname__, theirs.normalize_l2 = (
        theirs.__name__,
        "normalize_l2",
        normalize_l2,
    )
    model = theirs.TopKSAE()
    model.top_k, model.steps, model.encoder, model.dictionary = K, steps, theirs.MLPEncoder(), theirs.DictionaryLayer()
    model.encoder.final_block = torch.nn.Sequential(torch.nn.Linear(D, M), torch.nn.BatchNorm1d(M))
    model.encoder.final_activation = torch.nn.ReLU()
    model.dictionary._weights = torch.nn.Parameter(rand(M, D))
    model.dictionary.normalization = normalize_l2
    torch.nn.init.normal_(model.encoder.final_block[1].bias)
    model.encoder.final_block[1].running_var.uniform_(0.5, 2)
    (tmp_path / SITE).mkdir()
    torch.save(model.eval(), tmp_path / SITE / "overcomplete.pt")
    for name in ("overcomplete", "overcomplete.sae", "overcomplete.sae.base"):
        monkeypatch.delitem(sys.modules, name)
    return tmp_path, model


@torch.no_grad()
def test_a_pickled_model_is_read_without_its_package(tmp_path, monkeypatch):
    folder, model = pickled_model(tmp_path, monkeypatch, steps=3)
    sae, x = convertible(folder).sites[SITE], torch.randn(12, D)
    torch.testing.assert_close(sae.encode_step(x, 1.0), topk(model.encoder.final_block(x).relu(), K))
    torch.testing.assert_close(sae.decoder, F.normalize(model.dictionary._weights))
    with pytest.raises(ValueError, match="has pickles"):
        load_dictionary(folder)


def test_a_pickled_model_with_anything_else_is_not_read(tmp_path, monkeypatch):
    folder, _ = pickled_model(tmp_path, monkeypatch, Evil(tmp_path / "evil"))
    with pytest.raises(OSError, match="holds more than tensors"):
        convertible(folder)
    assert not (tmp_path / "evil").exists()
