"""Beside caches that leave blocks out: the edit is there once on every step, and only what was computed is read.

What a steered model with a cache should give is known: what the cache gives for a model whose block adds the same.
"""

import functools

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_faster_cache,
)
from diffusers.hooks.first_block_cache import FBCHeadBlockHook
from packaging.version import Version
from small_pipelines import FLUX_TEXT, PIXART_TEXT, TRUE_CFG, UNET_SITE, bundled, dictionary, flux, pixart

from diffusers_rtsae import list_sites
from diffusers_rtsae.analysis.record import Recorder
from diffusers_rtsae.denoiser import describe

STEPS = 6
NOW = {"timestep": 0.0}  # of the running step, as caches ask for it
CACHES = {
    "first block": lambda: FirstBlockCacheConfig(threshold=1e9),
    "magnitude": lambda: MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS, max_skip_steps=2),
    "attention broadcast": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 2),
        current_timestep_callback=lambda: NOW["timestep"],
    ),
    "faster": lambda: FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 0.9), is_guidance_distilled=True, tensor_format="BCHW",
        spatial_attention_block_identifiers=("transformer_blocks.*attn",),
        current_timestep_callback=lambda: NOW["timestep"], attention_weight_callback=lambda module: 0.3,
    ),
    "Taylor": lambda: TaylorSeerCacheConfig(2, 1, taylor_factors_dtype=torch.float32),
    "Taylor of blocks": lambda: TaylorSeerCacheConfig(
        2, 1, taylor_factors_dtype=torch.float32, cache_identifiers=[r"(single_)?transformer_blocks\.\d"]
    ),
    "Taylor of the output": lambda: TaylorSeerCacheConfig(
        2, 1, taylor_factors_dtype=torch.float32, use_lite_mode=True
    ),
}  # fmt: skip
IS_0_40 = Version(diffusers.__version__) < Version("0.41")
if not IS_0_40:
    from diffusers.hooks.sea_cache import SeaCacheConfig

    CACHES["spectral"] = lambda: SeaCacheConfig(
        threshold=1e9, raw_vision_callback=lambda module, args, kwargs: [kwargs["hidden_states"][:, None]]
    )
SITES = ["transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0"]


def steady(site: str, width: int):
    """A dictionary whose first feature is the same direction all along."""
    made = dictionary(site, width)
    with torch.no_grad():
        made[site].decoder[0] = torch.nn.functional.normalize(made[site].decoder[0, 0], dim=0)
    return made


def denoise(pipe: FluxPipeline) -> torch.Tensor:
    """The model's outputs over a run, without a pipeline: caches differ in what they need to be told."""
    transformer, hidden_states = pipe.transformer, torch.randn(2, 32, 4, generator=torch.Generator().manual_seed(0))
    still = {
        "encoder_hidden_states": FLUX_TEXT["prompt_embeds"], "pooled_projections": FLUX_TEXT["pooled_prompt_embeds"],
        "txt_ids": torch.zeros(7, 3), "img_ids": torch.cartesian_prod(*map(torch.arange, (1.0, 4.0, 8.0))),
        "return_dict": False,
    }  # fmt: skip
    outputs = []
    pipe.reset_rtsae_state()
    with torch.no_grad():
        for i, sigma in enumerate(torch.linspace(1, 0.1, STEPS)):
            NOW["timestep"] = sigma.item()
            at = {"step_index": i, "sigma": sigma.item(), "num_inference_steps": STEPS}
            with transformer.cache_context("cond", **({} if IS_0_40 else at)):
                output = transformer(hidden_states=hidden_states, timestep=sigma.expand(2), **still)[0]
            hidden_states = hidden_states - 0.5 * output
            outputs.append(output)
    transformer._reset_stateful_cache()
    return torch.stack(outputs)


def context(hook) -> str:
    """The guidance branch that a cache is asked for."""
    manager = hook.state_manager
    return manager._current_context if IS_0_40 else manager.context.name


def follow(module, change=None) -> list[float]:
    """The times at which a module's own forward runs; it adds `change(rows)` to its hidden states."""
    forward, times = module.forward, []

    @functools.wraps(forward)
    def followed(*args, **kwargs):
        times.append(NOW["timestep"])
        output = forward(*args, **kwargs)
        block = describe(module)
        hidden_states = block.output(output)
        return output if change is None else block.returning(output, hidden_states + change(len(hidden_states)))

    module.forward = followed
    return times


def direction(made: dict, site: str) -> torch.Tensor:
    """What strength 1 adds."""
    return made[site].typical_activation[0] * made[site].feature_trajectories([0])[0, 0].detach()


