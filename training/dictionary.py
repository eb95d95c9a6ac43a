"""One dictionary in training: its architecture, its optimizer, one step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from diffusers_rtsae import RTSAE
from diffusers_rtsae.models import LinearDynamics

from .processes import ALONE, Processes
from .recipe import Recipe, Train
from .sparse import Code, above, batch_topk, decode, encode, topk

ARCHITECTURES: dict[str, type[BatchTopK]] = {}


def register(architecture: type[BatchTopK]) -> type[BatchTopK]:
    """Make an architecture known to recipes, as its `name`."""
    ARCHITECTURES[architecture.name] = architecture
    return architecture


@register
class BatchTopK:
    """The rows of a batch share a budget of `k` latents each (2412.06410)."""

    name = "batch_topk"
    shares_budget = True  # of the batch: on unseen data one threshold must stand for it

    def __init__(self, settings: Train, device: torch.device | str, processes: Processes):
        self.k, self.processes = settings.k, processes
        self.dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]

    def start(self, centred: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """Take note of a sample as the first encoder sees it."""

    def parameters(self) -> dict[str, torch.Tensor]:
        """What is learned beside the dictionary."""
        return {}

    def state(self) -> dict[str, torch.Tensor]:
        """What else a checkpoint must hold."""
        return {}

    def encode(self, centred, centre, weight, bias) -> Code:
        code = batch_topk(centred, weight, bias, self.k, self.dtype, self.processes)
        return encode(centred, centre, weight, bias, code)

    def loss(self, target: torch.Tensor, code: Code, weight: torch.Tensor, centre: torch.Tensor):
        """What is minimised, the mean squared error, and the reconstruction `(rows, d)`."""
        reconstruction = decode(code, weight, len(target), self.processes) + centre
        error = F.mse_loss(reconstruction, target)
        return error, error, reconstruction

    def finish(self, rtsae: RTSAE) -> None:
        """Bring a trained dictionary into the form that one threshold serves."""


@register
class TopK(BatchTopK):
    """Every row has the same number of latents (2406.04093)."""

    name = "topk"
    shares_budget = False

    def encode(self, centred, centre, weight, bias) -> Code:
        code = topk(centred, weight, bias, self.k, self.dtype, self.processes)
        return encode(centred, centre, weight, bias, code)


@register
class Matryoshka(BatchTopK):
    """BatchTopK whose first latents must reconstruct alone, at each of the nested sizes (2503.17547)."""

    name = "matryoshka"

    def __init__(self, settings: Train, device: torch.device | str, processes: Processes):
        super().__init__(settings, device, processes)
        self.sizes = sorted({max(1, round(share * settings.num_latents)) for share in [*settings.nested, 1]})

    def loss(self, target, code, weight, centre):
        reconstruction, losses, start, first = centre, [], 0, self.processes.start(self.sizes[-1])
        for size in self.sizes:
            part = code.where((code.latents >= start - first) & (code.latents < size - first))
            reconstruction = decode(part, weight, len(target), self.processes) + reconstruction
            losses.append(F.mse_loss(reconstruction, target))
            start = size
        return torch.stack(losses).mean(), losses[-1], reconstruction


class _Step(torch.autograd.Function):
    """`value * (value > threshold)` and `value > threshold`, with the pseudo-derivatives of 2407.14435, section 3."""

    @staticmethod
    def forward(ctx, values, thresholds, bandwidth):
        active = (values > thresholds).float()
        ctx.save_for_backward(values, thresholds, active)
        ctx.bandwidth = bandwidth
        return values * active, active

    @staticmethod
    def backward(ctx, on_values, on_active):
        values, thresholds, active = ctx.saved_tensors
        near = ((values - thresholds).abs() < ctx.bandwidth / 2).float() / ctx.bandwidth
        return on_values * active, -near * (thresholds * on_values + on_active), None


@register
class JumpReLU(BatchTopK):
    """A learned threshold for each latent, pulled to `k` active ones by a penalty on L0 (2407.14435)."""

    name = "jump_relu"
    shares_budget = False

    def __init__(self, settings: Train, device: torch.device | str, processes: Processes):
        super().__init__(settings, device, processes)
        self.bandwidth, self.penalty = torch.tensor(settings.bandwidth, device=device), settings.penalty
        self.log_threshold = torch.zeros(settings.num_latents, device=device).requires_grad_()

    @torch.no_grad()
    def start(self, centred, weight, bias):
        first = batch_topk(centred, weight, bias, self.k).values.min()
        self.log_threshold.fill_(first.log())
        self.bandwidth.mul_(first)

    def parameters(self):
        return {"log_threshold": self.log_threshold}

    def state(self):
        return {"bandwidth": self.bandwidth}

    def encode(self, centred, centre, weight, bias):
        threshold = self.log_threshold.exp()
        near = above(centred, weight, bias, threshold.detach() - self.bandwidth / 2, self.dtype)
        code = encode(centred, centre, weight, bias, near)
        values, active = _Step.apply(code.values, threshold[code.latents], self.bandwidth)
        self.active = self.processes.sum(active.sum()) / len(centred)
        return code._replace(values=values)

    def loss(self, target, code, weight, centre):
        _, error, reconstruction = super().loss(target, code, weight, centre)
        return error + self.penalty * (self.active / self.k - 1).square(), error, reconstruction

    @torch.no_grad()
    def finish(self, rtsae):
        # a latent measured in units of its own threshold: then all have the threshold 1
        unit = self.log_threshold.exp().to(rtsae.encoder.device)
        rtsae.encoder.div_(unit[:, None, None])
        rtsae.encoder_bias.div_(unit)
        rtsae.decoder.mul_(unit[:, None, None])


def geometric_median(points: torch.Tensor, iterations: int = 20) -> torch.Tensor:
    """Geometric median of `points (n, d)` (Weiszfeld)."""
    median = points.mean(0)
    for _ in range(iterations):
        weight = 1 / (points - median).norm(dim=1).clamp(min=1e-6)
        median = (points * weight[:, None]).sum(0) / weight.sum()
    return median


def auxiliary_loss(
    rtsae: RTSAE,
    error: torch.Tensor,
    centred: torch.Tensor,
    dead: torch.Tensor,
    k: int,
    processes: Processes = ALONE,
) -> torch.Tensor:
    """AuxK (2406.04093, appendix A.2): the `k` largest dead latents of each row reconstruct the `error`."""
    weight, bias = rtsae.encoder[dead].flatten(1)[:, : centred.shape[1]], rtsae.encoder_bias[dead]
    centre = torch.zeros(centred.shape[1], device=centred.device)  # what is centred already moves nothing
    code = encode(centred, centre, weight, bias, topk(centred, weight, bias, k, processes=processes))
    guess = decode(code, rtsae.decoder[dead].flatten(1), len(error), processes)
    return F.mse_loss(guess, error) / error.square().mean()


def _pieces(matrix: torch.Tensor) -> Sequence[torch.Tensor]:
    """Views `(rows, entries)` of a matrix of latents: on a CPU of as many rows as stay in its cache."""
    flat = matrix.detach().flatten(1)
    return flat.split(max(1, 2**17 // flat.shape[1]) if matrix.device.type == "cpu" else len(flat))


class DictionaryTrainer:
    """
    A dictionary with its optimizer; of several processes each trains its share of the latents, on the same rows.

    Args:
        rtsae (`RTSAE`): the whole, moved to `device`; until `finish` this process' share is left of it.
        settings (`Train`): the recipe's. With `layout` `"per_step"` each latent sees and writes one anchor only.
        sample (`torch.Tensor`): residuals `(rows, G, d)` whose median is the first bias.

    Raises:
        `ValueError`: if the architecture is unknown.
    """

    def __init__(
        self,
        rtsae: RTSAE,
        settings: Train,
        sample: torch.Tensor,
        device: torch.device | str,
        processes: Processes = ALONE,
    ):
        self.rtsae, self.settings, self.processes = rtsae.to(device), settings, processes
        if settings.architecture not in ARCHITECTURES:
            raise ValueError(f"Unknown `architecture` {settings.architecture!r}, there are {sorted(ARCHITECTURES)}.")
        self.architecture = ARCHITECTURES[settings.architecture](settings, device, processes)
        self.blocks = None
        m, anchors, d = rtsae.decoder.shape
        with torch.no_grad():
            rtsae.decoder_bias.copy_(geometric_median(sample.flatten(1).to(device)).view_as(rtsae.decoder_bias))
            if settings.layout == "per_step":
                own = torch.arange(m, device=device) * anchors // m
                self.blocks = F.one_hot(own, anchors)[:, :, None].to(rtsae.decoder.dtype)
                rtsae.decoder.mul_(self.blocks)
                self._normalise()
                rtsae.encoder.copy_(rtsae.decoder)
            centred = (sample.to(device) - rtsae.decoder_bias).flatten(1)
            self.architecture.start(centred, rtsae.encoder.flatten(1), rtsae.encoder_bias)
        self.parameters = dict(rtsae.named_parameters()) | self.architecture.parameters()
        self.shares = {name: value for name, value in self.parameters.items() if name != "decoder_bias"}
        for parameter in self.shares.values():
            parameter.data = processes.share(parameter.data).clone()
        if self.blocks is not None:
            self.blocks = processes.share(self.blocks)
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=settings.learning_rate, fused=True)
        # trajectories since each latent fired
        self.quiet = torch.zeros(len(rtsae.encoder), dtype=torch.long, device=device)
        self.threshold = torch.zeros(1, device=device)  # running mean of the smallest value that a batch kept
        self.done = 0

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint must hold beside the optimizer."""
        return self.parameters | {"quiet": self.quiet, "threshold": self.threshold} | self.architecture.state()

    @property
    def dead(self) -> torch.Tensor:
        """Which of this process' latents have not fired for long."""
        return self.quiet > self.settings.dead_after

    @torch.no_grad()
    def _normalise(self) -> None:
        for rows in _pieces(self.rtsae.decoder):
            rows.div_(rows.norm(dim=1, keepdim=True).clamp(min=1e-8))

    def backward(self, residuals: torch.Tensor, prefix: int | None, share: float = 1.0) -> dict[str, float]:
        """
        Add the gradients of normalised `residuals (rows, G, d)`, of which the encoder sees the first `prefix`.

        Args:
            share (`float`): of the batch that these rows are.

        Returns:
            `dict`: FVU of the residuals (per unit of their normalised variance) and L0.
        """
        rtsae, centre = self.rtsae, self.rtsae.decoder_bias.flatten()
        if self.processes.rank > 0:
            centre = centre.detach()  # the first one's gradient counts: `update` sums them
        target, code, centred = self._encode(residuals, prefix)
        loss, fvu, reconstruction = self.architecture.loss(target, code, rtsae.decoder.flatten(1), centre)
        if prefix is None and (dead := self.processes.sum(self.dead.sum()).item()):
            k, chosen = min(residuals.shape[2] // 2, dead), self.dead.nonzero()[:, 0]
            error = target - reconstruction.detach()
            auxiliary = auxiliary_loss(rtsae, error, centred, chosen, k, self.processes)
            loss = loss + self.settings.auxiliary * auxiliary
        (loss * share).backward()
        active = code.values.detach() > 0
        self.quiet += len(residuals)
        self.quiet[code.latents[active]] = 0
        lowest = code.values.detach().min() if len(active) else target.new_tensor(torch.inf)
        told = self.processes.gather(torch.stack([active.sum(), lowest]))
        lowest = told[:, 1].min()
        if prefix is None and lowest.isfinite():
            self.threshold.lerp_(lowest, 0.02 if self.threshold > 0 else 1.0)
        l0 = told[:, 0].sum().item() / len(residuals)
        return {"loss": loss.item(), "fvu": fvu.item(), "l0": l0}

    def _encode(self, residuals: torch.Tensor, prefix: int | None) -> tuple[torch.Tensor, Code, torch.Tensor]:
        """The target, its code, and what the encoder was shown of it, centred."""
        shown, target = slice(None) if prefix is None else slice(prefix * residuals.shape[2]), residuals.flatten(1)
        centre, weight = self.rtsae.decoder_bias.flatten(), self.rtsae.encoder.flatten(1)[:, shown]
        centred = target[:, shown] - centre[shown].detach()
        return target, self.architecture.encode(centred, centre[shown], weight, self.rtsae.encoder_bias), centred

    @torch.no_grad()
    def measure(self, residuals: torch.Tensor) -> dict[str, float]:
        """FVU and L0 of held-out normalised `residuals (rows, G, d)`, and the share of dead latents."""
        target, code, centred = self._encode(residuals, None)
        _, fvu, _ = self.architecture.loss(
            target, code, self.rtsae.decoder.flatten(1), self.rtsae.decoder_bias.flatten()
        )
        if self.architecture.shares_budget:
            code = above(centred, self.rtsae.encoder.flatten(1), self.rtsae.encoder_bias, self.threshold)
        l0 = self.processes.sum((code.values > 0).sum()).item() / len(residuals)
        dead = self.processes.sum(self.dead.sum()).item() / self.settings.num_latents
        return {"fvu_validation": fvu.item(), "l0_validation": l0, "dead": dead}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """One step of the optimizer; the decoder moves on the unit sphere."""
        settings, decoder = self.settings, self.rtsae.decoder
        rate = min(1.0, (step + 1) / 100, 5 * (settings.steps - step) / settings.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        if self.blocks is not None:
            decoder.grad.mul_(self.blocks)
            self.rtsae.encoder.grad.mul_(self.blocks)
        for row, gradient in zip(_pieces(decoder), _pieces(decoder.grad), strict=True):
            gradient.addcmul_(row, (gradient * row).sum(1, keepdim=True), value=-1)
        # gradients of norm 1 at every step: the large ones of the beginning would make Adam's steps small for long
        bias, own = self.rtsae.decoder_bias, [parameter.grad for parameter in self.shares.values()]
        summed = self.processes.sum(torch.cat([bias.grad.flatten(), nn.utils.get_total_norm(own).square()[None]]))
        bias.grad = summed[:-1].view_as(bias)
        norm = torch.cat([summed[:-1].square(), summed[-1:]]).sum().sqrt()
        self.optimizer.grad_scale = norm.clamp(min=1e-12)  # which the fused step divides by
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._normalise()
        self.done = step + 1

    def finish(self) -> RTSAE:
        """The whole, rounded as it will be stored; its thresholds and statistics are still to be measured."""
        self.architecture.finish(self.rtsae)
        for parameter in (self.rtsae.encoder, self.rtsae.encoder_bias, self.rtsae.decoder):
            parameter.data = self.processes.whole(parameter.data, self.settings.num_latents)
        for tensor in (self.rtsae.encoder, self.rtsae.decoder):
            tensor.data = tensor.data.half().float()
        return self.rtsae


def new_dictionary(site: str, anchors: list[int], recipe: Recipe, dynamics: LinearDynamics) -> RTSAE:
    """An untrained dictionary on the given dynamics."""
    torch.manual_seed(recipe.seed)
    shape = dynamics.mean.shape[1], anchors, recipe.train.num_latents, recipe.train.k, recipe.activation
    rtsae = RTSAE(site, *shape)
    rtsae.dynamics.load_state_dict(dynamics.state_dict())
    return rtsae


@torch.no_grad()
def residual_code(rtsae: RTSAE, residuals: torch.Tensor, k: int) -> Code:
    """BatchTopK code of (the beginning of) normalised residuals `(rows, g, d)`."""
    shown = (residuals - rtsae.decoder_bias[: residuals.shape[1]]).flatten(1)
    return batch_topk(shown, rtsae.encoder.flatten(1)[:, : shown.shape[1]].float(), rtsae.encoder_bias.float(), k)


@torch.no_grad()
def calibrate(rtsae: RTSAE, trajectories: torch.Tensor, k: int, layout: str = "concatenated") -> None:
    """Set each prefix' threshold so that k latents are active on average on `trajectories (tokens, G, d)`."""
    residuals = rtsae.dynamics.residuals(trajectories)
    for g in range(residuals.shape[1]):
        code = residual_code(rtsae, residuals[:, : g + 1], k)
        if len(code.values) == k * len(residuals):
            lowest = code.values.min()
            rtsae.threshold[g] = torch.nextafter(lowest, torch.zeros_like(lowest))
        else:
            rtsae.threshold[g] = 0.0
    if layout == "per_step":  # at an anchor only its own latents can be active: one threshold for all
        rtsae.threshold.fill_(rtsae.threshold[-1])


@torch.no_grad()
def measure_activations(rtsae: RTSAE, trajectories: Iterable[torch.Tensor]) -> None:
    """Set the statistics of each latent's activation on pieces of trajectories `(tokens, G, d)`."""
    columns, values, count = [], [], 0
    for part in trajectories:
        latents = rtsae.encode(part.to(rtsae.encoder.device))
        at = latents.nonzero()
        columns.append(at[:, 1].cpu())
        values.append(latents[at[:, 0], at[:, 1]].cpu())
        count += len(part)
    columns, values = torch.cat(columns), torch.cat(values)
    order = torch.argsort(values)
    order = order[torch.argsort(columns[order], stable=True)]  # by latent, each ascending
    sizes = torch.bincount(columns, minlength=rtsae.config.num_latents)
    for j, active in enumerate(values[order].split(sizes.tolist())):
        rtsae.density[j] = len(active) / count
        rtsae.mean_activation[j] = active.sum() / count
        rtsae.typical_activation[j] = active[int(0.99 * (len(active) - 1))] if len(active) else 1.0
        rtsae.max_activation[j] = active[-1] if len(active) else 1.0
