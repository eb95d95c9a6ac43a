"""Train the dictionary of a recipe: collect, fit, train, evaluate, save.

    python -m training.train training/recipes/shapes.yaml --out examples/shapes-rtsae

Every stage continues where it was stopped; a GPU is used if there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from diffusers import DiffusionPipeline
from tqdm import tqdm

from diffusers_rtsae import RTSAE, Dictionary, load_dictionary
from diffusers_rtsae.analysis.scorer import FactorScorer
from diffusers_rtsae.hub import CONFIG_NAME, LABELS_NAME, signature, write_json
from diffusers_rtsae.models import LinearDynamics

from .checkpoint import load_checkpoint, save_checkpoint, step_generator
from .collect import anchor_timesteps, collect, read_prompts
from .evaluate import evaluate
from .fit import fit_dynamics
from .store import TrajectoryStore

STATISTICS_TOKENS = 200_000  # whose activations make the statistics of the latents


def geometric_median(points: torch.Tensor, iterations: int = 20) -> torch.Tensor:
    """Geometric median of `points (n, d)` (Weiszfeld)."""
    median = points.mean(0)
    for _ in range(iterations):
        weight = 1 / (points - median).norm(dim=1).clamp(min=1e-6)
        median = (points * weight[:, None]).sum(0) / weight.sum()
    return median


def auxiliary_loss(
    rtsae: RTSAE, error: torch.Tensor, pre_activations: torch.Tensor, dead: torch.Tensor, k: int
) -> torch.Tensor:
    """AuxK (2406.04093, appendix A.2): dead latents reconstruct the detached error `u − û` of the living."""
    columns = dead.nonzero()[:, 0]
    values, chosen = pre_activations[:, columns].topk(min(k, len(columns)), dim=1)
    code = torch.zeros(len(error), len(columns), device=error.device).scatter(1, chosen, values.relu())
    guess = (code @ rtsae.decoder[columns].flatten(1)).unflatten(1, error.shape[1:])
    return F.mse_loss(guess, error.detach()) / error.detach().square().mean()


@torch.no_grad()
def calibrate(rtsae: RTSAE, trajectories: torch.Tensor, k: int) -> None:
    """Set each prefix' threshold so that k latents are active on average."""
    residuals = rtsae.dynamics.residuals(trajectories)
    for g in range(residuals.shape[1]):
        pre_activations = rtsae.pre_activations(residuals[:, : g + 1])
        kept = pre_activations.relu().flatten().topk(k * len(residuals) + 1).values
        rtsae.threshold[g] = kept[-1].clamp(min=0)


@torch.no_grad()
def measure_activations(rtsae: RTSAE, trajectories: torch.Tensor, batch: int = 4096) -> None:
    """Set the statistics of each latent's activation on `trajectories (tokens, G, d)`."""
    device, columns, values = rtsae.encoder.device, [], []
    for part in trajectories.split(batch):
        latents = rtsae.encode(part.to(device))
        at = latents.nonzero()
        columns.append(at[:, 1].cpu())
        values.append(latents[at[:, 0], at[:, 1]].cpu())
    columns, values = torch.cat(columns), torch.cat(values)
    order = torch.argsort(values)
    order = order[torch.argsort(columns[order], stable=True)]  # by latent, each ascending
    for j, active in enumerate(
        values[order].split(torch.bincount(columns, minlength=rtsae.config.num_latents).tolist())
    ):
        rtsae.density[j] = len(active) / len(trajectories)
        rtsae.mean_activation[j] = active.sum() / len(trajectories)
        rtsae.typical_activation[j] = active[int(0.99 * (len(active) - 1))] if len(active) else 1.0
        rtsae.max_activation[j] = active[-1] if len(active) else 1.0


def train_site(
    recipe: dict,
    site: str,
    anchors: list[int],
    data: torch.Tensor,
    unseen: torch.Tensor,
    dynamics: LinearDynamics,
    work: Path,
    device: str,
    collected: str,
) -> RTSAE:
    """Train the dictionary of one site on `data (tokens, G, d)` float16, set its thresholds on `unseen`, as many more
    float16 trajectories; `collected` says how these came about."""
    settings, seed = recipe["train"], recipe["seed"]
    torch.manual_seed(seed)
    rtsae = RTSAE(site, data.shape[2], anchors, settings["num_latents"], settings["k"])
    rtsae.dynamics.load_state_dict(dynamics.state_dict())
    rtsae.to(device)
    with torch.no_grad():
        sample = rtsae.dynamics.residuals(data[:8192].float().to(device))
        rtsae.decoder_bias.copy_(geometric_median(sample.flatten(1)).view_as(rtsae.decoder_bias))
    parameters = dict(rtsae.named_parameters())
    optimizer = torch.optim.Adam(parameters.values(), lr=settings["learning_rate"], fused=True)
    quiet = torch.zeros(
        settings["num_latents"], dtype=torch.long, device=device
    )  # trajectories since each latent fired
    state = parameters | {"quiet": quiet}
    checkpoint, mark = work / f"{site}.safetensors", json.dumps([collected, recipe["fit"], settings], sort_keys=True)
    done, steps, size = load_checkpoint(checkpoint, state, optimizer, mark), settings["steps"], settings["batch_size"]
    progress = tqdm(range(done, steps), initial=done, total=steps, desc=f"train {site}", unit="step", mininterval=5)
    for step in progress:
        generator = step_generator(seed, step)
        rate = min(1.0, (step + 1) / 100, 5 * (steps - step) / steps)
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * rate
        batch = data[torch.randint(len(data), (size,), generator=generator)].to(device).float()
        prefix = None
        if torch.rand((), generator=generator) < settings["prefix"]:
            prefix = int(torch.randint(1, len(anchors), (), generator=generator))
        latents, residuals, reconstruction = rtsae(batch, train_k=settings["k"], prefix=prefix)
        error = residuals - reconstruction
        loss = error.square().mean()
        dead = quiet > settings["dead_after"]
        if dead.any() and prefix is None:
            pre_activations = rtsae.pre_activations(residuals)
            loss = loss + settings["auxiliary"] * auxiliary_loss(
                rtsae, error, pre_activations, dead, k=data.shape[2] // 2
            )
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():  # the decoder moves on the unit sphere
            flat, gradient = rtsae.decoder.flatten(1), rtsae.decoder.grad.flatten(1)
            gradient -= (gradient * flat).sum(1, keepdim=True) * flat
            torch.nn.utils.clip_grad_norm_(rtsae.parameters(), 1.0)
            optimizer.step()
            rtsae.decoder.div_(rtsae.decoder.flatten(1).norm(dim=1).clamp(min=1e-8)[:, None, None])
            quiet += size
            quiet[(latents > 0).any(0)] = 0
        if step % 50 == 0:
            progress.set_postfix(fvu=f"{error.square().mean().item():.3f}", dead=f"{dead.float().mean().item():.1%}")
        if not torch.isfinite(loss):
            raise ValueError(
                f"The loss is {loss.item()} at step {step}. Lower `learning_rate` and delete {checkpoint}."
            )
        if (step + 1) % settings["checkpoint_every"] == 0 or step + 1 == steps:
            save_checkpoint(checkpoint, step + 1, state, optimizer, mark)
    for tensor in (rtsae.encoder, rtsae.decoder):  # rounded as it will be stored, then calibrated
        tensor.data = tensor.data.half().float()
    sample = torch.randperm(len(unseen), generator=step_generator(seed, steps))[:16384]
    calibrate(rtsae, unseen[sample].float().to(device), settings["k"])
    measure_activations(rtsae, data[:STATISTICS_TOKENS])
    return rtsae.cpu()


