"""Erasing: tokens that show something become tokens of the same picture that do not."""

import numpy as np
import pytest
import torch
from small_pipelines import FLUX_TEXT, TRUE_CFG, dictionary, flux

from diffusers_rtsae import RTSAE
from diffusers_rtsae.analysis.record import Recorder
from diffusers_rtsae.steering import Edit, PlanState, SitePlan, fold

SITE = "up_blocks.1.attentions.1"
PROMPTS = ["a large red heart on the left of a large blue star, flat, on white", "a large green cross, flat, on white"]


def images(pipe, prompts=PROMPTS, steps: int = 10, **call) -> np.ndarray:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    call = {"guidance_scale": 3.0, "output_type": "np"} | call
    return pipe(prompts, generator=generators, num_inference_steps=steps, **call).images


def test_what_the_label_sees_is_gone_and_the_rest_stays(steered, scorer):
    plain = images(steered)
    with steered.rtsae_steering({"heart": 1.0}, operation="erase"):
        erased = images(steered)
    (report,) = steered.rtsae_report().values()
    before, after = (scorer.read(torch.from_numpy(one).permute(0, 3, 1, 2)) for one in (plain, erased))
    assert (before[0]["left.shape"], after[0]["left.shape"]) == ("heart", None)
    assert all(after[0][f"right.{name}"] == before[0][f"right.{name}"] for name in ("shape", "colour", "size"))
    assert after[0]["valid"] == "yes" and (erased[1] == plain[1]).all()  # there is no heart in the second picture
    assert all(0.05 < row["edited"] < 0.25 and row["everywhere"] == 0 for row in report)
    assert all(row["out_of_range"] is None and row["relative_size"] > 0.1 for row in report)


def test_where_nothing_is_seen_pictures_are_the_same_bits(steered):
    plain = images(steered, steps=4)
    with steered.rtsae_steering({"triangle": 1.0}, operation="erase"):
        assert (images(steered, steps=4) == plain).all()
    with steered.rtsae_steering({"heart": 0.0}, operation="erase"):
        assert (images(steered, steps=4) == plain).all() and not steered.rtsae_report()


def test_each_picture_has_its_own_strength_and_mask(steered):
    def erased(prompts, **options):
        with steered.rtsae_steering(**options, operation="erase"):
            return images(steered, prompts, steps=4, output_type="latent").numpy()

    half = torch.zeros(2, 8, 8)
    half[0, :, :4] = half[1, 4:] = 1
    features = {"heart": [0.7, 0.0], "cross": [0.0, 1.0]}
    for options in ({}, {"mask": half}, {"mask": half, "where": "everywhere"}):
        together = erased(PROMPTS, features=features, **options)
        for i in range(2):
            own = options | ({"mask": half[i]} if options else {})
            alone = {name: strengths[i] for name, strengths in features.items()}
            with steered.rtsae_steering(alone, **own, operation="erase"):
                generator = torch.Generator().manual_seed(i)
                call = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
                expected = steered(PROMPTS[i], generator=generator, **call).images
            np.testing.assert_allclose(together[i : i + 1], expected.numpy(), atol=1e-3)


def test_all_that_is_painted_goes_and_a_feature_is_not_needed(steered, scorer):
    left = np.zeros((64, 64), np.float32)
    left[:, :30] = 1
    with steered.rtsae_steering({0: 1.0}, operation="erase", where="everywhere", mask=left):
        drawn = images(steered, PROMPTS[:1])
    (reading,) = scorer.read(torch.from_numpy(drawn).permute(0, 3, 1, 2))
    assert reading["left.shape"] is None and reading["right.shape"] == "star"
    with pytest.raises(ValueError, match="expected a `mask` of a part"):
        steered.set_rtsae_features({"heart": 1.0}, operation="erase", where="everywhere")


def seeing(active: torch.Tensor, d: int = 6) -> tuple[RTSAE, torch.Tensor]:
    """A dictionary whose first latent is active on these tokens `(pictures, tokens)` of an activation."""
    sae = RTSAE("mid_block", d, [961, 1], 2, 1)
    sae.encoder.data.zero_()
    sae.encoder.data[0, :, 0] = 1.0
    for tensor in (sae.encoder_bias.data, sae.decoder_bias.data, sae.threshold, sae.dynamics.mean):
        tensor.zero_()
    tokens = torch.randn(*active.shape, d)
    tokens[..., 0] = active.float()
    return sae, tokens


