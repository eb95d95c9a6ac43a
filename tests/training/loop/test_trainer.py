"""A step, whose gradients are never there as a whole, is that of dense autograd."""

import pytest
import torch
from small_training import ANCHORS, SHARED_ARMS, D, dynamics_of, recipe, sparse_data
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.architectures import atm, batch_topk, jump_relu, matrix, matryoshka
from training.architectures.matrix import Matrix
from training.loop import trainer as trainer_module
from training.loop.trainer import DictionaryTrainer, new_dictionary


def trainer_of(settings) -> DictionaryTrainer:
    data = sparse_data()
    sae = new_dictionary("mid_block", ANCHORS, settings, dynamics_of(data))
    return DictionaryTrainer(sae, settings.train, dynamics_of(data), data[:512].float(), "cpu")


class DenseMatrix(Matrix):
    """Autograd makes its gradient."""

    def part(self, latents=None, columns=None):
        rows = self.parameter.flatten(1)
        return DenseMatrix((rows if latents is None else rows[latents])[:, :columns])


def dense_encode(centred, centre, encoder, bias, code, gates=None):
    pre = (centred + centre.detach() - centre) @ encoder.parameter.flatten(1).T + bias
    values = pre[code.rows, code.latents]
    return code._replace(values=values if gates is None else values * gates.of(code))


def dense_decode(code, decoder, count, processes):
    codes = torch.zeros(count, len(decoder.parameter)).index_put((code.rows, code.latents), code.values)
    return codes @ decoder.parameter.flatten(1)


@torch.no_grad()
def dense_update(trainer: DictionaryTrainer, optimizer: torch.optim.Adam, step: int) -> None:
    sae, settings = trainer.sae, trainer.settings
    encoder, decoder = sae.encoder.grad.flatten(1), sae.decoder.grad.flatten(1)
    optimizer.param_groups[0]["lr"] = settings.learning_rate * min(
        1.0, (step + 1) / 100, 5 * (settings.steps - step) / settings.steps
    )
    if settings.layout == "per_step":
        latents, anchors, _ = sae.decoder.shape
        own = F.one_hot(torch.arange(latents) * anchors // latents, anchors).repeat_interleave(D, 1)
        encoder *= own
        decoder *= own
    rows = sae.decoder.flatten(1)
    decoder -= (decoder * rows).sum(1, keepdim=True) * rows
    norm = torch.stack([parameter.grad.norm() for parameter in trainer.parameters.values()]).norm()
    for parameter in trainer.parameters.values():
        parameter.grad /= norm
    optimizer.step()
    optimizer.zero_grad()
    rows /= rows.norm(dim=1, keepdim=True)
    trainer.done, trainer.parts = step + 1, 0


@pytest.mark.parametrize("arm", SHARED_ARMS)
def test_a_step_is_that_of_whole_gradients(arm, monkeypatch):
    monkeypatch.setattr(atm, "MEMORY", 1)  # so that latents are masked, too
    monkeypatch.setattr(matrix, "_PIECE", 5 * 3 * D)
    monkeypatch.setattr(matrix, "_STRIP", 20)
    settings = SHARED_ARMS[arm]
    settings = settings.model_copy(
        update={"train": settings.train.model_copy(update={"num_latents": 98, "dead_after": 1})}
    )
    ours, dense = trainer_of(settings), trainer_of(settings)
    dense.encoder, dense.decoder = DenseMatrix(dense.sae.encoder), DenseMatrix(dense.sae.decoder)
    optimizer = torch.optim.Adam(dense.parameters.values())
    data, told, dead = sparse_data(seed=5).float(), torch.rand(4096, 3), 0
    for step, prefix in enumerate((None, None, 2, None)):
        part = slice(127 * step, 127 * step + 127)
        for trainer in (ours, dense):
            with monkeypatch.context() as patch:
                if trainer is dense:
                    for module in (atm, batch_topk, jump_relu, trainer_module):
                        patch.setattr(module, "encode", dense_encode)
                    for module in (batch_topk, matryoshka, trainer_module):
                        patch.setattr(module, "decode", dense_decode)
                inputs = trainer.inputs(data[part])
                for own, its in zip(inputs.chunk(2), told[part].chunk(2), strict=True):
                    trainer.backward(own, prefix, len(own) / 127, its)
        dead += ours.some_perhaps_dead
        ours.update(step)
        dense_update(dense, optimizer, step)
    assert dead > 0  # so that there was an auxiliary loss
    for name, value in dense.state.items():
        torch.testing.assert_close(ours.state[name], value, atol=2e-6, rtol=1e-4, msg=name)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_leaves((args, kwargs)) if torch.is_tensor(one)]
        given = {one.untyped_storage().data_ptr() for one in tensors if one.layout is torch.strided}
        for one in tree_leaves(made):
            if torch.is_tensor(one) and one.layout is torch.strided and one.untyped_storage().data_ptr() not in given:
                self.entries = max(self.entries, one.untyped_storage().nbytes() // one.itemsize)
        return made


@pytest.mark.parametrize("layout", ["concatenated", "per_step"])
def test_a_step_makes_no_tensor_of_the_dictionarys_size(layout, monkeypatch):
    monkeypatch.setattr(matrix, "_PIECE", 2**10)
    monkeypatch.setattr(matrix, "_STRIP", D)
    trainer = trainer_of(recipe(num_latents=1024, dead_after=100, layout=layout))
    inputs, before = trainer.inputs(sparse_data(32).float()), trainer.sae.encoder.detach().clone()
    with Largest() as largest:
        for step in range(2):
            trainer.backward(inputs, None)
            trainer.update(step)
    assert 0 < largest.entries < trainer.sae.encoder.numel()
    assert not torch.equal(trainer.sae.encoder, before)
