"""Training resumes bit for bit, shares its work exactly, and says what is wrong."""

import json
import shutil
import textwrap

import pytest
import torch
from disk import full_disk
from small_training import ANCHORS, SHARED_ARMS, D, dynamics_of, launch, recipe, same, sparse_data, train, with_told

from training.architectures import atm, screen
from training.architectures.matrix import Matrix
from training.common.processes import Processes
from training.data.split import Data
from training.data.store import Rows
from training.loop.checkpoints import Checkpoints
from training.loop.trainer import DictionaryTrainer, auxiliary_loss, geometric_median, new_dictionary


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
        gradients.append(torch.cat([piece for _, piece in trainer.encoder.gradient().pieces()]))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_a_changed_recipe_does_not_continue_another_run(tmp_path):
    train(tmp_path, recipe(steps=10))
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        train(tmp_path, recipe(steps=10, k=4))


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
    matrices = Matrix(rtsae.encoder), rtsae.encoder_bias, Matrix(rtsae.decoder)
    before = auxiliary_loss(*matrices, centred, centred, dead, k=1)
    before.backward()
    gradient = torch.cat([piece for _, piece in matrices[2].gradient().pieces()])
    assert gradient.abs().sum(1).nonzero().tolist() == [[5]]
    with torch.no_grad():
        rtsae.decoder.flatten(1).sub_(0.5 * gradient)
    assert auxiliary_loss(*matrices, centred, centred, dead, k=1) < before


def test_geometric_median_resists_outliers():
    points = torch.cat([torch.zeros(90, 2) + 0.01 * torch.randn(90, 2), torch.full((10, 2), 100.0)])
    assert geometric_median(points).norm() < 0.1 < points.mean(0).norm()


@pytest.mark.slow
@pytest.mark.parametrize("screened", [False, True])
def test_what_several_processes_train_and_continue_is_what_one_does(tmp_path, monkeypatch, screened):
    monkeypatch.setattr(atm, "MEMORY", 3)  # so that latents are masked, too
    monkeypatch.setattr(screen, "_LEAST", 1)
    monkeypatch.setattr(screen, "has_bfloat16_units", lambda: screened)
    text = """
        import os; import sys; from pathlib import Path; import pytest; import torch
        from small_training import SHARED_ARMS, train; from training.architectures import atm, screen
        from training.loop.checkpoints import Checkpoints
        atm.MEMORY, screen._LEAST, screen.has_bfloat16_units = 3, 1, lambda: sys.argv[2] == "True"
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
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()  # or an interpreter that ends first may take the other with it
        """
    launch(tmp_path / "script.py", textwrap.dedent(text), tmp_path, str(screened))
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


def test_a_variant_cannot_join_a_run_that_began_without_it(tmp_path):
    train(tmp_path, recipe())
    with pytest.raises(ValueError, match="holds no r1-1-of-1.*: this run was started without it, or on another"):
        train(tmp_path, recipe(), recipe(k=4))
