"""Which rows of a batch are whose, in every layout of guidance: edits reach the rows they are for and no others."""

import numpy as np
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
)
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLCoreDenoiseStep,
)
from kinds import OTHERS
from small_pipelines import (
    FLUX_TEXT,
    PIXART_TEXT,
    TEXT,
    TRUE_CFG,
    UNET_SITE,
    XL_TEXT,
    adapter,
    bundled,
    controlnet,
    dictionary,
    flux,
    flux_single,
    instruct,
    latent_consistency,
    picture,
    pixart,
    sd3,
    small_vae,
    xl,
    xl_refiner,
    xl_unet,
)

from diffusers_rtsae.denoiser import describe, get_denoiser, get_site

#: name -> how it is built, how it is called, and for each denoiser call of one step the rows that the second of two
#: prompts has besides the unconditional ones
PIPELINES = {
    "text-to-image": (bundled(StableDiffusionPipeline), TEXT, [(4, [3])]),
    "two images a prompt": (bundled(StableDiffusionPipeline), TEXT | {"num_images_per_prompt": 2}, [(8, [6, 7])]),
    "no guidance": (bundled(StableDiffusionPipeline), TEXT | {"guidance_scale": 1.0}, [(2, [1])]),
    "image-to-image": (
        bundled(StableDiffusionImg2ImgPipeline), TEXT | {"image": picture(2), "strength": 0.5}, [(4, [3])],
    ),
    "inpaint": (
        bundled(StableDiffusionInpaintPipeline),
        TEXT | {"image": picture(2), "mask_image": torch.ones(2, 1, 64, 64), "height": 64, "width": 64},
        [(4, [3])],
    ),
    "ControlNet": (controlnet, TEXT | {"image": picture(2)}, [(4, [3])]),
    "T2I adapter": (adapter, TEXT | {"image": [picture()[0], picture()[0]]}, [(4, [3])]),
    "perturbed attention": (bundled(StableDiffusionPAGPipeline), TEXT | {"pag_scale": 3.0}, [(6, [3, 5])]),
    "perturbed attention alone": (
        bundled(StableDiffusionPAGPipeline), TEXT | {"pag_scale": 3.0, "guidance_scale": 0.0}, [(4, [1, 3])],
    ),
    "InstructPix2Pix": (instruct, TEXT | {"image": picture(2), "image_guidance_scale": 1.5}, [(6, [1])]),
    "latent consistency": (latent_consistency, TEXT, [(2, [1])]),
    "SDXL": (xl, XL_TEXT, [(4, [3])]),
    "SDXL refiner": (xl_refiner, XL_TEXT | {"image": picture(2, 16), "strength": 0.5}, [(4, [3])]),
    "PixArt": (pixart, PIXART_TEXT, [(4, [3])]),
    "SD3": (sd3, XL_TEXT | {"height": 16, "width": 16}, [(4, [3])]),
    "SD3 with skipped layers": (
        sd3, XL_TEXT | {"height": 16, "width": 16, "skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0},
        [(4, [3]), (4, [3]), (2, [1])],
    ),
    "Flux": (flux, FLUX_TEXT, [(2, [1])]),
    "Flux, single block": (flux_single, FLUX_TEXT, [(2, [1])]),
    "Flux with true guidance": (flux, FLUX_TEXT | TRUE_CFG | {"true_cfg_scale": 3.0}, [(2, [1]), (2, [])]),
}  # fmt: skip


OF_KIND = [(name, kind) for name in ("text-to-image", "PixArt", "Flux with true guidance") for kind in OTHERS]


@pytest.fixture(params=[*((name, "RTSAE") for name in PIPELINES), *OF_KIND], ids=lambda param: " - ".join(param))
def case(request, pipe):
    name, kind = request.param
    build, call, rows = PIPELINES[name]
    built, site, width = build(pipe)
    built.set_progress_bar_config(disable=True)
    steps = 2 if "strength" not in call else 4

    def run(steps=steps, **options):
        generator = torch.Generator().manual_seed(3)
        images = built(num_inference_steps=steps, generator=generator, output_type="latent", **(call | options)).images
        return images.detach().float().numpy()

    built.load_rtsae(dictionary(site, width, kind))
    yield built, site, run, rows
    built.unload_rtsae()


def record(pipeline, site: str, run) -> list[torch.Tensor]:
    """The activation at `site` that the network continued with, for each denoiser call."""
    seen = []
    hook = get_site(get_denoiser(pipeline), site).register_forward_hook(
        lambda module, args, output: seen.append(describe(module).output(output).clone())
    )
    run()
    hook.remove()
    return seen


def changed(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return [i for i in range(len(before)) if not torch.equal(before[i], after[i])]


@pytest.mark.way(4)
def test_only_the_rows_of_the_steered_prompt_change(case):
    pipeline, site, run, rows = case
    plain = record(pipeline, site, run)
    with pipeline.rtsae_steering({0: [0.0, 1.0]}, apply_to="cond"):
        steered = record(pipeline, site, run)[-len(plain) :]  # before that, what was missed is asked for
    assert [len(a) for a in plain[: len(rows)]] == [count for count, _ in rows]
    assert changed(plain[0], steered[0]) == rows[0][1]
    assert changed(plain[len(rows) - 1], steered[len(rows) - 1]) == rows[-1][1]


def test_contrast_moves_the_unconditional_rows_the_other_way(case):
    pipeline, site, run, rows = case
    plain = record(pipeline, site, run)
    with pipeline.rtsae_steering({0: [0.0, 1.0]}):
        steered = record(pipeline, site, run)[-len(plain) :]  # before that, what was missed is asked for
    change = (steered[0] - plain[0])[rows[0][1][0]]
    for before, after, (_, wanted) in zip(plain, steered, rows if not rows[-1][1] else rows[:1], strict=False):
        moved = changed(before, after)  # in the first step, where nothing else differs
        assert set(wanted) <= set(moved)
        for row in moved:
            expected = change if row in wanted else -change
            torch.testing.assert_close((after - before)[row], expected, atol=1e-3, rtol=1e-3)


def test_loaded_but_idle_is_bit_exact_and_steering_shows(case):
    pipeline, _, run, _ = case
    idle = run()
    with pipeline.rtsae_steering({0: [0.0, 2.0]}):
        steered = run()
    half = len(idle) // 2
    assert np.isfinite(steered).all()
    assert np.array_equal(steered[:half], idle[:half]) and not np.array_equal(steered[half:], idle[half:])
    pipeline.unload_rtsae()
    assert np.array_equal(run(), idle)


def test_modular_pipelines_which_call_once_for_each_part_of_guidance(pipe):
    torch.manual_seed(0)
    built = StableDiffusionXLCoreDenoiseStep().init_pipeline()
    guider = ClassifierFreeGuidance(guidance_scale=4.0)
    built.update_components(unet=xl_unet(6), scheduler=EulerDiscreteScheduler(), vae=small_vae(), guider=guider)
    text = {name: value for name, value in XL_TEXT.items() if name != "guidance_scale"}
    site = "up_blocks.0.attentions.1"
    built.load_rtsae(dictionary(site, 64))

    def run():
        generator = torch.Generator().manual_seed(3)
        built(**text, num_inference_steps=1, generator=generator, height=16, width=16, output="latents")

    plain = record(built, site, run)
    for apply_to, wanted in (("cond", [[1], []]), ("contrast", [[1], [1]]), ("all", [[1], [1]])):
        with built.rtsae_steering({0: [0.0, 1.0]}, apply_to=apply_to):
            steered = record(built, site, run)
        assert [changed(a, b) for a, b in zip(plain, steered, strict=True)] == wanted
    built.unload_rtsae()


@pytest.mark.parametrize("name", ["text-to-image", "SDXL", "PixArt", "SD3", "Flux"])
def test_masks_follow_the_token_grid(pipe, name):
    build, call, _ = PIPELINES[name]
    built, site, width = build(pipe)
    built.set_progress_bar_config(disable=True)
    built.load_rtsae(dictionary(site, width))

    def run():
        built(num_inference_steps=1, generator=torch.Generator().manual_seed(3), output_type="latent", **call)

    mask = np.zeros((4, 4))
    mask[:, :2] = 1  # the left half
    plain = record(built, site, run)
    with built.rtsae_steering({0: 1.0}, mask=mask, apply_to="cond"):
        steered = record(built, site, run)
    change = (steered[0] - plain[0])[-1]
    tokens = change.flatten(1).T if change.ndim == 3 else change
    width = {"Flux": 16}.get(name, round(len(tokens) ** 0.5))
    grid = tokens.abs().sum(1).view(-1, width) > 0
    assert grid[:, : width // 2].all() and not grid[:, width // 2 :].any()
    built.unload_rtsae()


@pytest.mark.way(6)
def test_a_down_block_is_edited_with_its_skip_connection(pipe, draw):
    pipe.load_rtsae(dictionary("down_blocks.1", 160))
    seen = []
    hook = pipe.unet.down_blocks[1].register_forward_hook(lambda m, a, out: seen.append(out))
    with pipe.rtsae_steering({0: 1.0}):
        hook.remove()
        hook = pipe.unet.down_blocks[1].register_forward_hook(lambda m, a, out: seen.append(out))
        draw(pipe, steps=1)
    hook.remove()
    hidden_states, residuals = seen[0]
    assert residuals[-1] is hidden_states


@pytest.mark.way(8)
def test_from_pipe_and_components_share_the_dictionary(pipe, draw):
    pipe.load_rtsae(dictionary(UNET_SITE, 160))
    pipe.set_rtsae_features({0: 1.0})
    expected = draw(pipe, steps=2)
    for other in (
        StableDiffusionPipeline.from_pipe(pipe, requires_safety_checker=False),
        StableDiffusionPipeline(**pipe.components, requires_safety_checker=False),
    ):
        other.set_progress_bar_config(disable=True)
        assert other.get_active_rtsae() == ["default"] and np.array_equal(draw(other, steps=2), expected)


@pytest.mark.way(5)
def test_guidance_that_stops_in_mid_run(pipe, draw):
    pipe.load_rtsae(dictionary(UNET_SITE, 160))

    def stop(pipe, step, timestep, tensors):
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    call = {"callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    plain = draw(pipe, steps=4, **call)
    with pipe.rtsae_steering({0: [0.0, 1.0]}):
        steered = draw(pipe, steps=4, **call)
    assert np.array_equal(steered[0], plain[0]) and not np.array_equal(steered[1], plain[1])
