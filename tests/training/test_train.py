"""Training resumes bit for bit, recovers a known dictionary with every architecture, and says what is wrong."""

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from disk import full_disk

from diffusers_rtsae import MixtureSAE, load_dictionary
from diffusers_rtsae.models import LinearDynamics, Step, places, share_of_guidance
from training import dictionary
from training.checkpoint import Checkpoints, load_checkpoint, save_checkpoint
from training.dictionary import (
    ARCHITECTURES,
    DictionaryTrainer,
    RoutedSteps,
    auxiliary_loss,
    calibrate,
    geometric_median,
    new_dictionary,
)
from training.evaluate import evaluate
from training.processes import ALONE, Processes
from training.recipe import Recipe
from training.sparse import decode
from training.store import NOWHERE, Rows
from training.train import Data, train_dictionaries

D, ANCHORS = 16, [900, 500, 1]


def recipe(variants: dict | None = None, **changes) -> Recipe:
    train = {
        "num_latents": 32, "k": 3, "steps": 40, "batch_size": 128, "learning_rate": 3e-3, "dead_after": 1000,
        "validate_every": 20, "checkpoint_every": 10,
    }  # fmt: skip
    collect = {
        "prompts": "shapes", "count": 1, "steps": 3, "guidance_scale": 1.0, "batch_size": 1, "tokens_per_image": 1,
    }  # fmt: skip
    return Recipe(
        pipeline="none", base_model="none", sites=["mid_block"], anchors=3, collect=collect, train=train | changes,
        variants=variants or {},
    )  # fmt: skip


