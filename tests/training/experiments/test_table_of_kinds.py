"""The table of kinds, from trained dictionaries to its rows, at a size that means nothing."""

import json
import shutil
import sys
from functools import partial

import pytest
import torch
from accelerate import Accelerator

from diffusers_rtsae.analysis.names import name_features
from training.evaluation.replacement import Reconstructing
from training.experiments import constants, kinds, samplers
from training.experiments.kinds import perceptual_distance
from training.recipe import Recipe
from training.run import run

SITE = "up_blocks.1.attentions.1"
VARIANTS = {
    "rtsae-0": {},
    "topk-0": {"kind": "static", "architecture": "topk"},
    "topk-1": {"kind": "static", "architecture": "topk", "seed": 1},
    "mixture-0": {"kind": "mixture", "experts": 2},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    recipe = Recipe(
        pipeline="examples/shapes-sd", base_model="shapes-sd", sites=[SITE], anchors=3, variants=VARIANTS,
        collect={
            "prompts": "shapes", "count": 24, "steps": 6, "guidance_scale": [2.0, 4.0], "batch_size": 4,
            "tokens_per_image": 16,
        },
        train={"num_latents": 64, "k": 4, "steps": 20, "batch_size": 64, "learning_rate": 1e-2},
    )  # fmt: skip
    run(recipe, folder / "out", folder / "work", Accelerator(cpu=True))
    return folder / "out"


@pytest.mark.slow
def test_a_table_of_kinds_is_measured_and_continued(trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "kinds.json"
    command = ["kinds", "--dictionaries", str(trained), "--steps", "6", "--batch-size", "16", "--out", str(out)]
    command += ["--labelled", "16", "--judged", "8", "--absorbed", "16", "--replaced", "2", "--pairs", "2"]
    command += ["--prompts", "1", "--every", "20", "--repeats", "1"]
    monkeypatch.setattr(samplers, "NOISE", samplers.NOISE._replace(elsewhere=("DPM++ 2M", 4)))
    for name, value in {"STRENGTHS": (0.5,), "PREDICTED": 2}.items():
        monkeypatch.setattr(kinds, name, value)
    monkeypatch.setattr(constants, "PASSES", 1)
    monkeypatch.setattr(sys, "argv", [*command, "--measures", "costs", "replaced"])
    kinds.main()
    rows = {row["dictionary"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows.keys() == {kinds.RAW, *VARIANTS} and "effect" not in rows["topk-0"]
    assert rows["topk-0"]["parameters"] < rows["rtsae-0"]["parameters"] and rows["topk-0"]["distance"] > 0
    assert rows["topk-0"]["stability"] == rows["topk-1"]["stability"] and "stability" not in rows["rtsae-0"]

    monkeypatch.setattr(kinds.Measures, "costs", None)  # was measured
    monkeypatch.setattr(sys, "argv", [*command, "--measures", "absorbed", "probed", "steered"])
    kinds.main()
    rows = {row["dictionary"]: row for row in json.loads(out.read_text())["rows"]}
    assert rows["mixture-0"]["probes"].keys() == {"here", "elsewhere", "untold"}
    assert rows["rtsae-0"]["probes"].keys() == rows[kinds.RAW]["probes"].keys() == {"here", "elsewhere"}
    for name in VARIANTS:
        assert rows[name]["has"] == ["costs", "replaced", "absorbed", "probed", "steered"]
        assert 0 <= rows[name]["absorption"] <= 1 and -5 < rows[name]["effect"] < 1
        assert rows[name]["open"].keys() == rows[name]["contradicted"].keys()
    text = kinds.markdown(list(rows.values()))
    assert text in capsys.readouterr().out and "| topk |" in text and f"| {kinds.RAW} |" in text


@pytest.mark.slow
def test_how_well_the_latents_of_a_kind_are_named_is_measured(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained / "topk-0", tmp_path / "some" / "topk-0")
    command = ["kinds", "--dictionaries", str(tmp_path / "some"), "--steps", "6", "--batch-size", "16"]
    command += ["--named", "2", "--shown", "1", "--shown-steps", "2", "--out", str(tmp_path / "kinds.json")]
    monkeypatch.setattr(kinds, "name_features", partial(name_features, words=["red"], pictures=2))
    monkeypatch.setattr(sys, "argv", [*command, "--measures", "named"])
    kinds.main()
    row = json.loads((tmp_path / "kinds.json").read_text())["rows"][1]
    assert row["names"].keys() == {"making", "named", "right"} and row["names"]["making"] <= 2
    assert "| kind | latents that make a value | of these named | names right |" in capsys.readouterr().out


def test_what_cannot_be_compared_makes_no_table(trained, tmp_path, monkeypatch):
    folder = tmp_path / "some"
    folder.mkdir()
    monkeypatch.setattr(sys, "argv", ["kinds", "--dictionaries", str(folder), "--out", str(tmp_path / "o")])
    with pytest.raises(ValueError, match="holds no dictionaries: train"):
        kinds.main()
    shutil.copytree(trained / "topk-0", folder / "topk-0")
    shutil.copytree("examples/shapes-rtsae", folder / "bundled-0")  # of the same site, with other anchors
    with pytest.raises(ValueError, match="must be of one site and its anchors"):
        kinds.main()


@pytest.mark.slow
def test_pictures_of_reconstructions_are_those_of_the_activation_if_nothing_is_missed(pipe, dictionary, scorer):
    ((_, sae),) = dictionary.sites.items()
    call = {"num_inference_steps": 25, "guidance_scale": 3.0, "output_type": "pt"}

    def drawn():
        return pipe("a red star", generator=torch.Generator().manual_seed(0), **call).images.float().cpu()

    class Exact:
        config, encoder = sae.config, sae.encoder

        def reconstruct(self, known):
            asked.append(known.shape[1])
            return known * factor

    plain, asked, factor = drawn(), [], 1.0
    with Reconstructing(pipe, Exact()):
        torch.testing.assert_close(drawn(), plain, rtol=0, atol=2e-3)
    assert asked == [1, 2, 3]  # anchors, each with all that was before
    factor = 0.0
    with Reconstructing(pipe, Exact()):
        changed = drawn()
    assert torch.equal(drawn(), plain) and (changed - plain).abs().max() > 0.1
    assert perceptual_distance(scorer, plain, plain) == 0 < perceptual_distance(scorer, plain, changed)
