import itertools

import pytest
import torch
from diffusers import DDIMScheduler
from kinds import OTHERS, random_dictionary
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_rtsae import RTSAE, SparseDictionary
from diffusers_rtsae.denoiser import TimeGrid
from diffusers_rtsae.models import PLACES, LinearMap, Step, interpolate, waves
from diffusers_rtsae.steering import Edit, PlanState, SitePlan
from diffusers_rtsae.steering.operations import OPERATIONS

ALPHAS = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
ANCHORS = [961, 721, 481, 241, 1]
D, M = 12, 20


def random_of(kind: str, seed: int) -> SparseDictionary:
    return random_rtsae(seed) if kind == "RTSAE" else random_dictionary(kind, "mid_block", D, ANCHORS, M, 4, seed)


def random_rtsae(seed: int) -> RTSAE:
    torch.manual_seed(seed)
    rtsae = RTSAE("mid_block", D, ANCHORS, M, 4)
    dynamics = rtsae.dynamics
    spreads = {
        dynamics.mean: 1.0,
        dynamics.transition: 0.2,
        rtsae.encoder_bias.data: 0.1,
        rtsae.decoder_bias.data: 0.3,
    }
    for tensor, spread in spreads.items():
        tensor.copy_(spread * torch.randn(tensor.shape))
    dynamics.scale.uniform_(0.5, 2)
    dynamics.residual_scale.uniform_(0.3, 1)
    rtsae.threshold.uniform_(0, 0.5)
    rtsae.typical_activation.uniform_(0.5, 3)
    rtsae.max_activation.copy_(5 * rtsae.typical_activation)
    return rtsae


def walk(rtsae: RTSAE, rows: list[int], h: torch.Tensor, timesteps: list[float]) -> list[torch.Tensor]:
    """What is read of rows at each step."""
    reader, grid = rtsae.reader(rows, torch.device("cpu")), TimeGrid(rtsae.config.anchors, ALPHAS)
    codes, memory = [], reader.begin()
    for i, timestep in enumerate(timesteps):
        codes.append(reader.read(memory, h[:, :, i], grid.step(timestep)))
        memory.continue_with(h[:, :, i])
    return codes


@pytest.mark.parametrize("seed", range(5))
def test_lazy_folded_encoding_equals_the_dense_path_at_every_anchor(seed):
    rtsae, h = random_rtsae(seed), torch.randn(2, 7, 5, D)
    rows = torch.randperm(M)[:6].tolist()
    codes = walk(rtsae, rows, h, ANCHORS)
    for g, code in enumerate(codes):
        dense = rtsae.encode(h[:, :, : g + 1].flatten(0, 1)).unflatten(0, (2, 7))[..., rows]
        torch.testing.assert_close(code, dense, atol=1e-4, rtol=1e-4)


def test_calling_twice_at_a_timestep_overwrites():
    rtsae, h = random_rtsae(0), torch.randn(1, 3, 5, D)
    once = walk(rtsae, [0, 1], h, ANCHORS)
    noise = torch.randn(1, 3, 5, D)
    doubled = torch.stack([noise, h], dim=3).flatten(2, 3)  # a first guess at each step, then the real call
    twice = walk(rtsae, [0, 1], doubled, [t for t in ANCHORS for _ in range(2)])
    for a, b in zip(once, twice[1::2], strict=True):
        torch.testing.assert_close(a, b)