def sparse_data(count: int = 4096, features: int = 24, seed: int = 0) -> torch.Tensor:
    """Trajectories that are sums of three of 24 known features."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(
        torch.randn(features, 3 * D, generator=torch.Generator().manual_seed(7)), dim=1
    )
    chosen = torch.rand(count, features, generator=generator).topk(3, dim=1).indices
    code = torch.zeros(count, features).scatter(1, chosen, 4 + torch.rand(count, 3, generator=generator))
    return (code @ directions).unflatten(1, (3, D)).half()


def dynamics_of(data: torch.Tensor) -> LinearDynamics:
    dynamics = LinearDynamics(3, D)
    dynamics.mean.copy_(data.float().mean(0))
    dynamics.scale.copy_((data.float() - dynamics.mean).square().mean((0, 2)).sqrt())
    return dynamics


def with_told(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"mid_block": rows, "mid_block/told": torch.rand(len(rows), 3, generator=torch.Generator().manual_seed(9))}


def train(work: Path, *recipes: Recipe, data=sparse_data):
    """Train one dictionary for each recipe, on one pass over the same data."""
    made, data = data, data()
    named = {f"r{i}": one for i, one in enumerate(recipes)}
    trained = train_dictionaries(
        named, Data(with_told(data), *({"mid_block": made(500, seed=seed)} for seed in (2, 3))),
        dict.fromkeys(named, dynamics_of(data)), dict.fromkeys(named, "mid_block"), ANCHORS, work,
        Accelerator(cpu=True), "data",
    )  # fmt: skip
    return list(trained.values())


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_killed_run_continues_bit_for_bit(tmp_path, monkeypatch):
    arms = recipe(), recipe(architecture="jump_relu"), recipe(layout="per_step", steps=30)
    arms = *arms, recipe(kind="tide"), recipe(kind="mixture")
    whole = train(tmp_path / "whole", *arms)
    original, saves = Checkpoints.save, []

    def save_then_die(*arguments):
        original(*arguments)
        saves.append(1)
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", *arms)
    resumed = train(tmp_path / "killed", *arms)
    assert len(saves) == 4  # twenty steps were kept, twenty were made
    assert all(same(a, b) for a, b in zip(whole, resumed, strict=True))


def test_a_resumed_run_writes_no_line_of_the_log_twice(tmp_path, monkeypatch):
    settings = recipe(validate_every=5)
    train(tmp_path / "whole", settings)
    original = DictionaryTrainer.update

    def update_then_die(trainer, step):
        original(trainer, step)
        if step == 17:
            raise KeyboardInterrupt

    monkeypatch.setattr(DictionaryTrainer, "update", update_then_die)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", settings)
    monkeypatch.undo()
    with open(tmp_path / "killed" / "log.jsonl", "a") as file:
        file.write('{"step": 2')  # killed while it wrote
    train(tmp_path / "killed", settings)
    whole, killed = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    )
    assert [line["step"] for line in killed] == list(range(5, 41, 5))
    assert [line["fvu_validation"] for line in whole] == [line["fvu_validation"] for line in killed]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems manage memory in other ways")
def test_memory_of_freed_tensors_is_kept_for_the_next_ones():
    text = """
        import torch; from resource import RUSAGE_SELF, getrusage; from training.train import keep_freed_memory
        def faults():
            before = getrusage(RUSAGE_SELF).ru_minflt
            torch.ones(25_000_000)
            return getrusage(RUSAGE_SELF).ru_minflt - before
        usual = min(faults() for _ in range(3))
        keep_freed_memory(); faults()
        assert usual > 20 and min(faults() for _ in range(5)) < usual / 10  # the system may take pages meanwhile
        """
    command = [sys.executable, "-c", textwrap.dedent(text)]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True)


def test_a_process_reads_its_share_of_a_batch_only():
    class Counted(Rows):
        def __getitem__(self, rows):
            self.asked = len(rows)
            return super().__getitem__(rows)

    stored = sparse_data(300)
    rows = Counted(stored.split(70))
    data = Data(with_told(rows), {}, {})
    whole, told = data.sample("mid_block", 101, torch.Generator().manual_seed(3))
    assert all((stored == row).all((1, 2)).any() for row in whole[:5].half()) and told.shape == (101, 3)
    for rank in range(4):
        share, its = data.sample("mid_block", 101, torch.Generator().manual_seed(3), Processes(rank, 4))
        assert torch.equal(its, told[26 * rank :][:26])
        assert torch.equal(share, whole[26 * rank :][:26]) and rows.asked == len(share)


def test_a_half_written_checkpoint_is_not_read_and_old_ones_go(tmp_path):
    whole = train(tmp_path, recipe(checkpoints=2))[0]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000030", "step-00000040"]
    shutil.copytree(tmp_path / "checkpoints/step-00000030", tmp_path / "checkpoints/step-00000050.partial")
    assert same(whole, train(tmp_path, recipe(checkpoints=2))[0])


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    whole = train(tmp_path / "whole", recipe())[0]
    size = max(path.stat().st_size for path in (tmp_path / "whole").rglob("*.safetensors"))
    with full_disk(size // 2), pytest.raises(OSError, match=r"step-00000010 could not be written .* Make room"):
        train(tmp_path / "full", recipe())
    assert not list((tmp_path / "full/checkpoints").iterdir())
    assert same(whole, train(tmp_path / "full", recipe())[0])


def test_several_dictionaries_share_a_pass_and_are_those_of_runs_of_their_own(tmp_path):
    arms = recipe(), recipe(k=5, num_latents=40), recipe(architecture="topk")
    together = train(tmp_path / "together", *arms)
    for i, arm in enumerate(arms):
        assert same(together[i], train(tmp_path / str(i), arm)[0])


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    data, gradients = sparse_data(), []
    for accumulate in (1, 4):
        settings = recipe(architecture="topk")  # whose rows do not depend on each other
        trainer = DictionaryTrainer(
            new_dictionary("mid_block", ANCHORS, settings, dynamics_of(data)),
            settings.train,
            dynamics_of(data),
            data[:512].float(),
            "cpu",
        )
        parts = trainer.inputs(data[:128].float()).chunk(accumulate)
        for part in parts:
            trainer.backward(part, None, len(part) / 128)
        gradients.append(trainer.sae.encoder.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_a_changed_recipe_does_not_continue_another_run(tmp_path):
    train(tmp_path, recipe(steps=10))
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        train(tmp_path, recipe(steps=10, k=4))


@pytest.mark.parametrize("name", [*ARCHITECTURES, "bf16"])
def test_known_features_are_found(tmp_path, name):
    changes = {"precision": "bf16"} if name == "bf16" else {"architecture": name}
    rtsae = train(tmp_path, recipe(steps=600, prefix=0.2, **changes))[0]
    report = evaluate(rtsae, sparse_data(1000, seed=1).float(), k=3)
    assert report["fvu_residual"] < 0.15
    assert report["l0_threshold"] == pytest.approx(3, abs=0.3)
    if name != "jump_relu":  # which measures each latent in units of its threshold
        norms = rtsae.decoder.flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-3, rtol=1e-3)
    assert report["prefix_recall"] == sorted(report["prefix_recall"]) and report["prefix_recall"][-1] == 1.0


def step_data(count: int = 4096, features: int = 24, seed: int = 0) -> torch.Tensor:
    """Trajectories each step of which is a sum of three of 24 known features, larger at later steps."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(features, D, generator=torch.Generator().manual_seed(7))
    chosen = torch.rand(3 * count, features, generator=generator).topk(3, dim=1).indices
    code = torch.zeros(3 * count, features).scatter(1, chosen, 4 + torch.rand(3 * count, 3, generator=generator))
    steps = (code @ torch.nn.functional.normalize(directions, dim=1)).unflatten(0, (count, 3))
    return (steps * torch.tensor([0.8, 1.0, 1.2])[:, None] + torch.tensor([0.0, 0.2, 0.4])[:, None]).half()