@pytest.mark.parametrize("order", ["cache first", "features first"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("cache", CACHES)
def test_a_cached_model_is_edited_once_on_every_step(cache, site, order):
    if order == "features first" and IS_0_40:
        pytest.skip("diffusers 0.40 tells no context to a cache that is enabled after a run")
    reference, _, width = flux(None)
    made = steady(site, width)
    reference.load_rtsae(made)
    follow(reference.transformer.get_submodule(site), lambda rows: direction(made, site))
    reference.transformer.enable_cache(CACHES[cache]())
    expected = denoise(reference)

    pipe, _, _ = flux(None)
    pipe.load_rtsae(made)
    computed = follow(pipe.transformer.get_submodule(site))
    if order == "cache first":
        pipe.transformer.enable_cache(CACHES[cache]())
    plain = denoise(pipe) if order == "cache first" else None
    computed.clear()
    pipe.set_rtsae_features({0: 1.0}, clip=False)
    if order == "features first":
        uncached = denoise(pipe)
        pipe.transformer.enable_cache(CACHES[cache]())
        assert not torch.allclose(expected, uncached, atol=1e-3)  # the cache does leave something out
        computed.clear()
    torch.testing.assert_close(denoise(pipe), expected, atol=1e-4, rtol=1e-4)
    assert [row["timestep"] for row in pipe.rtsae_report()[site]] == pytest.approx([1000 * t for t in computed])
    if plain is not None:
        pipe.set_rtsae_features({})
        assert torch.equal(denoise(pipe), plain)
    else:
        pipe.transformer.disable_cache()
        torch.testing.assert_close(denoise(pipe), uncached)


def images(pipe, call: dict) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return pipe(generator=generator, output_type="latent", num_inference_steps=STEPS, **call).images.detach().numpy()


def test_the_other_half_of_guidance_follows_a_conditional_half_that_was_left_out(monkeypatch):
    """The caches of the two halves decide for themselves; here only the conditional one ever leaves blocks out."""
    monkeypatch.setattr(
        FBCHeadBlockHook, "_should_compute_remaining_blocks",
        lambda hook, residual: hook.state_manager.get_state().head_block_residual is None
        or context(hook) == "uncond",
    )  # fmt: skip
    site, call = "transformer_blocks.1", FLUX_TEXT | TRUE_CFG | {"true_cfg_scale": 3.0}
    made = steady(site, 32)
    results = []
    for edited_model in (True, False):
        pipe, _, _ = flux(None)
        pipe.load_rtsae(made)
        block = pipe.transformer.get_submodule(site)
        if edited_model:

            def change(rows, block=block):
                is_cond = context(block._diffusers_hook.hooks["fbc_block_hook"]) == "cond"
                return direction(made, site) * (1 if is_cond else -1)

            follow(block, change)
        else:
            pipe.set_rtsae_features({0: 1.0}, clip=False)
        pipe.transformer.enable_cache(FirstBlockCacheConfig())
        results.append(images(pipe, call))
    np.testing.assert_allclose(*results, atol=1e-4)


def test_a_cache_that_leaves_the_unconditional_half_out():
    made = steady("transformer_blocks.0", 24)
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 901), tensor_format="BCHW",
        unconditional_batch_skip_range=3, unconditional_batch_timestep_skip_range=(-1, 901),
        current_timestep_callback=lambda: NOW["timestep"], attention_weight_callback=lambda module: 0.3,
    )  # fmt: skip
    results, batches = [], []
    for edited_model in (True, False):
        pipe, site, _ = pixart(None)
        pipe.load_rtsae(made)
        if edited_model:

            def change(rows, site=site):
                batches.append(rows)
                return torch.zeros(rows, 1, 24).index_fill(0, torch.tensor([rows - 1]), 1.0) * direction(made, site)

            follow(pipe.transformer.get_submodule(site), change)
        else:
            pipe.set_rtsae_features({0: [0.0, 1.0]}, clip=False, apply_to="cond")
        apply_faster_cache(pipe.transformer, config)

        def note(step, timestep, latents, pipe=pipe):
            NOW["timestep"] = pipe.scheduler.timesteps[min(step + 1, STEPS - 1)].item()

        NOW["timestep"] = 1000.0
        results.append(images(pipe, PIXART_TEXT | {"callback": note}))
    assert set(batches) == {2, 4}
    np.testing.assert_allclose(*results, atol=1e-4)


# What others publish; not needed to run, so these tests are skipped where it is not installed


