"""What a ledger says is compared with what taking latents away does."""

import pytest

from diffusers_rtsae.worlds import bundled
from training.experiments import explain
from training.worlds import load_world
from training.worlds.pictures import load_pipeline


def test_a_ledger_is_held_to_account(monkeypatch):
    monkeypatch.setattr(explain, "STEPS", 2)
    world = load_world("shapes")
    pipe = load_pipeline(world.pipeline, "cpu")
    pipe.load_rtsae(bundled("shapes-rtsae"))
    value = explain.value_of(world, "colour", 8)
    assert value == explain.value_of(world, "colour", 0) == "red", "the values are eight"
    case = {"factor": "colour", "value": value, "kind": "open", "seed": 0}
    call = {"num_inference_steps": 3, "guidance_scale": 3.0}
    row = case | explain.measured(pipe, world, *case.values(), call)
    assert value in row["prompt"] and value not in row["without"]
    sets = {(one["way"], one["count"]): one for one in row["sets"]}
    assert len(sets) == len(explain.WAYS) * len(explain.COUNTS)
    first, some = sets["first", 16], sets["random", 16]
    assert first["undone"] == pytest.approx(first["share"], abs=0.2) and first["share"] > 0.3 > abs(some["share"])
    assert sets["ablation", 16]["said"] >= sets["active", 16]["said"]
    other = row | {"kind": "contradicted", "seed": 1, "sets": [one | {"undone": -one["share"]} for one in row["sets"]]}
    text = explain.markdown([row, other])
    share = first["share"]
    assert f"| first of the ledger | 16 | {share:.2f} → {first['undone']:.2f} |" in text
    assert f"{share:.2f} → {-share:.2f}" in text and "(-1.00 to " in text, "the second seed is the other way round"