OF_KIND = [
    *itertools.product(["static", "tide"], ["batch_topk", "topk", "jump_relu", "atm"]),
    *itertools.product(["mixture"], ["batch_topk", "jump_relu", "atm"]),
]


@pytest.mark.parametrize("kind, architecture", OF_KIND)
def test_known_features_of_single_steps_are_found(tmp_path, kind, architecture):
    own = {"experts": 4, "shared": 0.5, "masked": 0.0} if kind == "mixture" else {}
    sae = train(tmp_path, recipe(kind=kind, architecture=architecture, steps=400, **own), data=step_data)[0]
    assert sae.config.get("sparsity", "threshold") == ("topk" if architecture == "topk" else "threshold")
    report = evaluate(sae, step_data(500, seed=1).float(), k=3)
    assert report["fvu_online"] == report["fvu_teacher_forced"] < 0.3
    assert report["l0_threshold"] == pytest.approx(3, abs=0.3) and "prefix_recall" not in report


def test_a_router_is_told_in_training_what_it_is_told_when_steering():
    torch.manual_seed(0)
    sae, size = MixtureSAE("mid_block", D, ANCHORS, 20, 2, shared_latents=4, num_experts=4), (2, 3)
    view = RoutedSteps(sae, dynamics_of(sparse_data(100)), recipe(kind="mixture").train, ALONE)
    tokens, told = torch.randn(6, 3, D), torch.cat([places(size), share_of_guidance(5.0).expand(6, 1)], 1)
    sae.eval()
    gates, _ = view.gates(tokens.flatten(0, 1), told)
    for g, timestep in enumerate(ANCHORS):
        expected, _ = sae.gates(tokens[:, g], sae.metadata(Step(timestep, g, size, 5.0), 6))
        torch.testing.assert_close(gates.shares.view(6, 3, -1)[:, g], expected)
    assert not torch.allclose(view.gates(tokens.flatten(0, 1))[0].shares, gates.shares)
    nowhere = told.clone()
    nowhere[:, :2] = NOWHERE
    gates, _ = view.gates(tokens.flatten(0, 1), nowhere)
    expected, _ = sae.gates(tokens[:, 0], sae.metadata(Step(ANCHORS[0], 0.0, None, 5.0), 6))
    torch.testing.assert_close(gates.shares.view(6, 3, -1)[:, 0], expected)
    sae.noise.bias.data.fill_(-50.0)  # no noise worth the name: what differs while training is what is left untold
    rows, told = tokens[:1, :1].expand(4000, 3, D).flatten(0, 1), told[:1].expand(4000, 3)
    expected = view.gates(rows, told)[0].shares
    sae.train()
    differs = (view.gates(rows, told)[0].shares - expected).abs().amax(1) > 0.05
    assert 0.1 < differs.float().mean() < 0.45