@pytest.mark.parametrize("site", SITES[:2])
@pytest.mark.parametrize("order", ["cache first", "features first"])
def test_cache_dit(site, order):
    cache_dit = pytest.importorskip("cache_dit")
    config = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 2, "residual_diff_threshold": 1e9}
    made, results, counts = steady(site, 32), [], []
    for edited_model in (True, False):
        pipe, _, _ = flux(None)
        change = {"change": lambda rows: direction(made, site)} if edited_model else {}
        computed = follow(pipe.transformer.get_submodule(site), **change)
        pipe.load_rtsae(made)
        if order == "features first" and not edited_model:
            pipe.set_rtsae_features({0: 1.0}, clip=False)
        cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**config, max_continuous_cached_steps=2))
        if order == "cache first" and not edited_model:
            pipe.set_rtsae_features({0: 1.0}, clip=False)
        results.append(images(pipe, FLUX_TEXT))
        counts.append(len(computed))
    np.testing.assert_allclose(*results, atol=1e-4)
    assert counts[0] == counts[1] == len(pipe.rtsae_report()[site])
    assert counts[0] == STEPS if site == SITES[0] else counts[0] < STEPS


@pytest.mark.parametrize("site, width", [(UNET_SITE, 160), ("up_blocks.1", 160), ("mid_block", 192)])
@pytest.mark.parametrize("order", ["cache first", "features first"])
def test_deep_cache(pipe, site, width, order):
    helper_class = pytest.importorskip("DeepCache").DeepCacheSDHelper
    made, results, counts = steady(site, width), [], []
    call = {"prompt": ["a star", "a heart"], "guidance_scale": 4.0}
    for edited_model in (True, False):
        built, _, _ = bundled(StableDiffusionPipeline)(pipe)
        module = built.unet.get_submodule(site)

        def change(rows):
            return (torch.arange(rows) == rows - 1)[:, None, None, None] * direction(made, site)[:, None, None]

        computed = follow(module, change if edited_model else None)
        built.load_rtsae(made)
        helper = helper_class(built)
        helper.set_params(cache_interval=3, cache_branch_id=0)
        if order == "features first" and not edited_model:
            built.set_rtsae_features({0: [0.0, 1.0]}, clip=False, apply_to="cond")
        helper.enable()
        if order == "cache first" and not edited_model:
            built.set_rtsae_features({0: [0.0, 1.0]}, clip=False, apply_to="cond")
        results.append(images(built, call))
        counts.append(len(computed))
        report = built.rtsae_report()
        helper.disable()
        if not edited_model:  # gone without a trace
            steered = images(built, call)
            built.set_rtsae_features({0: [0.0, 1.0]}, clip=False, apply_to="cond")
            assert np.array_equal(images(built, call), steered)
        built.unload_rtsae()
        del module.forward
    np.testing.assert_allclose(*results, atol=1e-4)
    assert counts[0] == counts[1] == len(report[site]) == 2


def test_token_merging(pipe):
    """Tokens are merged for attention and laid out again within a block, so what a block returns is all tokens."""
    tomesd = pytest.importorskip("tomesd")
    site, call = f"{UNET_SITE}.transformer_blocks.0", {"prompt": ["a star", "a heart"], "guidance_scale": 4.0}
    sites, plain = list_sites(pipe.unet), images(pipe, call)
    tomesd.apply_patch(pipe, ratio=0.5, max_downsample=4, use_rand=False)
    try:
        assert list_sites(pipe.unet) == sites
        merged, seen = images(pipe, call), []
        assert not np.allclose(merged, plain, atol=1e-2)
        pipe.load_rtsae(steady(site, 160))
        hook = pipe.unet.get_submodule(site).register_forward_hook(
            lambda m, a, output: seen.append(output[-1].clone())
        )
        mask = np.zeros((2, 2))
        mask[:, 0] = 1
        pipe.set_rtsae_features({0: [0.0, 1.0]}, clip=False, apply_to="cond", mask=mask)
        hook.remove()
        hook = pipe.unet.get_submodule(site).register_forward_hook(
            lambda m, a, output: seen.append(output[-1].clone())
        )
        images(pipe, call)
        pipe.disable_rtsae()
        steered = seen[0]
        seen.clear()
        assert np.array_equal(images(pipe, call), merged)
        change = (steered - seen[0]).unflatten(0, (8, 8)).norm(dim=-1) > 0
        assert change[:, :4].all() and not change[:, 4:].any()
        hook.remove()
    finally:
        tomesd.remove_patch(pipe)


def test_a_recording_keeps_the_steps_at_which_a_cached_block_ran():
    pipe, _, _ = flux(None)
    pipe.load_rtsae(steady(SITES[1], 32))
    times = follow(pipe.transformer.get_submodule(SITES[1]))
    pipe.transformer.enable_cache(CACHES["first block"]())
    with Recorder(pipe, [SITES[1]]) as recorder:
        denoise(pipe)
    assert len(times) == 1 < STEPS
    assert recorder.trajectories(SITES[1]).shape[2] == 1 and len(recorder.timesteps) == 1
    with Recorder(pipe, SITES[:2]) as recorder:
        denoise(pipe)
    with pytest.raises(ValueError, match="'transformer_blocks.1' was run at other steps than 'transformer_blocks.0'"):
        recorder.trajectories(SITES[1])
