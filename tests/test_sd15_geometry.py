"""Stable Diffusion 1.5's true geometry, with random weights: every site takes a dictionary, and one step is cheap."""

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from diffusers_rtsae import RTSAE, Dictionary, Edit, list_sites, load_dictionary
from diffusers_rtsae.denoiser import describe, get_site
from diffusers_rtsae.models import KINDS
from diffusers_rtsae.steering import PlanState, SitePlan
from tests.benchmarks.memory import WIDTH, tensor_bytes


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
        )
    unet = unet.to_empty(device="cpu")  # float32: not all processors have convolutions of bfloat16
    for name, parameter in unet.named_parameters():
        is_scale = "norm" in name and name.endswith("weight")
        parameter.data.fill_(1.0) if is_scale else parameter.data.uniform_(-0.03, 0.03)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=[32]), text_encoder=None, tokenizer=None, unet=unet,
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read(module, output) -> torch.Tensor:
    block = describe(module)
    return block.to_tokens(block.output(output))


@pytest.mark.slow
@torch.no_grad()
def test_every_site_takes_a_dictionary_of_its_width_and_is_steered(pipe):
    sites = [site for site in list_sites(pipe.unet) if get_site(pipe.unet, site) is not pipe.unet]
    assert {"mid_block", "down_blocks.2", "up_blocks.1.attentions.1", "mid_block.resnets.0"} <= set(sites)
    text = torch.randn(2, 2, 77, 768, generator=torch.Generator().manual_seed(0))
    call = {"prompt_embeds": text[0], "negative_prompt_embeds": text[1], "num_inference_steps": 1}
    seen: dict[str, torch.Tensor] = {}

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return pipe(**call, height=16, width=16, generator=generator, output_type="latent").images

    hooks = [
        get_site(pipe.unet, site).register_forward_hook(
            lambda module, args, output, site=site: seen.update({site: read(module, output)})
        )
        for site in sites
    ]
    plain = run()
    for hook in hooks:
        hook.remove()
    widths = {site: tokens.shape[-1] for site, tokens in seen.items()}
    assert set(widths.values()) == {320, 640, 1280} and len(widths) == len(sites)
    dictionaries = {}
    for site, width in widths.items():
        dictionaries[site] = RTSAE(site, width, [961, 481, 1], 4, 2)
        dictionaries[site].typical_activation.fill_(5.0)
        dictionaries[site].max_activation.fill_(5.0)
    pipe.load_rtsae(dictionaries)
    assert torch.equal(run(), plain)
    pipe.set_rtsae_features({(site, 0): [0.0, 1.0] for site in sites})
    steered = run()
    report = pipe.rtsae_report()
    assert torch.equal(steered[0], plain[0]) and not torch.equal(steered[1], plain[1])
    assert torch.isfinite(steered).all() and set(report) == set(sites)
    pipe.unload_rtsae()


@pytest.mark.parametrize("kind", ["RTSAE", "SparseAutoencoder", "TIDE", "MixtureSAE"])
def test_a_dictionary_of_full_size_opens_at_once_and_takes_few_bytes(tmp_path, kind):
    """Only rows in use are read: what steering holds does not grow with the dictionary."""
    site, count = "up_blocks.1.attentions.1", 2048
    rtsae = KINDS[kind](site, WIDTH, [961, 721, 481, 241, 1], count, k=32)
    Dictionary({site: rtsae}).save(tmp_path)
    loaded = load_dictionary(tmp_path).sites[site]
    edits = [Edit(latents=(100 * i,), weights=(1.0,), strength=1.0) for i in range(5)]
    plan, state = SitePlan(loaded, edits, torch.linspace(0.999, 0.005, 1000)), PlanState()
    for step in range(50):
        tokens = torch.randn(1, 256, WIDTH, dtype=torch.float16)
        plan.conditional(state, tokens, 981 - 20 * step, None)
        state.memories[None].continue_with(tokens)
    # beside one activation for each anchor before the last, which lets other latents be read in mid-run
    history = 3 * tokens.nbytes if KINDS[kind].reads_past else 0
    assert tensor_bytes([plan.reader, plan.folds, state], set()) - history < 4e6