@pytest.mark.parametrize("kind", ["static", "tide", "mixture"])
def test_a_finished_dictionary_reads_activations_as_they_are(kind):
    data, settings = step_data().float(), recipe(kind=kind, architecture="batch_topk" if kind == "mixture" else "topk")
    dynamics = dynamics_of(data)
    trainer = DictionaryTrainer(
        new_dictionary("mid_block", ANCHORS, settings, dynamics), settings.train, dynamics, data[:512], "cpu"
    )
    for step in range(20):
        trainer.backward(trainer.inputs(data[100 * step :][:100]), None)
        trainer.update(step)
    inputs = trainer.inputs(data[:50])
    trainer.sae.eval()
    with torch.no_grad():
        target, unit, code, *_ = trainer._encode(inputs, None)
        decoded = decode(code, trainer.sae.decoder, len(target)) + trainer.sae.decoder_bias
        expected = inputs + ((decoded - target) / (1 if unit is None else unit)).view_as(inputs)
    sae = trainer.finish()
    if kind == "mixture":
        calibrate(sae, data[:50], settings.train.k)
    found = trainer.inputs(sae.reconstruct(data[:50]))
    near = (found - expected).abs() < 2e-2 * (1 + expected.abs())  # weights were rounded, and with them the threshold
    assert near.float().mean() > (0.97 if kind == "mixture" else 0.9999)
    torch.testing.assert_close(sae.spread, dynamics.scale)


@pytest.mark.parametrize("importance", ["mean", "product"])
def test_what_matters_less_is_masked_more_often(importance):
    settings = recipe(architecture="atm", importance=importance, mask_above=0.5, mask_rate=2.0).train
    architecture = ARCHITECTURES["atm"](settings, "cpu", Processes(0, 1))
    architecture.running[:] = torch.linspace(0, 3, settings.num_latents)[:, None]
    chance = architecture.chance()
    mattering = architecture.running[:, 0] / architecture.running[:, 0].mean()
    threshold = mattering.mean() + 0.5 * mattering.std(correction=0)
    expected = 1 - torch.exp(-2.0 * (threshold - mattering) / threshold)
    torch.testing.assert_close(chance, expected.clamp(min=0), atol=1e-5, rtol=1e-4)
    assert chance[0] == pytest.approx(1 - math.exp(-2)) and chance[-1] == 0


def test_masked_latents_are_silent_while_training_and_what_the_others_do_is_noted():
    data, settings = sparse_data(256), recipe(architecture="atm", mask_above=1.0, mask_rate=50.0)
    dynamics = dynamics_of(data)
    sae = new_dictionary("mid_block", ANCHORS, settings, dynamics)
    trainer = DictionaryTrainer(sae, settings.train, dynamics, data.float(), "cpu")
    architecture, inputs = trainer.architecture, trainer.inputs(data.float())
    trainer.backward(inputs, None)
    with torch.no_grad():
        target, _, code, *_ = trainer._encode(inputs, None)
        decoder = sae.decoder.flatten(1)
        left = target - decode(code, decoder, len(target)) - sae.decoder_bias.flatten()
        latent = int(code.latents.mode().values)
        of = code.where(code.latents == latent)
        more = (left[of.rows] + of.values[:, None] * decoder[latent]).square().sum(1) - left[of.rows].square().sum(1)
    expected = torch.stack([of.values.mean(), torch.tensor(len(of.rows) / len(target)), more.sum() / len(target)])
    torch.testing.assert_close(architecture.running[latent], expected.clamp(min=0), atol=1e-4, rtol=1e-4)
    architecture.running[:] = 1.0
    architecture.running[latent], architecture.seen[:] = 0.0, 1000
    assert trainer._encode(inputs, None)[2].latents.ne(latent).all()
    sae.eval()
    assert trainer._encode(inputs, None)[2].latents.eq(latent).any()