def rest(free: torch.Tensor) -> torch.Tensor:
    """What tokens become if these are left, `(tokens, d)`."""
    return free.mean(0) / free.mean(0).norm() * free.norm(dim=1).mean()


def test_a_picture_that_is_full_of_it_is_left_as_it_is(steered, monkeypatch):
    sae, tokens = seeing(torch.tensor([[True] * 4, [True, False, False, False]]))
    edit = Edit(latents=(0,), weights=(1.0,), strength=1.0, operation="erase")
    state = PlanState()
    change = SitePlan(sae, [edit], None).conditional(state, tokens, 961, (2, 2))
    assert (change[0] == 0).all() and (change[1, 1:] == 0).all()
    torch.testing.assert_close(tokens[1, 0] + change[1, 0], rest(tokens[1, 1:]))
    assert [(row["edited"], row["everywhere"]) for row in state.report] == [(0.125, 0.5)]
    plain = images(steered, steps=2)
    monkeypatch.setattr(fold, "_SEEN", -1.0)
    steered.set_rtsae_features({"heart": 1.0}, operation="erase")
    with pytest.warns(UserWarning, match="on every token of a picture") as told:
        assert (images(steered, steps=2) == plain).all()
    assert len([one for one in told if "every token" in str(one.message)]) == 1
    assert all(row["everywhere"] == 1 for row in steered.rtsae_report()[SITE])


def test_what_was_seen_once_stays_erased_and_other_branches_follow():
    sae, tokens = seeing(torch.tensor([[True, False, False, False]]))
    edits = [Edit(latents=(0,), weights=(1.0,), strength=1.0, operation="erase", start=0.5)]
    plan, state = SitePlan(sae, edits, None), PlanState()
    assert plan.conditional(state, tokens, 961, (2, 2)) is None  # looks before its window, too
    for memory in state.memories.values():
        memory.continue_with(tokens)
    later, other = torch.randn(1, 4, 6), torch.randn(1, 4, 6)
    later[..., 0] = 0.0
    change = plan.conditional(state, later, 1, (2, 2))
    torch.testing.assert_close(later[0, 0] + change[0, 0], rest(later[0, 1:]))
    followed = plan.unconditional(state, 0, other, 1, (2, 2))
    torch.testing.assert_close(other[0, 0] + followed[0, 0], rest(other[0, 1:]))
    assert (change[0, 1:] == 0).all() and (followed[0, 1:] == 0).all() and 0 not in state.memories
    with pytest.raises(ValueError, match="as many tokens in each"):
        plan.unconditional(state, 1, torch.randn(1, 5, 6), 1, None)
    with pytest.raises(ValueError, match="apply_to='cond'"):
        plan.unconditional(state, 0, other, 961, (2, 2))


def test_two_edits_erase_a_token_once():
    sae, tokens = seeing(torch.tensor([[True, False, False, False]]))
    one = Edit(latents=(0,), weights=(1.0,), strength=1.0, operation="erase", apply_to="cond")
    changes = [SitePlan(sae, [one] * n, None).conditional(PlanState(), tokens, 961, (2, 2)) for n in (1, 2)]
    assert torch.equal(*changes)


@pytest.mark.parametrize("site", ["transformer_blocks.0", "transformer_blocks.0.ff_context"])
def test_both_streams_and_branches_of_a_transformer_take_tokens_of_their_own(site):
    pipe, _, width = flux(None)
    made = dictionary(site, width)
    made[site].typical_activation.fill_(0.5)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_rtsae(made)
    few = dict.fromkeys(range(4), 1.0)
    branches, call = ("cond", "uncond"), FLUX_TEXT | TRUE_CFG | {"true_cfg_scale": 3.0, "output_type": "latent"}
    with Recorder(pipe, [site], streams=branches) as before, pipe.rtsae_steering(few, operation="erase"):
        with Recorder(pipe, [site], streams=branches) as after:
            pipe(**call, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    was, now = (one.trajectories(site) for one in (before, after))  # (branches * pictures, tokens, steps, d)
    changed = (was != now).any(-1)
    assert 0 < changed.sum() < changed.numel() and torch.equal(*changed.chunk(2))
    for row, token, step in changed.nonzero().tolist():
        torch.testing.assert_close(now[row, token, step], rest(was[row, ~changed[row, :, step], step]))