def open_store(recipe: dict, work: Path, anchors: list[int], pipe: DiffusionPipeline) -> TrajectoryStore:
    """The trajectories of a recipe's run."""
    made_with = {name: recipe[name] for name in ("pipeline", "sites", "seed", "collect")} | {"anchors": anchors}
    return TrajectoryStore(
        work / "trajectories", json.dumps(made_with | {"weights": weights_hash(pipe.unet)}, sort_keys=True)
    )


def weights_hash(module: torch.nn.Module) -> str:
    """A short hash of a module's weights: a path does not say what lies there."""
    digest = hashlib.blake2b(digest_size=8)
    for parameter in module.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the dictionary")
    parser.add_argument("--work", type=Path, help="shards and checkpoints; runs/<name of the recipe> by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    recipe = yaml.safe_load(arguments.recipe.read_text())
    work = arguments.work or Path("runs") / arguments.recipe.stem
    run(recipe, arguments.out, work, arguments.device)


def run(recipe: dict, out: Path, work: Path, device: str) -> Dictionary:
    """All stages of a recipe; returns the dictionary it saved to `out`, without labels."""
    pipe = DiffusionPipeline.from_pretrained(recipe["pipeline"]).to(device)
    pipe.set_progress_bar_config(disable=True)
    scorer = FactorScorer.from_pretrained(recipe["scorer"]).to(device) if recipe.get("scorer") else None
    anchors = anchor_timesteps(pipe, recipe["collect"]["steps"], recipe["anchors"])
    store = open_store(recipe, work, anchors, pipe)
    prompts = read_prompts(recipe["collect"]["prompts"], recipe["collect"]["count"], recipe["seed"])
    collect(pipe, prompts, recipe["sites"], anchors, store, recipe["collect"], recipe["seed"], scorer)

    shards = store.shards()
    held_out = max(1, round(recipe["train"]["validation"] * len(shards)))
    sites, report = {}, {}
    for site in recipe["sites"]:
        dynamics, fitted = fit_dynamics(
            (store.load(shard, site) for shard in shards[:-held_out]),
            (store.load(shard, site) for shard in shards[-held_out:]), **recipe["fit"],
        )  # fmt: skip
        print(f"{site}: R² of the predictors {fitted['r2']}")
        data = torch.cat([store.load(shard, site) for shard in shards[:-held_out]])
        unseen, validation = torch.cat([store.load(shard, site) for shard in shards[-held_out:]]).chunk(2)
        sites[site] = train_site(recipe, site, anchors, data, unseen, dynamics, work, device, store.fingerprint)
        report[site] = fitted | evaluate(sites[site], validation.float(), recipe["train"]["k"])
        print(json.dumps(report[site], indent=2))
    config = {
        "base_model": recipe["base_model"], "license": recipe.get("license", "unknown"),
        "signature": signature(pipe.unet), "anchors": anchors, "recipe": recipe,
        "prediction_type": pipe.scheduler.config.prediction_type, "sampler": "DDIM", "metrics": report,
    }  # fmt: skip
    labels = json.loads((out / LABELS_NAME).read_text()) if _unchanged(sites, out) else {}
    dictionary = Dictionary(sites, labels, config)
    dictionary.save(out)
    write_json(out / "metrics.json", report)
    return dictionary


def _unchanged(sites: dict[str, RTSAE], folder: Path) -> bool:
    """Whether `folder` holds these very dictionaries, so that its labels still hold."""
    if not (folder / CONFIG_NAME).exists() or not (folder / LABELS_NAME).exists():
        return False
    try:
        before = load_dictionary(folder).sites
    except (OSError, ValueError):  # of another version, or damaged: about to be replaced
        return False
    same = before.keys() == sites.keys()
    return same and all(torch.equal(before[site].encoder.half(), sites[site].encoder.half()) for site in sites)


if __name__ == "__main__":
    main()
