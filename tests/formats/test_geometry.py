"""Dictionaries of the sizes that are published for SDXL and Stable Diffusion 1.4, converted from random ones, on a
block of the true path and width: idle, steered, and held in few bytes."""

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from foreign import Case
from torch import nn

from diffusers_rtsae import Dictionary, Edit, load_dictionary
from diffusers_rtsae.dictionary import convertible
from diffusers_rtsae.steering import Adapter, Controller, PlanState, SiteEdit, SitePlan
from tests.benchmarks.memory import tensor_bytes

WIDTH = 1280
pytestmark = pytest.mark.filterwarnings("ignore:.*how active its latents are", "ignore:To read some latents")


class Denoiser(nn.Module):
    """As much of a U-Net as lies around one site, at its true path and width."""

    def __init__(self, site: str):
        super().__init__()
        block, (*path, last) = Transformer2DModel(20, 64, WIDTH, num_layers=1, norm_num_groups=32), site.split(".")
        self.site, inner = site, self
        for name in path:
            inner.add_module(name, nn.Module())
            inner = inner.get_submodule(name)
        inner.add_module(last, block)

    def forward(self, sample, timestep, encoder_hidden_states=None):
        return self.get_submodule(self.site)(sample, return_dict=False)[0]


def sdxl() -> tuple[str, Case, int]:
    site, count = "down_blocks.2.attentions.1", 5120
    t = {"encoder.weight": torch.randn(count, WIDTH) / WIDTH**0.5, "latent_bias": torch.zeros(count)}
    t |= {"decoder.weight": torch.randn(WIDTH, count) / WIDTH**0.5, "pre_bias": torch.zeros(WIDTH)}
    config = {"n_dirs_local": count, "d_model": WIDTH, "k": 10, "auxk": 256, "dead_steps_threshold": 10}
    inside = f"unet.{site}_k10_hidden5120_auxk256_bs4096_lr0.0001/final"
    return (
        site,
        Case({f"{inside}/config.json": config, f"{inside}/state_dict.pth": {"state_dict": t}}, None, None),
        count,
    )


def sd14() -> tuple[str, Case, int]:
    site, count = "up_blocks.1.attentions.1", 20480
    decoder = torch.randn(count, WIDTH) / WIDTH**0.5
    t = {"encoder.weight": decoder, "encoder.bias": torch.zeros(count), "W_dec": decoder.clone()}
    config = {"expansion_factor": 16, "num_latents": 0, "k": 32, "batch_topk": True, "d_in": WIDTH}
    files = {f"unet.{site}/cfg.json": config, f"unet.{site}/sae.safetensors": t | {"b_dec": torch.zeros(WIDTH)}}
    return site, Case(files, None, None), count


@torch.no_grad()
@pytest.mark.parametrize("build", [sdxl, sd14])
def test_a_published_dictionary_of_true_size_is_converted_and_steers(tmp_path, build):
    site, case, count = build()
    case.write(tmp_path / "theirs")
    convertible(tmp_path / "theirs").save(tmp_path / "ours")
    sae = load_dictionary(tmp_path / "ours").sites[site]
    c = sae.config
    assert (c.num_latents, c.in_channels) == (count, WIDTH) and sae.encoder.dtype == torch.float16
    assert (c.activation, c.sparsity) == (("update", "topk") if build is sdxl else ("output", "batch_topk"))

    denoiser, x = Denoiser(site), torch.randn(1, WIDTH, 4, 4)
    plain, controller = denoiser(x, torch.tensor(500)), Controller()
    controller.adapters["one"] = Adapter(Dictionary({site: sae}))
    h = (plain - x if build is sdxl else plain).flatten(2).mT
    z = sae.encode_step(h, 500.0)
    latent = int(z.sum((0, 1)).argmax())

    def steered(*edits: Edit) -> torch.Tensor:
        controller.set_features(denoiser, "one", tuple(SiteEdit("one", site, edit) for edit in edits))
        controller.install({"unet": denoiser})
        return denoiser(x, torch.tensor(500))

    idle = Edit(latents=(latent,), weights=(1.0,), strength=0.0)
    assert torch.equal(steered(idle), plain)
    move = (steered(Edit(latents=(latent,), weights=(1.0,), strength=2.0, clip=False)) - plain).flatten(2).mT
    torch.testing.assert_close(move, (2.0 * sae.decoder[latent].float()).expand_as(move), atol=1e-4, rtol=1e-3)
    move = (steered(Edit(latents=(latent,), weights=(1.0,), strength=1.0, operation="ablate")) - plain).flatten(2).mT
    torch.testing.assert_close(move, -z[..., [latent]] * sae.decoder[latent].float(), atol=1e-4, rtol=1e-3)

    seen = z[0] > sae.typical_activation / 2
    few = int(torch.where(seen.all(0), 0, seen.sum(0)).argmax())
    erased = (steered(Edit(latents=(few,), weights=(1.0,), strength=1.0, operation="erase")) - plain).flatten(2).mT + h
    free = h[0, ~seen[:, few]]
    rest = free.mean(0) / free.mean(0).norm() * free.norm(dim=1).mean()
    assert 0 < seen[:, few].sum() < len(seen)
    torch.testing.assert_close(erased[0], torch.where(seen[:, [few]], rest, h[0]), atol=1e-4, rtol=1e-3)

    plan = SitePlan(sae, [Edit(latents=(i,), weights=(1.0,), strength=1.0, clip=False) for i in range(5)], None)
    state = PlanState()
    for step in range(5):
        plan.conditional(state, h.half(), 981 - 20 * step, None)
    assert tensor_bytes([plan.reader, plan.folds, state], set()) < 4e6  # as for ours