def test_steps_between_anchors_do_not_change_the_code_at_the_anchors():
    rtsae = random_rtsae(1)
    fine = sorted({*ANCHORS, 841, 601, 361, 121}, reverse=True)
    h = torch.randn(1, 3, len(fine), D)
    coarse = walk(rtsae, [0, 1, 2], h[:, :, ::2], ANCHORS)
    codes = walk(rtsae, [0, 1, 2], h, fine)
    for a, b in zip(coarse, codes[::2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_steps_before_the_first_anchor_stand_for_it_in_turn():
    rtsae, h = random_rtsae(0), torch.randn(1, 3, 5, D)
    expected = walk(rtsae, [0, 1], h, ANCHORS)
    earlier = torch.cat([torch.randn(1, 3, 2, D), h], dim=2)
    codes = walk(rtsae, [0, 1], earlier, [999, 981, *ANCHORS])
    for a, b in zip(expected, codes[2:], strict=True):
        torch.testing.assert_close(a, b)


def test_skipped_anchors_compose_the_dynamics():
    """Along a trajectory that follows the linear dynamics exactly, nothing new is seen after a skip."""
    rtsae = random_rtsae(2)
    rtsae.decoder_bias.data.zero_()
    residuals = torch.zeros(3, 5, D)
    residuals[:, 0] = torch.randn(3, D)
    h = rtsae.dynamics.rollout(residuals)[None]
    rtsae.threshold.zero_()
    codes = walk(rtsae, list(range(M)), h[:, :, [0, 2, 4]], [961, 481, 1])
    torch.testing.assert_close(codes[1], codes[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(codes[2], codes[0], atol=1e-4, rtol=1e-4)


def plan_delta(edit: Edit, tokens: torch.Tensor, timestep: float, rtsae: RTSAE, size=(2, 2)):
    plan, state = SitePlan(rtsae, [edit], ALPHAS), PlanState()
    on_cond = plan.conditional(state, tokens, timestep, size)
    return on_cond, plan.unconditional(state, 0, tokens, timestep, size)


def test_adding_one_typical_activation_moves_along_the_feature_trajectory():
    rtsae, tokens = random_rtsae(3), torch.randn(2, 4, D)
    edit = Edit(latents=(5,), weights=(1.0,), strength=2.0, clip=False)
    for g, timestep in enumerate(ANCHORS):
        on_cond, on_uncond = plan_delta(edit, tokens, timestep, rtsae)
        expected = 2 * rtsae.typical_activation[5] * rtsae.feature_trajectories([5])[0, g]
        torch.testing.assert_close(on_cond.expand(2, 1, D)[0, 0], expected)
        torch.testing.assert_close(on_uncond, -on_cond)


def test_residual_injection_adds_only_the_innovation():
    rtsae, tokens = random_rtsae(3), torch.randn(1, 4, D)
    edit = Edit(latents=(5,), weights=(1.0,), strength=1.0, injection="residual", apply_to="cond", clip=False)
    on_cond, on_uncond = plan_delta(edit, tokens, 481, rtsae)
    torch.testing.assert_close(on_cond[0, 0], rtsae.typical_activation[5] * rtsae.residual_directions([5])[0, 2])
    assert on_uncond is None


def test_ablating_removes_exactly_what_the_latent_wrote():
    rtsae, tokens = random_rtsae(4), torch.randn(1, 4, D)
    rtsae.threshold.zero_()
    edit = Edit(latents=(3,), weights=(1.0,), strength=0.0, operation="scale")
    on_cond, _ = plan_delta(edit, tokens, 961, rtsae)
    latents = rtsae.encode(tokens[0, :, None])
    expected = -latents[:, 3, None] * rtsae.feature_trajectories([3])[0, 0]
    torch.testing.assert_close(on_cond[0], expected, atol=1e-5, rtol=1e-4)
    assert (on_cond[0][latents[:, 3] == 0] == 0).all()  # an inactive feature that is scaled changes nothing


def test_maps_move_tokens_by_what_they_read_and_add_up():
    """Two maps of different rank are folded; each with a strength for each of two pictures, one with a mask."""
    torch.manual_seed(0)
    tokens, rtsae = torch.randn(2, 4, D), random_rtsae(0)
    maps = [torch.randn(rank, len(ANCHORS), 2 * D + 1) for rank in (2, 3)]
    strengths, mask = ((0.5, 1.0), (-1.0, 2.0)), torch.tensor([[[1.0, 0.0], [0.0, 0.5]]])
    base = {"latents": (), "weights": (), "clip": False, "apply_to": "cond"}
    edits = [Edit(**base, map=rows, strength=own) for rows, own in zip(maps, strengths, strict=True)]
    step = TimeGrid(ANCHORS, ALPHAS).step(800)
    changes = [
        torch.tensor(own)[:, None, None] * LinearMap(rows)(tokens, step)
        for rows, own in zip(maps, strengths, strict=True)
    ]
    plan = SitePlan(rtsae, edits, ALPHAS)
    state = PlanState()
    torch.testing.assert_close(plan.conditional(state, tokens, 800, (2, 2)), sum(changes), atol=1e-4, rtol=1e-4)
    assert len(plan.folds) == 1 and [row["edited"] for row in state.report] == [1.0, 1.0]
    masked = SitePlan(rtsae, [Edit(**base, map=maps[0], strength=strengths[0], mask=mask)], ALPHAS)
    torch.testing.assert_close(
        masked.conditional(PlanState(), tokens, 800, (2, 2)),
        changes[0] * mask.flatten()[:, None],
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_map_may_read_where_a_token_is_on_a_grid_of_any_size():
    torch.manual_seed(0)
    parts = [torch.randn(2, len(ANCHORS), width) for width in (D, PLACES)]
    offsets, directions = torch.randn(2, len(ANCHORS)), torch.randn(2, D)
    rows, without = (LinearMap.rows(parts[0], offsets, directions, told) for told in (parts[1], None))
    assert [tuple(one.shape[1:]) for one in (without, rows)] == LinearMap.shapes(len(ANCHORS), D)
    step, tokens = TimeGrid(ANCHORS, ALPHAS).step(800, (2, 3)), torch.randn(1, 6, D)
    told = interpolate(parts[1], step.coordinate, dim=1)
    difference = (waves((2, 3)) @ told.T @ directions)[None]
    torch.testing.assert_close(LinearMap(rows)(tokens, step), LinearMap(without)(tokens, step) + difference)
    corners = [waves(size)[[0, -1]] for size in ((64, 64), (66, 66))]
    torch.testing.assert_close(*corners, atol=0.01, rtol=0)
    base = {"latents": (), "weights": (), "clip": False, "apply_to": "cond", "strength": 1.0}
    plan = SitePlan(random_rtsae(0), [Edit(**base, map=one) for one in (rows, without)], ALPHAS)
    both = LinearMap(rows)(tokens, step) + LinearMap(without)(tokens, step)
    torch.testing.assert_close(plan.conditional(PlanState(), tokens, 800, (2, 3)), both, atol=1e-4, rtol=1e-4)
    assert len(plan.folds) == 2


def test_where_and_mask_restrict_the_change():
    rtsae, tokens = random_rtsae(5), torch.randn(1, 4, D)
    active = rtsae.encode(tokens[0, :, None])[:, 7] > 0
    base = {"latents": (5,), "weights": (1.0,), "strength": 1.0, "clip": False}
    gated, _ = plan_delta(Edit(**base, where=(7,)), tokens, 961, rtsae)
    assert torch.equal(gated[0].abs().sum(1) > 0, active) and 0 < active.sum() < 4
    mask = torch.tensor([[[1.0, 0.0], [0.0, 0.5]]])
    masked, _ = plan_delta(Edit(**base, mask=mask), tokens, 961, rtsae)
    whole, _ = plan_delta(Edit(**base), tokens, 961, rtsae)
    torch.testing.assert_close(masked[0], whole[0] * mask.flatten()[:, None])


def test_renormalising_keeps_the_length_of_tokens_and_leaves_the_others_alone():
    rtsae, tokens = random_rtsae(5), torch.randn(1, 4, D)
    base = {"latents": (5,), "weights": (1.0,), "strength": 3.0, "mask": torch.tensor([[[1.0, 1.0], [0.0, 1.0]]])}
    plain, _ = plan_delta(Edit(**base, clip=False), tokens, 961, rtsae)
    kept = plan_delta(Edit(**base, clip=False, renormalise=True), tokens, 961, rtsae)
    for change, sign in zip(kept, (1, -1), strict=True):
        torch.testing.assert_close((tokens + change).norm(dim=-1), tokens.norm(dim=-1))
        wanted = tokens + sign * plain
        torch.testing.assert_close(torch.cosine_similarity(tokens + change, wanted, dim=-1), torch.ones(1, 4))
        assert (change[0, 2] == 0).all()


def dense_change(rtsae: SparseDictionary, edit: Edit, h: torch.Tensor, g: int) -> torch.Tensor:
    """What `edit` must add at anchor `g`, from the definition: encode everything, edit, decode the difference."""
    if edit.operation == "erase":
        return dense_erasure(rtsae, edit, h, g)
    z = rtsae.encode(h[:, :, : g + 1].flatten(0, 1)).unflatten(0, h.shape[:2])
    new, strength = z.clone(), torch.tensor(edit.strength)[:, None]
    level = torch.zeros(h.shape[:2])
    if edit.source:
        level = (z[..., edit.source] / rtsae.typical_activation[list(edit.source)]).amax(-1)
    for row, weight in zip(edit.latents, edit.weights, strict=True):
        now, full = z[..., row], weight * rtsae.typical_activation[row]
        new[..., row] = {
            "add": now + strength * full,
            "set": strength * full + 0 * now,
            "scale": strength * now,
            "clamp": torch.minimum(now, strength * full),
            "ablate": (1 - strength * weight) * now,
            "ablate_to_mean": now + strength * (rtsae.mean_activation[row] - now),
            "transfer": now + strength * level * full,
            "replace": torch.where(level > 0, strength * full, now),
        }[edit.operation]
    for row in edit.source or ():
        keep = 1 - strength.clamp(0, 1) if edit.operation == "transfer" else torch.zeros(())
        new[..., row] = keep * z[..., row]
    if edit.clip:
        new = new.clamp(min=0).minimum(torch.maximum(z, rtsae.max_activation))
    change = new - z
    if edit.where:
        change = change * (z[..., list(edit.where)] > 0).any(-1, keepdim=True)
    directions = rtsae.directions(list(range(M)), edit.injection).at(Step(ANCHORS[g], g))
    return (change @ directions).detach()


def dense_erasure(rtsae: SparseDictionary, edit: Edit, h: torch.Tensor, g: int) -> torch.Tensor:
    """The same for an edit that exchanges tokens, one by one: one on which a latent of the edit has been above half of
    its typical activation becomes the mean of those on which none has, as long as they are."""
    codes = [rtsae.encode(h[:, :, : s + 1].flatten(0, 1)).unflatten(0, h.shape[:2]).detach() for s in range(g + 1)]
    half, change = rtsae.typical_activation[list(edit.latents)] / 2, torch.zeros_like(h[:, :, g])
    for picture, strength in enumerate(edit.strength):
        seen = [
            any((z[picture, token, list(edit.latents)] > half).any() for z in codes) for token in range(h.shape[1])
        ]
        free = [token for token, is_seen in enumerate(seen) if not is_seen]
        for token, is_seen in enumerate(seen):
            if edit.where and not (codes[-1][picture, token, list(edit.where)] > 0).any():
                continue
            if is_seen and free:
                others = h[picture, free, g]
                mean = others.mean(0) / others.mean(0).norm() * others.norm(dim=1).mean()
                change[picture, token] = min(max(strength, 0), 1) * (mean - h[picture, token, g])
    return change


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind, seed", [*(("RTSAE", seed) for seed in range(6)), *itertools.product(OTHERS, range(2))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lazy_edits_equal_the_dense_path(operation, kind, seed, dtype):
    rtsae, rng = random_of(kind, seed), torch.Generator().manual_seed(seed)
    rtsae.mean_activation.uniform_(0, 0.3)
    h = torch.randn(2, 5, 5, D, generator=rng).to(dtype).float()  # the activation as the network rounds it
    rows = torch.randperm(M, generator=rng).tolist()
    edit = Edit(
        latents=tuple(rows[:3]), weights=(1.0, 0.5, 0.2), strength=(0.7, 2.5 - seed), operation=operation,
        source=tuple(rows[3:6]) if operation in ("transfer", "replace") else None,
        where=tuple(rows[6:16]) if seed % 2 else None, clip=seed % 3 > 0, apply_to="all",
        injection="residual" if seed % 4 == 0 else "trajectory",
    )  # fmt: skip
    plan, state = SitePlan(rtsae, [edit], ALPHAS), PlanState()
    for g, timestep in enumerate(ANCHORS):
        tokens = h[:, :, g].to(dtype)
        change = plan.conditional(state, tokens, timestep, None)
        other = plan.unconditional(state, 0, tokens, timestep, None)
        expected = dense_change(rtsae, edit, h, g)
        torch.testing.assert_close(change.expand_as(expected), expected, atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(other.expand_as(expected), expected, atol=2e-4, rtol=2e-4)
        for memory in state.memories.values():
            memory.continue_with(tokens)


def test_the_report_counts_edited_tokens_and_wishes_outside_the_training_range():
    rtsae, tokens = random_rtsae(4), torch.randn(1, 4, D)
    for strength, outside in ((1.0, 0.0), (6.0, 1.0), (-1.0, 1.0)):
        plan, state = SitePlan(rtsae, [Edit(latents=(5,), weights=(1.0,), strength=strength)], ALPHAS), PlanState()
        rtsae.threshold.fill_(1e9)  # nothing is active: the present activation is 0
        plan.conditional(state, tokens, 961, None)
        assert [(r["edited"], r["out_of_range"]) for r in state.report] == [(1.0, outside)]


def test_edits_do_not_depend_on_their_order():
    rtsae, tokens = random_rtsae(4), torch.randn(1, 4, D)
    edits = [
        Edit(latents=(1,), weights=(1.0,), strength=1.0),
        Edit(latents=(1, 2), weights=(1.0, 1.0), strength=0.5, operation="scale"),
        Edit(latents=(3,), weights=(1.0,), strength=1.0, operation="transfer", source=(1,)),
    ]
    one, other = (
        SitePlan(rtsae, order, ALPHAS).conditional(PlanState(), tokens, 961, None) for order in (edits, edits[::-1])
    )
    torch.testing.assert_close(one, other)


def many_edits(seed: int) -> list[Edit]:
    """Some that share all their options, and one of every other kind."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 4, 4, generator=rng)
    options = [
        *[{"operation": name} for name, one in OPERATIONS.items() for _ in range(1 if one.exchanges else 2)],
        *[{"clip": False, "strength": 0.3 * i} for i in range(1, 4)],
        {"clip": False, "where": (3, 4, 5)},
        {"clip": False, "mask": mask},
        {"where": (6, 7), "mask": mask, "apply_to": "all"},
        {"operation": "scale", "apply_to": "all", "strength": 0.2},
        {"injection": "residual", "apply_to": "cond"},
        {"start": 0.3, "end": 0.6},
        {"strength": lambda progress: [progress, 1 - progress]},
        {"strength": torch.tensor([0.0, 1.0, 0.5])},
        {"strength": (0.2, 3.0)},
    ]
    edits = []
    for i, chosen in enumerate(options):
        rows = torch.randperm(M, generator=rng)[: 1 + i % 3].tolist()
        chosen = {"strength": 0.8} | chosen
        if chosen.get("operation") in ("transfer", "replace"):
            chosen["source"] = (8, 9)
        edits.append(Edit(latents=tuple(rows), weights=(1.0, -0.5, 0.2)[: len(rows)], **chosen))
    return edits


@pytest.mark.parametrize("kind, seed", [("RTSAE", 0), ("RTSAE", 1), ("SparseAutoencoder", 2), ("TIDE, TopK", 2)])
@pytest.mark.parametrize("channels_first", [False, True])
def test_edits_of_one_plan_add_up(kind, seed, channels_first):
    rtsae, edits = random_of(kind, seed), many_edits(seed)
    rtsae.mean_activation.uniform_(0, 0.3)
    together, run = SitePlan(rtsae, edits, ALPHAS), PlanState()
    alone = [(SitePlan(rtsae, [edit], ALPHAS), PlanState()) for edit in edits]
    for timestep in ANCHORS:
        tokens = torch.randn(2, 4, D)
        tokens = tokens.mT.contiguous().mT if channels_first else tokens
        changes = together.conditional(run, tokens, timestep, (2, 2))
        other = together.unconditional(run, 0, -tokens, timestep, (2, 2))
        expected = [plan.conditional(state, tokens, timestep, (2, 2)) for plan, state in alone]
        expected_other = [plan.unconditional(state, 0, -tokens, timestep, (2, 2)) for plan, state in alone]
        for change, parts in ((changes, expected), (other, expected_other)):
            parts = torch.stack([part.expand(2, 4, D) for part in parts if part is not None])
            torch.testing.assert_close(change.expand(2, 4, D), parts.sum(0), atol=1e-4, rtol=1e-4)
        for state in (run, *(state for _, state in alone)):
            for memory in state.memories.values():
                memory.continue_with(tokens)
    told, expected = (
        sorted((r["timestep"], r["latents"], r["edited"], -1 if r["out_of_range"] is None else r["out_of_range"])
               for r in report)
        for report in (run.report, [row for _, state in alone for row in state.report])
    )  # fmt: skip
    assert told == expected and len({row[2:] for row in told}) > 10


class Operators(TorchDispatchMode):
    """Counts the tensor operations that are run."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options", [{}, {"clip": False}, {"operation": "scale"}, {"operation": "erase"}, {"where": (0, 1)}]
)
def test_edits_that_share_their_options_cost_no_further_operations(options):
    rtsae, tokens, counts = random_rtsae(0), torch.randn(1, 4, D), []
    for number in (2, 15):
        edits = [Edit(latents=(row,), weights=(1.0,), strength=0.5, **options) for row in range(number)]
        plan, state = SitePlan(rtsae, edits, ALPHAS), PlanState()
        plan.conditional(state, tokens, 961, None)  # the first step prepares
        with Operators() as operators:
            plan.conditional(state, tokens, 961, None)
        counts.append(operators.count)
    assert counts[0] == counts[1] > 0


def test_contrast_is_taken_from_the_conditional_rows_of_the_same_step():
    rtsae, tokens = random_rtsae(4), torch.randn(1, 4, D)
    plan, state = SitePlan(rtsae, [Edit(latents=(1,), weights=(1.0,), strength=1.0)], ALPHAS), PlanState()
    change = plan.conditional(state, tokens, 961, None)
    torch.testing.assert_close(plan.unconditional(state, 0, torch.randn(1, 4, D), 961, None), -change)
    torch.testing.assert_close(plan.perturbed(state, 961), change)
    with pytest.raises(ValueError, match="apply_to='cond'"):
        plan.unconditional(state, 0, tokens, 721, None)


def test_rows_that_hold_nan_are_refused():
    rtsae = random_rtsae(4)
    rtsae.decoder.data[7, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"holds NaN or inf in rows \[7\]"):
        plan_delta(Edit(latents=(7,), weights=(1.0,), strength=1.0), torch.randn(1, 4, D), 961, rtsae)
    plan_delta(Edit(latents=(6,), weights=(1.0,), strength=1.0), torch.randn(1, 4, D), 961, rtsae)


def test_outside_its_window_an_edit_does_nothing():
    edit = Edit(latents=(5,), weights=(1.0,), strength=1.0, start=0.5)
    assert plan_delta(edit, torch.randn(1, 4, D), 961, random_rtsae(6)) == (None, None)