def test_per_step_latents_see_and_write_one_anchor_each(tmp_path):
    rtsae = train(tmp_path, recipe(layout="per_step", num_latents=30))[0]
    for weights in (rtsae.encoder, rtsae.decoder):
        used = weights.abs().sum(2) > 0
        assert (used.sum(1) == 1).all() and used.sum(0).tolist() == [10, 10, 10]


def test_the_first_latents_of_a_matryoshka_reconstruct_alone(tmp_path):
    data = sparse_data(1000, seed=1).float()
    arms = recipe(steps=400, architecture="matryoshka", nested=[0.25, 1.0], prefix=0), recipe(steps=400, prefix=0)
    left = []
    for rtsae in train(tmp_path, *arms):
        with torch.no_grad():
            latents = rtsae.encode(data)
            latents[:, 8:] = 0
            residuals = rtsae.dynamics.residuals(data)
            left.append((rtsae.decode_residuals(latents) - residuals).square().mean().item())
    assert left[0] < 0.95 * left[1]


def test_validation_is_logged_and_trouble_is_told_early(tmp_path):
    with pytest.warns(UserWarning, match="r0: .* of the latents are dead"):
        train(tmp_path, recipe(num_latents=512, dead_after=200, auxiliary=0.0))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40]
    assert lines[-1]["fvu_validation"] < lines[0]["fvu_validation"] and lines[-1]["dead"] > 0.2


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"The loss of r0 is (nan|inf) at step \d+. Lower `learning_rate`"):
        train(tmp_path, recipe(learning_rate=1e30))


def test_auxiliary_loss_pulls_dead_latents_towards_the_error():
    data = sparse_data(256)
    rtsae = new_dictionary("mid_block", ANCHORS, recipe(), dynamics_of(data))
    error, dead = torch.randn(64, 3, D), torch.tensor([5])
    centred = error.flatten(1)
    before = auxiliary_loss(rtsae, centred, centred, dead, k=1)
    before.backward()
    touched = rtsae.decoder.grad.abs().sum((1, 2)) > 0
    assert touched.nonzero().tolist() == [[5]]
    with torch.no_grad():
        rtsae.decoder -= 0.5 * rtsae.decoder.grad
    assert auxiliary_loss(rtsae, centred, centred, dead, k=1) < before


def test_geometric_median_resists_outliers():
    points = torch.cat([torch.zeros(90, 2) + 0.01 * torch.randn(90, 2), torch.full((10, 2), 100.0)])
    assert geometric_median(points).norm() < 0.1 < points.mean(0).norm()


def test_checkpoint_without_file_starts_at_zero(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    assert load_checkpoint(tmp_path / "none", {"p": parameter}, torch.optim.Adam([parameter]), "x") == 0


def test_a_damaged_checkpoint_names_the_file_and_the_remedy(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter])
    save_checkpoint(tmp_path / "c", 1, {"p": parameter}, optimizer, "x")
    (tmp_path / "c").write_bytes((tmp_path / "c").read_bytes()[:-3])
    with pytest.raises(OSError, match="c is damaged .*Delete it to train from the beginning"):
        load_checkpoint(tmp_path / "c", {"p": parameter}, optimizer, "x")


