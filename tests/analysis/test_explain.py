"""The ledger of a word adds up, and says what is measured in other ways."""

import json

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from every_pipeline.builds import Ask, flux, parts

from diffusers_rtsae import RTSAE, TIDE, SparseAutoencoder
from diffusers_rtsae.analysis import graph
from diffusers_rtsae.analysis.effect import Intervention, States
from diffusers_rtsae.analysis.exchanged import ExchangedStates
from diffusers_rtsae.analysis.explain import ERROR, OTHERS, PATHS, REST, explain, ledger_of
from diffusers_rtsae.analysis.plots import plot_graph
from diffusers_rtsae.analysis.record import Recorder
from diffusers_rtsae.analysis.vocabulary import Exchange, Exchanges
from diffusers_rtsae.analysis.word import WordStates
from diffusers_rtsae.denoiser import TimeGrid
from diffusers_rtsae.pairs import left_out
from diffusers_rtsae.pipeline import get_dictionary
from diffusers_rtsae.steering import Edit
from diffusers_rtsae.worlds import bundled, load_bundled

SITE = "up_blocks.1.attentions.1"
PROMPT, WITHOUT = (
    "a small blue heart in the centre, flat, on white",
    "a small blue object in the centre, flat, on white",
)
CALL = {"num_inference_steps": 5, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def pipe():
    pipe = load_bundled("shapes-sd")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_rtsae(bundled("shapes-rtsae"))
    return pipe


@pytest.fixture(scope="module")
def ledger(pipe):
    return explain(pipe, PROMPT, "heart", WITHOUT, seed=3, features=20, **CALL)


@pytest.fixture(scope="module")
def states(pipe):
    """The same noisy latents, as fitting and finding draw them."""
    return States(pipe, [(PROMPT, WITHOUT)], seed=3, **CALL)


@torch.no_grad()
def removed(states, changes) -> float:
    """The share of the word that changes take away, measured in the picture of its prompt."""
    gone = whole = 0.0
    for state in states.all():
        rows = state.drawn_with_from.nonzero().flatten().tolist()
        u = (state.prediction - state.target)[rows]
        gone += (u * (state.prediction[rows] - states.predict(state, rows, changes(state, rows)))).sum()
        whole += u.square().sum()
    return float(gone / whole)


def test_the_entries_are_the_whole_and_what_goes_through_the_site_is_measured(ledger, states):
    assert ledger.total == pytest.approx(1, abs=1e-4) and sum(ledger.weights) == pytest.approx(1)
    through = removed(states, lambda state, rows: {SITE: (state.goal[SITE] - state.present[SITE])[rows]})
    assert ledger.share(PATHS) == pytest.approx(1 - through, abs=1e-3)
    assert abs(ledger.share(ERROR)) < 0.01
    said = sum(entry.share for entry in ledger.entries if entry.what not in (PATHS, ERROR))
    assert said == pytest.approx(through, abs=0.01)


def test_a_feature_that_is_taken_away_takes_the_share_that_it_is_said_to_carry(ledger, states):
    first, check = ledger.features[0], ledger.checks[0]
    assert first.name == "149, heart" and first.site == SITE and first.present > 0.05
    edit = Edit(latents=(149,), weights=(1.0,), strength=1.0, operation="ablate", clip=False)
    measured = removed(states, Intervention({SITE: [edit]}, states))
    assert first.share == pytest.approx(measured, abs=0.08) and measured > 0.5
    assert first.ablated == pytest.approx(measured, abs=0.08)
    word = WordStates(states.pipeline, PROMPT, WITHOUT, seed=3, **CALL)
    assert word.ablated([[(SITE, 149)], []]) == pytest.approx([measured, 0], abs=1e-4), "as the edits that steer do"
    assert check.said == first.share and check.measured == pytest.approx(word.undone([[(SITE, 149)]])[0], abs=1e-5)
    assert sum(map(sum, first.where)) == pytest.approx(first.share, abs=1e-4)
    inside = sum(sum(row[2:6]) for row in first.where[2:6])
    assert inside > 0.9 * first.share, "it lies where the heart is"


def test_more_features_change_no_share_and_the_ledger_is_written(pipe, ledger, tmp_path):
    with pipe.rtsae_steering({"red": 3.0}):  # which does not act
        few = explain(pipe, PROMPT, "heart", WITHOUT, seed=3, features=2, **CALL)
    assert [entry.share for entry in few.features] == [entry.share for entry in ledger.features[:2]]
    more = sum(entry.share for entry in ledger.features[2:])
    assert few.share(OTHERS) == pytest.approx(ledger.share(OTHERS) + more, abs=1e-5)
    assert few.share(REST) == ledger.share(REST)
    few.save(tmp_path / "heart.json")
    kept = json.loads((tmp_path / "heart.json").read_text())
    assert kept == json.loads(json.dumps(few.content())) and kept["entries"][0]["index"] == 149
    assert "149, heart" in str(few) and "in all: what 'heart' does" in str(few) and few.image.size == (64, 64)


def test_what_leads_to_a_feature_is_what_the_pipeline_does_without_it(pipe, ledger, monkeypatch):
    monkeypatch.setattr(graph, "_LEAST", 0.0)
    found = graph.feature_graph(pipe, ledger, features=3, **CALL)
    assert found.nodes[0].index == 149 and found.nodes[2].name == graph.TOGETHER and str(found) and plot_graph(found)
    assert found.nodes[2].share == pytest.approx(found.nodes[0].share + found.nodes[1].share, abs=1e-4)
    source, target = found.nodes[0], found.nodes[found.edges[0].target]
    assert found.edges[0].source == 0 and (source.timestep, target.timestep) == (961, 481)
    options = {"operation": "ablate", "apply_to": "cond", "end": 0.279}  # until the middle of the two, at t = 721
    sae, trajectories = get_dictionary(pipe).sites[SITE], []
    for features in ({}, {149: 1.0}):
        with Recorder(pipe, [SITE]) as recorder, pipe.rtsae_steering(features, **options):
            pipe(PROMPT, generator=torch.Generator().manual_seed(3), output_type="latent", **CALL)
        trajectories.append(recorder.trajectories(SITE))
    grid, reader = (
        TimeGrid([961, 481, 1], pipe.scheduler.alphas_cumprod),
        sae.reader([target.index], torch.device("cpu")),
    )
    memory, sums = reader.begin(), torch.zeros(2)
    for i, timestep in enumerate(recorder.timesteps):
        step = grid.step(timestep, (8, 8), 3.0)
        if round(step.coordinate) == 1:
            sums += torch.stack([reader.read(memory.copy(), one[:, :, i], step).sum() for one in trajectories])
        reader.read(memory, trajectories[0][:, :, i], step)
        memory.continue_with(trajectories[0][:, :, i])
    assert found.edges[0].weight == pytest.approx(float(1 - sums[1] / sums[0]), abs=1e-3)
    assert found.edges[0].weight > 0.01


def test_several_sites_add_up_and_exchanging_works_with_pixart():
    pipe = load_bundled("people-dit")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_rtsae(bundled("people-rtsae"))
    prompt, call = "a woman firefighter with dark skin", {"num_inference_steps": 2, "max_sequence_length": 24}
    ledger = explain(pipe, prompt, "dark", left_out(prompt, "with dark skin"), features=5, **call)
    assert ledger.total == pytest.approx(1, abs=1e-4) and abs(ledger.share(ERROR)) < 0.02
    assert len({entry.site for entry in ledger.features}) > 1
    assert abs(ledger.share(PATHS)) < 1e-3, "all cross-attentions have a dictionary, so text has no other path"
    exchanges = Exchanges([prompt], [Exchange(0, "light", prompt.replace("dark", "light"))])
    assert ExchangedStates(pipe, exchanges, **call).states == 2


@pytest.mark.parametrize(
    "kind, site, options",
    [
        (SparseAutoencoder, f"{SITE}.transformer_blocks.0.ff", {"activation": "input", "input_norm": "layer"}),
        (TIDE, SITE, {"time_channels": 16, "activation": "update"}),
    ],
)
def test_transcoders_and_normalised_inputs_are_explained(_pipeline, kind, site, options, request):
    request.addfinalizer(_pipeline.unload_rtsae)
    sae = kind(site, 160, [961, 481, 1], 64, 4, **options)
    sae.encoder_bias.data.normal_(0, 0.1)
    _pipeline.load_rtsae({site: sae.requires_grad_(False)})
    call = {"seed": 3, "num_inference_steps": 2}
    states = States(_pipeline, [(PROMPT, WITHOUT)], **call)
    word = WordStates(_pipeline, PROMPT, WITHOUT, **call)
    edit = Edit(latents=tuple(range(8)), weights=(1.0,) * 8, strength=1.0, operation="ablate", clip=False)
    expected = removed(states, Intervention({site: [edit]}, states))
    assert (
        word.ablated([[(site, i) for i in range(8)]]) == pytest.approx([expected], abs=1e-4) and abs(expected) > 1e-3
    )
    assert bool(word.states[0].gains) == (kind is SparseAutoencoder)
    told = ledger_of(word, PROMPT, WITHOUT, "heart", features=None)
    assert told.total == pytest.approx(1, abs=1e-4)
    first = [(entry.site, entry.index) for entry in told.features[:1]]
    check = told.checks[0]
    assert word.undone([first]) == pytest.approx([check.measured], abs=1e-5)
    assert check.said == pytest.approx(check.measured, abs=0.05)


def test_a_site_that_the_prediction_does_not_depend_on_is_told():
    """The text that the last block of a Flux without single blocks writes."""
    built, site = flux.flux(FluxPipeline), "transformer_blocks.1.ff_context"
    torch.manual_seed(0)
    pipe, call = built.pipe, built.call(Ask())
    pipe.register_modules(transformer=FluxTransformer2DModel(**flux.shape(4) | {"num_single_layers": 0}))
    pipe.load_rtsae({site: RTSAE(site, 32, [900, 1], 8, 2)})
    call = {name: value for name, value in call.items() if name not in ("generator", "prompt", "output_type")}
    with pytest.raises(ValueError, match=f"this denoiser gives none at {site}"):
        explain(pipe, parts.prompt(1), parts.prompt(1).split()[0], without=parts.prompt(2), **call)


def test_words_are_left_out():
    prompt = "an orange star above an orange heart, striped, on white"
    assert left_out(prompt, "Orange") == "a star above a heart, striped, on white"
    assert left_out(prompt, "striped") == "an orange star above an orange heart, on white"
    assert left_out(prompt, "white") == "an orange star above an orange heart, striped"
    assert left_out("a star on white, flat", "white") == "a star, flat" and left_out("star", "star") == ""


def test_a_denoiser_that_gives_no_gradient_is_told(pipe, monkeypatch):
    monkeypatch.setattr(pipe.unet, "forward", torch.no_grad()(pipe.unet.forward))
    with pytest.raises(ValueError, match=f"this denoiser gives none at {SITE}"):
        explain(pipe, PROMPT, "heart", num_inference_steps=1)
