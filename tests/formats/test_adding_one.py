"""A format, and a kind, that are added from outside: one module and one line each."""

import json

import pytest
import torch
from safetensors.torch import save_file

from diffusers_rtsae import Dictionary, SparseAutoencoder, load_dictionary
from diffusers_rtsae.analysis.record import record
from diffusers_rtsae.formats import FORMATS, Description, Format
from diffusers_rtsae.models import KINDS
from diffusers_rtsae.models.sae import StepReader

SITE, D, M = "up_blocks.1.attentions.1", 160, 24
CALL = {"num_inference_steps": 2, "guidance_scale": 3.0}
pytestmark = pytest.mark.filterwarnings("ignore:.*how active its latents are")


class Rows(Format):
    """rows.json with rows.safetensors: a ReLU autoencoder whose rows are those of its encoder too."""

    name, weights, config = "Rows", "rows", "rows.json"

    def describe(self, settings, tensors):
        rows = tensors("rows", None, settings.count("channels"))
        biases = {"encoder_bias": torch.zeros(len(rows)), "decoder_bias": tensors("mean", rows.shape[1])}
        return Description("SparseAutoencoder", {"k": 3}, {"encoder": rows, "decoder": rows} | biases)

    def export(self, sae, base_model):
        return {"channels": sae.config.in_channels}, {"rows": sae.decoder.data, "mean": sae.decoder_bias.data}


class Saturated(SparseAutoencoder):
    """Latents are at most 4."""

    summary = "An autoencoder whose latents are at most 4."

    def encode_step(self, tokens, timestep):
        return super().encode_step(tokens, timestep).clamp(max=4)

    def reader(self, latents, device):
        return SaturatedReader(self, latents, device)


class SaturatedReader(StepReader):
    def read(self, memory, tokens, step):
        return super().read(memory, tokens, step).clamp(max=4)


def test_a_format_is_loaded_steered_converted_and_exported(tmp_path, monkeypatch, pipe, draw):
    monkeypatch.setitem(FORMATS, "Rows", Rows())
    (tmp_path / "theirs" / SITE).mkdir(parents=True)
    (tmp_path / "theirs" / SITE / "rows.json").write_text(json.dumps({"channels": D}))
    rows, mean = torch.nn.functional.normalize(torch.randn(M, D), dim=1), torch.randn(D)
    save_file({"rows": rows, "mean": mean}, tmp_path / "theirs" / SITE / "rows.safetensors")
    plain = draw(pipe, steps=2)
    pipe.load_rtsae(tmp_path / "theirs")
    assert (draw(pipe, steps=2) == plain).all()
    pipe.set_rtsae_features({2: 30.0})
    assert (draw(pipe, steps=2) != plain).any()
    dictionary = load_dictionary(tmp_path / "theirs")
    x = torch.randn(5, D)
    torch.testing.assert_close(dictionary.sites[SITE].encode_step(x, 1.0), ((x - mean) @ rows.T).relu())
    dictionary.export("rows", tmp_path / "again")
    again = load_dictionary(tmp_path / "again").sites[SITE]
    assert torch.equal(again.decoder, rows) and torch.equal(again.decoder_bias, mean)


def test_a_kind_is_saved_loaded_steered_and_recorded(tmp_path, monkeypatch, pipe, draw):
    monkeypatch.setitem(KINDS, "Saturated", Saturated)
    sae = Saturated(SITE, D, [667, 1], M, 3)
    Dictionary({SITE: sae}).save(tmp_path)
    assert f"**Saturated.** {Saturated.summary}" in (tmp_path / "README.md").read_text()
    pipe.load_rtsae(tmp_path)
    plain = draw(pipe, steps=2)
    pipe.set_rtsae_features({2: 30.0}, clip=False)
    assert (draw(pipe, steps=2) != plain).any()
    pipe.disable_rtsae()
    recording = record(pipe, ["a star"], generator=torch.Generator().manual_seed(0), **CALL)
    latents = torch.stack(list(recording.latents(SITE, list(range(M)))))
    assert latents.max() == 4 and (latents < 4).any()