def launch(script: Path, text: str, *arguments) -> None:
    """Run `text` in two real processes of one group."""
    script.write_text(text)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "127.0.0.1:0", "--local_addr", "127.0.0.1", script, *arguments]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# neither latents nor rows are even; latents die, rows share a budget, and half of the batches show a beginning
SHARED_ARMS = {
    name: recipe(num_latents=33, batch_size=127, steps=20, validate_every=5, dead_after=130, **changes)
    for name, changes in {
        "batch_topk": {}, "topk": {"architecture": "topk"}, "matryoshka": {"architecture": "matryoshka"},
        "jump_relu": {"architecture": "jump_relu"}, "per_step": {"layout": "per_step"}, "parts": {"accumulate": 2},
        "tide": {"kind": "tide"}, "mixture": {"kind": "mixture", "experts": 2}, "atm": {"architecture": "atm"},
    }.items()
}  # fmt: skip


def test_what_several_processes_train_and_continue_is_what_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(dictionary, "_MEMORY", 3)  # so that latents are masked, too
    text = """
        import sys; from tests.training.test_train import *
        dictionary._MEMORY = 3
        original = Checkpoints.save
        def save_then_die(*arguments):
            original(*arguments)
            raise KeyboardInterrupt
        Checkpoints.save = save_then_die
        with pytest.raises(KeyboardInterrupt):
            train(Path(sys.argv[1]) / "work", *SHARED_ARMS.values())
        torch.distributed.barrier()
        Checkpoints.save = original
        found = train(Path(sys.argv[1]) / "work", *SHARED_ARMS.values())
        assert bool(found) == (int(os.environ["RANK"]) == 0)
        if found:
            torch.save([one.state_dict() for one in found], f"{sys.argv[1]}/weights.pt")
        """
    launch(tmp_path / "script.py", textwrap.dedent(text), tmp_path)
    alone = train(tmp_path / "alone", *SHARED_ARMS.values())
    for one, together in zip(alone, torch.load(tmp_path / "weights.pt"), strict=True):
        for name, value in one.state_dict().items():  # sums in another order may be rounded to another half
            rounded = name in one.matrices
            torch.testing.assert_close(together[name], value, atol=1e-5, rtol=2**-10 if rounded else 1e-4)
    told = [(tmp_path / run / "log.jsonl").read_text().splitlines() for run in ("work", "alone")]
    for together, one in zip(*(map(json.loads, lines) for lines in told), strict=True):
        figures = [key for key in one if key not in ("dictionary", "trajectories_per_second")]
        assert [together[key] for key in figures] == pytest.approx([one[key] for key in figures], rel=1e-3)
    assert any(json.loads(line)["dead"] > 0 for line in told[1])  # so that the auxiliary loss was there
    with pytest.raises(ValueError, match="holds no r0-1-of-1.* or on another number of processes"):
        train(tmp_path / "work", *SHARED_ARMS.values())


def test_two_processes_collect_train_and_save(tmp_path):
    text = """
        import sys; from pathlib import Path; from tests.training.test_kill import RECIPE
        from training.recipe import Recipe; from training.train import run
        run(Recipe(**RECIPE), Path(sys.argv[1]) / "out", Path(sys.argv[1]) / "work")
        """
    launch(tmp_path / "script.py", textwrap.dedent(text), tmp_path)
    assert len(list((tmp_path / "work" / "trajectories").glob("*.safetensors"))) == 6
    assert load_dictionary(tmp_path / "out").config["metrics"]["up_blocks.1.attentions.1"]["l0_threshold"] > 1


def test_a_variant_cannot_join_a_run_that_began_without_it(tmp_path):
    train(tmp_path, recipe())
    with pytest.raises(ValueError, match="holds no r1-1-of-1.*: this run was started without it, or on another"):
        train(tmp_path, recipe(), recipe(k=4))
