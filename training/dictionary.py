"""One dictionary in training: its architecture, its optimizer, one step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from diffusers_rtsae import RTSAE, TIDE, MixtureSAE, SparseAutoencoder, SparseDictionary
from diffusers_rtsae.analysis.statistics import set_statistics
from diffusers_rtsae.models import METADATA, LinearDynamics, Step

from .processes import ALONE, Processes
from .recipe import Recipe, Train
from .sparse import Code, Gates, above, batch_topk, decode, encode, most_above, topk
from .store import NOWHERE

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
    draws = False  # something at random

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

    def encode(self, centred, centre, weight, bias, gates: Gates | None, training: bool) -> Code:
        code = batch_topk(centred, weight, bias, self.k, self.dtype, self.processes, gates)
        return encode(centred, centre, weight, bias, code, gates)

    def loss(
        self, target: torch.Tensor, code: Code, weight: torch.Tensor, centre: torch.Tensor, unit: torch.Tensor | None
    ):
        """What is minimised, the mean squared error in `unit`, and the reconstruction `(rows, d)`."""
        reconstruction = decode(code, weight, len(target), self.processes) + centre
        error = _missed(reconstruction, target, unit)
        return error, error, reconstruction

    def finish(self, sae: SparseDictionary) -> None:
        """Bring a trained dictionary into the form that one threshold serves."""


@register
class TopK(BatchTopK):
    """Every row has the same number of latents (2406.04093)."""

    name = "topk"
    shares_budget = False

    def encode(self, centred, centre, weight, bias, gates, training) -> Code:
        code = topk(centred, weight, bias, self.k, self.dtype, self.processes, gates)
        return encode(centred, centre, weight, bias, code, gates)


@register
class Matryoshka(BatchTopK):
    """BatchTopK whose first latents must reconstruct alone, at each of the nested sizes (2503.17547)."""

    name = "matryoshka"

    def __init__(self, settings: Train, device: torch.device | str, processes: Processes):
        super().__init__(settings, device, processes)
        self.sizes = sorted({max(1, round(share * settings.num_latents)) for share in [*settings.nested, 1]})

    def loss(self, target, code, weight, centre, unit):
        reconstruction, losses, start, first = centre, [], 0, self.processes.start(self.sizes[-1])
        for size in self.sizes:
            part = code.where((code.latents >= start - first) & (code.latents < size - first))
            reconstruction = decode(part, weight, len(target), self.processes) + reconstruction
            losses.append(_missed(reconstruction, target, unit))
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
    """
    A learned threshold for each latent, pulled to `k` active ones by a penalty on L0 (2407.14435). The penalty has
    work to do where many more are active: of a batch, up to `8 k` a row are looked at, those most above it.
    """

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

    def encode(self, centred, centre, weight, bias, gates, training):
        threshold = self.log_threshold.exp()
        least, most = threshold.detach() - self.bandwidth / 2, _ROOM * self.k * len(centred)
        near = most_above(centred, weight, bias, least, most, self.dtype, gates)
        threshold = threshold[near.latents]
        if gates is not None:  # what is behind a closed gate has no threshold to exceed
            is_open = gates.of(near) > 0
            near, threshold = near.where(is_open), threshold.masked_fill(~is_open, torch.inf)
        code = encode(centred, centre, weight, bias, near, gates)
        values, active = _Step.apply(code.values, threshold, self.bandwidth)
        self.active = self.processes.sum(active.sum()) / len(centred)
        return code._replace(values=values)

    def loss(self, target, code, weight, centre, unit):
        _, error, reconstruction = super().loss(target, code, weight, centre, unit)
        return error + self.penalty * (self.active / self.k - 1).square(), error, reconstruction

    @torch.no_grad()
    def finish(self, sae):
        # a latent measured in units of its own threshold: then all have the threshold 1
        unit = self.log_threshold.exp().to(sae.encoder.device)
        sae.encoder.flatten(1).div_(unit[:, None])
        sae.encoder_bias.div_(unit)
        sae.decoder.flatten(1).mul_(unit[:, None])


@register
class AdaptiveMasking(BatchTopK):
    """
    BatchTopK among latents that take part by how important they are (adaptive temporal masking, 2510.08855; the time
    is that of training). Running means of a latent's magnitude, frequency and contribution to the reconstruction make
    its importance; below θ = mean + `mask_above` · std of all it is left out of a step with the chance
    1 − exp(−`mask_rate` (θ − importance) / θ).

    How the three make the importance is ours: `importance: mean` of them, each in units of its mean over the latents,
    or their `product`, its cube root.
    """

    name = "atm"
    draws = True

    def __init__(self, settings: Train, device: torch.device | str, processes: Processes):
        super().__init__(settings, device, processes)
        self.settings, self.noting = settings, False
        # magnitude where active, frequency, and by how much it lessens the squared error
        self.running = processes.share(torch.zeros(settings.num_latents, 3, device=device)).clone()
        self.seen = torch.zeros(1)  # batches; on the host, which must know

    def state(self):
        return {"running": self.running, "seen": self.seen}

    def chance(self) -> torch.Tensor:
        """Of each of this process' latents, to be left out."""
        count, least = self.settings.num_latents, torch.finfo(torch.float32).tiny
        mean = self.processes.sum(self.running.sum(0)) / count
        parts = self.running / mean.clamp(min=least)
        importance = parts.mean(1) if self.settings.importance == "mean" else parts.prod(1).pow(1 / 3)
        moments = torch.stack([importance.sum(), importance.square().sum()])
        first, second = self.processes.sum(moments) / count
        threshold = first + self.settings.mask_above * (second - first.square()).clamp(min=0).sqrt()
        below = (threshold - importance).clamp(min=0) / threshold.clamp(min=least)
        return 1 - torch.exp(-self.settings.mask_rate * below)

    def encode(self, centred, centre, weight, bias, gates, training):
        self.noting, taking_part = training, bias
        if training and self.seen >= _MEMORY:
            drawn = torch.rand(self.settings.num_latents, device=bias.device)
            masked = self.processes.share(drawn) < self.chance()
            taking_part = bias.detach().masked_fill(masked, torch.finfo(self.dtype).min / 2)
        code = batch_topk(centred, weight, taking_part, self.k, self.dtype, self.processes, gates)
        return encode(centred, centre, weight, bias, code, gates)

    def loss(self, target, code, weight, centre, unit):
        loss, error, reconstruction = super().loss(target, code, weight, centre, unit)
        if self.noting:
            self._note(code, weight, target - reconstruction)
        return loss, error, reconstruction

    @torch.no_grad()
    def _note(self, code: Code, weight: torch.Tensor, left: torch.Tensor) -> None:
        """Take note of a batch and of the error `(rows, d)` that is left."""
        active = code.where(code.values > 0)
        size = max(1, 2**24 // left.shape[1])
        pieces = zip(active.rows.split(size), active.latents.split(size), strict=True)
        along = torch.cat([(left[rows] * weight[latents]).sum(1) for rows, latents in pieces])
        lessened = active.values * (2 * along + active.values)  # decoder rows have length 1
        sums = torch.zeros_like(self.running)
        found = torch.stack([active.values, (active.values > 0).float(), lessened], 1)
        sums.index_add_(0, active.latents, found)
        fired, share = sums[:, 1:2], 1 / min(self.seen.item() + 1, _MEMORY)
        there = torch.cat([sums[:, :1] / fired.clamp(min=1), sums[:, 1:] / len(left)], 1)
        there[:, :1] = torch.where(fired > 0, there[:, :1], self.running[:, :1])
        self.running.lerp_(there.clamp(min=0), share)
        self.seen += 1


def geometric_median(points: torch.Tensor, iterations: int = 20) -> torch.Tensor:
    """Geometric median of `points (n, d)` (Weiszfeld)."""
    median = points.mean(0)
    for _ in range(iterations):
        weight = 1 / (points - median).norm(dim=1).clamp(min=1e-6)
        median = (points * weight[:, None]).sum(0) / weight.sum()
    return median


def _missed(reconstruction: torch.Tensor, target: torch.Tensor, unit: torch.Tensor | None) -> torch.Tensor:
    """The mean squared error in `unit`."""
    if unit is None:
        return F.mse_loss(reconstruction, target)
    return ((reconstruction - target) / unit).square().mean()


class Residuals:
    """What an RTSAE is trained on: the normalised residuals of a trajectory, all in a row."""

    prefixes = True  # a beginning alone has a code
    draws = False  # something at random

    def __init__(self, sae: RTSAE, dynamics: LinearDynamics, settings: Train, processes: Processes):
        self.sae, self.settings, self.processes = sae, settings, processes

    def inputs(self, trajectories: torch.Tensor) -> torch.Tensor:
        """`(batch, G, d)` as the training sees trajectories `(batch, G, d)`."""
        return self.sae.dynamics.residuals(trajectories)

    def rows(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is encoded `(rows, width)`, and by what its error is divided, if by anything."""
        return inputs.flatten(1), None

    def gates(self, rows: torch.Tensor, told: torch.Tensor | None = None) -> tuple[Gates | None, torch.Tensor | float]:
        """
        What pre-activations of `rows` are multiplied by, and what is minimised besides.

        Args:
            told (`torch.Tensor`, *optional*): row, column and guidance of each trajectory, `(batch, 3)` from 0 to 1.
        """
        return None, 0.0

    def hide(self, centred: torch.Tensor, unit: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What of centred rows the encoder is shown while training, and the unit of their error then."""
        return centred, unit

    def finish(self) -> None:
        """Have the trained dictionary read activations as they are."""


class Steps(Residuals):
    """What a static autoencoder is trained on: the activations of all anchors, standardised alike."""

    prefixes = False

    def __init__(self, sae: SparseAutoencoder, dynamics: LinearDynamics, settings: Train, processes: Processes):
        super().__init__(sae, dynamics, settings, processes)
        mean, device = dynamics.mean.mean(0), sae.encoder.device
        apart = (dynamics.mean - mean).square().mean(1)
        self.mean, self.scale = mean.to(device), (dynamics.scale.square() + apart).mean().sqrt().to(device)
        self.anchors = torch.tensor(sae.config.anchors, device=device)

    def inputs(self, trajectories):
        return (trajectories - self.mean) / self.scale

    def rows(self, inputs):
        return inputs.flatten(0, 1), None

    @torch.no_grad()
    def finish(self):
        # latents measured in units of the activation: rows of encoder and decoder stay as they are
        self.sae.encoder_bias.mul_(self.scale)
        self.sae.decoder_bias.mul_(self.scale).add_(self.mean)


class ModulatedSteps(Steps):
    """The same modulated by the timestep; the modulation is learned with the dictionary."""

    def rows(self, inputs):
        factor, shift = self.sae.modulate(self.anchors)
        return (inputs * factor + shift).flatten(0, 1), factor.expand_as(inputs).flatten(0, 1)

    @torch.no_grad()
    def finish(self):
        sae, mean, scale = self.sae, self.mean, self.scale
        sae.encoder_bias.mul_(scale)
        sae.decoder_bias.mul_(scale)
        for tensor, one in ((sae.modulation.weight, 0), (sae.modulation.bias, 1)):
            factor, shift = tensor.chunk(2)
            shift.mul_(scale).sub_(mean.view(-1, *[1] * (tensor.ndim - 1)) * (one + factor))


class RoutedSteps(Steps):
    """The same routed to experts, and reconstructed from a part of the channels (2509.10919)."""

    draws = True

    def __init__(self, sae: MixtureSAE, dynamics: LinearDynamics, settings: Train, processes: Processes):
        super().__init__(sae, dynamics, settings, processes)
        places = [METADATA.index(name) for name in sae.config.metadata]
        self.places = torch.tensor(places, dtype=torch.long, device=sae.encoder.device)

    def gates(self, rows, told=None):
        sae, count = self.sae, len(self.anchors)
        values = {"time": (self.anchors / 1000).repeat(len(rows) // count)}
        if told is not None:
            values |= {name: v.repeat_interleave(count) for name, v in zip(METADATA[1:], told.T, strict=True)}
        metadata = sae.told(values).to(rows)
        if told is not None:  # what is not known of all counts as zeros
            known = F.pad((told != NOWHERE).all(0), (1, 0), value=True)
            metadata = metadata * known[self.places].repeat_interleave(2)
        if sae.training:  # the router must do with less
            kept = torch.rand(len(rows), 1 + len(sae.config.metadata), device=rows.device) >= _UNTOLD
            metadata = metadata * (kept[:, :1] & kept[:, 1:]).repeat_interleave(2, 1)
        shares, imbalance = sae.gates(rows, metadata)
        owner = sae.experts(torch.arange(sae.config.num_latents, device=rows.device))
        return Gates(shares, self.processes.share(owner)), 0.0 if imbalance is None else _BALANCE * imbalance

    def hide(self, centred, unit):
        share = self.settings.masked
        if not share:
            return centred, unit
        hidden = torch.rand_like(centred) < share
        # such that the mean square error is L_masked + 0.1 L_unmasked
        weight = torch.where(hidden, 1 / share, _UNMASKED / (1 - share))
        return centred * ~hidden / (1 - share), weight.rsqrt()

    @torch.no_grad()
    def finish(self):
        super().finish()
        width = len(self.mean)
        for layer in (self.sae.router, self.sae.noise):
            layer.weight[:, :width].div_(self.scale)
            layer.bias.sub_(layer.weight[:, :width] @ self.mean)


_BALANCE, _UNMASKED = 0.5, 0.1  # weights of the loss
_UNTOLD = 0.1  # chance that the router is not told a value, and that it is told nothing
_MEMORY = 100  # batches that running means go back; before that nothing is masked
_ROOM = 8  # times k: how many latents of a row near their thresholds JumpReLU looks at, on average
_EVERY = 100  # steps after which the host looks at a device that is not its own
KINDS = {
    "rtsae": (RTSAE, Residuals),
    "static": (SparseAutoencoder, Steps),
    "tide": (TIDE, ModulatedSteps),
    "mixture": (MixtureSAE, RoutedSteps),
}


def auxiliary_loss(
    sae: SparseDictionary,
    error: torch.Tensor,
    centred: torch.Tensor,
    dead: torch.Tensor,
    k: int,
    processes: Processes = ALONE,
    of_these: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    AuxK (2406.04093, appendix A.2): the `k` largest dead latents of each row reconstruct the `error`.

    Args:
        dead (`torch.Tensor`): their indices.
        of_these (`torch.Tensor`, *optional*): which of the indices are meant, `(dead,)` bool; all by default.
    """
    weight, bias = sae.encoder[dead].flatten(1)[:, : centred.shape[1]], sae.encoder_bias[dead]
    if of_these is not None:
        bias = bias.masked_fill(~of_these, -torch.inf)
    centre = torch.zeros(centred.shape[1], device=centred.device)  # what is centred already moves nothing
    code = encode(centred, centre, weight, bias, topk(centred, weight, bias, k, processes=processes))
    guess = decode(code, sae.decoder[dead].flatten(1), len(error), processes)
    return F.mse_loss(guess, error) / error.square().mean()


def _pieces(matrix: torch.Tensor) -> Sequence[torch.Tensor]:
    """Views `(rows, entries)` of a matrix of latents: on a CPU of as many rows as stay in its cache."""
    flat = matrix.detach().flatten(1)
    return flat.split(max(1, 2**17 // flat.shape[1]) if matrix.device.type == "cpu" else len(flat))


class DictionaryTrainer:
    """
    A dictionary with its optimizer; of several processes each trains its share of the latents, on the same rows.

    Args:
        sae (`SparseDictionary`): the whole, moved to `device`; until `finish` this process' share is left of it.
        settings (`Train`): the recipe's. With `layout` `"per_step"` each latent of an RTSAE sees and writes one anchor
            only.
        dynamics (`LinearDynamics`): of the trajectories, that standardise them.
        sample (`torch.Tensor`): trajectories `(rows, G, d)`, the median of whose inputs is the first bias.

    Raises:
        `ValueError`: if the architecture is unknown.
    """

    def __init__(
        self,
        sae: SparseDictionary,
        settings: Train,
        dynamics: LinearDynamics,
        sample: torch.Tensor,
        device: torch.device | str,
        processes: Processes = ALONE,
    ):
        self.sae, self.settings, self.processes = sae.to(device), settings, processes
        if settings.architecture not in ARCHITECTURES:
            raise ValueError(f"Unknown `architecture` {settings.architecture!r}, there are {sorted(ARCHITECTURES)}.")
        self.architecture = ARCHITECTURES[settings.architecture](settings, device, processes)
        self.view = KINDS[settings.kind][1](sae, dynamics, settings, processes)
        self.blocks = None
        with torch.no_grad():
            points, _ = self.view.rows(self.inputs(sample.to(device)))
            sae.decoder_bias.copy_(geometric_median(points).view_as(sae.decoder_bias))
            if settings.layout == "per_step":
                m, anchors, _ = sae.decoder.shape
                own = torch.arange(m, device=device) * anchors // m
                self.blocks = F.one_hot(own, anchors)[:, :, None].to(sae.decoder.dtype)
                sae.decoder.mul_(self.blocks)
                self._normalise()
                sae.encoder.copy_(sae.decoder)
            self.architecture.start(points - sae.decoder_bias.flatten(), sae.encoder.flatten(1), sae.encoder_bias)
        own = {name: getattr(sae, name) for name in ("encoder", "encoder_bias", "decoder")}
        self.shares = own | self.architecture.parameters()
        for parameter in self.shares.values():
            parameter.data = processes.share(parameter.data).clone()
        self.common = {name: value for name, value in sae.named_parameters() if name not in own}
        self.parameters = self.shares | self.common
        if self.blocks is not None:
            self.blocks = processes.share(self.blocks)
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=settings.learning_rate, fused=True)
        # trajectories since each latent fired
        self.quiet = torch.zeros(len(sae.encoder), dtype=torch.long, device=device)
        self.threshold = torch.zeros(1, device=device)  # running mean of the smallest value that a batch kept
        self.done, self.parts = 0, 0  # steps, and what of the present one has been seen
        # the first step whose loss was no number, and that; -1 if there was none
        self.broken = torch.tensor([-1.0, 0.0], device=device)
        self.failure: tuple[int, float] | None = None  # the same, as far as the host has looked
        self.perhaps_dead: torch.Tensor | None = None  # indices of the latents that may be dead, until it looks again
        self.some_perhaps_dead, self.margin = 0, 0  # how many in all processes; trajectories until others may be dead

    def inputs(self, trajectories: torch.Tensor) -> torch.Tensor:
        """What is trained on, of trajectories `(rows, G, d)`."""
        return self.view.inputs(trajectories)

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint must hold beside the optimizer."""
        return self.parameters | {"quiet": self.quiet, "threshold": self.threshold} | self.architecture.state()

    @property
    def dead(self) -> torch.Tensor:
        """Which of this process' latents have not fired for long."""
        return self.quiet > self.settings.dead_after

    @torch.no_grad()
    def look(self) -> None:
        """
        Have the host look at what is on the device, which it waits for: whether a loss was no number, and which
        latents are dead or may be before it looks again.

        On a CPU it looks at every batch; elsewhere seldom, at steps that do not depend on when a run was resumed.
        """
        ahead = 0 if self.broken.device.type == "cpu" else _EVERY * self.settings.batch_size
        perhaps = self.quiet > self.settings.dead_after - ahead
        counts = torch.stack([perhaps.sum(), self.processes.sum(perhaps.sum())])
        *broken, own, every = torch.cat([self.broken.double(), counts.double()]).tolist()
        self._note_failure(*broken)
        self.perhaps_dead = torch.argsort(perhaps, descending=True, stable=True)[: int(own)]
        self.some_perhaps_dead, self.margin = int(every), ahead

    def check(self) -> None:
        """Have the host look at whether a loss was no number, alone."""
        self._note_failure(*self.broken.tolist())

    def _note_failure(self, step: float, loss: float) -> None:
        self.failure = None if step < 0 else (int(step), loss)

    @torch.no_grad()
    def _normalise(self) -> None:
        for rows in _pieces(self.sae.decoder):
            rows.div_(rows.norm(dim=1, keepdim=True).clamp(min=1e-8))

    def backward(
        self, inputs: torch.Tensor, prefix: int | None, share: float = 1.0, told: torch.Tensor | None = None
    ) -> dict[str, float]:
        """
        Add the gradients of `inputs (rows, G, d)`, of which the encoder of an RTSAE sees the first `prefix` anchors.

        Args:
            share (`float`): of the batch that these rows are.
            told (`torch.Tensor`, *optional*): row, column and guidance of each, `(rows, 3)` from 0 to 1.

        Returns:
            `dict`: loss, FVU of the inputs (per unit of their normalised variance) and L0, on the device.
        """
        sae, prefix = self.sae.train(), prefix if self.view.prefixes else None
        due = self.parts == 0 and (self.done % _EVERY == 0 or self.done % self.settings.checkpoint_every == 0)
        if due or self.perhaps_dead is None or self.margin <= 0:
            self.look()
        self.margin -= len(inputs)
        draws = self.view.draws or self.architecture.draws
        devices = [inputs.device] if inputs.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=draws):  # what is drawn depends on the step alone
            if draws:
                torch.manual_seed(1_000_003 * self.done + self.parts)
            target, unit, code, centred, other = self._encode(inputs, prefix, told)
        self.parts += 1
        wanted, centre = target, sae.decoder_bias.flatten()
        if self.processes.rank > 0:  # the first one's gradients count: `update` sums them
            wanted, centre, other = target.detach(), centre.detach(), 0.0
            unit = None if unit is None else unit.detach()
        loss, fvu, reconstruction = self.architecture.loss(wanted, code, sae.decoder.flatten(1), centre, unit)
        loss = loss + other
        if prefix is None and self.some_perhaps_dead:
            k, dead = min(inputs.shape[2] // 2, self.some_perhaps_dead), self.dead[self.perhaps_dead]
            error = (target - reconstruction).detach()
            chosen = self.perhaps_dead, k, self.processes, dead
            auxiliary = auxiliary_loss(sae, error, centred.detach(), *chosen)
            loss = loss + self.settings.auxiliary * auxiliary * (self.processes.sum(dead.sum()) > 0)
        (loss * share).backward()
        values, loss = code.values.detach(), loss.detach()
        active = values > 0
        fired = torch.zeros_like(self.quiet).index_add_(0, code.latents, active.long())
        self.quiet.add_(len(inputs)).masked_fill_(fired > 0, 0)
        lowest = torch.cat([values.masked_fill(~active, torch.inf), values.new_full((1,), torch.inf)]).min()
        told = self.processes.gather(torch.stack([active.sum(), lowest]))
        lowest = told[:, 1].min()
        if prefix is None:
            weight = torch.ones_like(self.threshold).masked_fill_(self.threshold > 0, 0.02)
            mean = self.threshold.lerp(lowest, weight)
            self.threshold.copy_(torch.where(lowest.isfinite(), mean, self.threshold))
        here = torch.stack([loss.new_full((), self.done), loss])
        self.broken = torch.where((self.broken[0] < 0) & ~loss.isfinite(), here, self.broken)
        return {"loss": loss, "fvu": fvu.detach(), "l0": told[:, 0].sum() / len(target)}

    def _encode(
        self, inputs: torch.Tensor, prefix: int | None, told: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, Code, torch.Tensor, torch.Tensor | float]:
        """The target, the unit of its error, its code, what the encoder was shown of it, centred, and what is
        minimised besides its error."""
        target, unit = self.view.rows(inputs)
        shown = slice(None) if prefix is None else slice(prefix * inputs.shape[2])
        centre, weight = self.sae.decoder_bias.flatten(), self.sae.encoder.flatten(1)[:, shown]
        centred = target[:, shown] - centre[shown].detach()
        gates, other = self.view.gates(target, told)
        if self.sae.training:
            centred, unit = self.view.hide(centred, unit)
        code = self.architecture.encode(
            centred, centre[shown], weight, self.sae.encoder_bias, gates, self.sae.training
        )
        return target, unit, code, centred, other

    @torch.no_grad()
    def measure(self, inputs: torch.Tensor) -> dict[str, float]:
        """FVU and L0 of held-out `inputs (rows, G, d)`, and the share of dead latents."""
        sae = self.sae.eval()
        target, unit, code, centred, _ = self._encode(inputs, None)
        _, fvu, _ = self.architecture.loss(target, code, sae.decoder.flatten(1), sae.decoder_bias.flatten(), unit)
        if self.architecture.shares_budget:
            gates, _ = self.view.gates(target)
            code = above(centred, sae.encoder.flatten(1), sae.encoder_bias, self.threshold, gates=gates)
        l0 = self.processes.sum((code.values > 0).sum()).item() / len(target)
        dead = self.processes.sum(self.dead.sum()).item() / self.settings.num_latents
        return {"fvu_validation": fvu.item(), "l0_validation": l0, "dead": dead}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """One step of the optimizer; the decoder moves on the unit sphere."""
        settings, decoder = self.settings, self.sae.decoder
        rate = min(1.0, (step + 1) / 100, 5 * (settings.steps - step) / settings.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        if self.blocks is not None:
            decoder.grad.mul_(self.blocks)
            self.sae.encoder.grad.mul_(self.blocks)
        for row, gradient in zip(_pieces(decoder), _pieces(decoder.grad), strict=True):
            gradient.addcmul_(row, (gradient * row).sum(1, keepdim=True), value=-1)
        # gradients of norm 1 at every step: the large ones of the beginning would make Adam's steps small for long
        own, common = [parameter.grad for parameter in self.shares.values()], list(self.common.values())
        sums = [*(parameter.grad.flatten() for parameter in common), nn.utils.get_total_norm(own).square()[None]]
        summed = self.processes.sum(torch.cat(sums))
        for parameter, gradient in zip(common, summed.split([len(part) for part in sums])[:-1], strict=True):
            parameter.grad = gradient.view_as(parameter)
        norm = torch.cat([summed[:-1].square(), summed[-1:]]).sum().sqrt()
        self.optimizer.grad_scale = norm.clamp(min=1e-12)  # which the fused step divides by
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._normalise()
        self.done, self.parts = step + 1, 0

    def finish(self) -> SparseDictionary:
        """The whole, rounded as it will be stored; its thresholds and statistics are still to be measured."""
        sae = self.sae.eval()
        self.architecture.finish(sae)
        for parameter in (sae.encoder, sae.encoder_bias, sae.decoder):
            parameter.data = self.processes.whole(parameter.data, self.settings.num_latents)
        self.view.finish()
        for tensor in (sae.encoder, sae.decoder):
            tensor.data = tensor.data.half().float()
        return sae


def new_dictionary(site: str, anchors: list[int], recipe: Recipe, dynamics: LinearDynamics) -> SparseDictionary:
    """An untrained dictionary of the recipe's kind, of trajectories with the given dynamics."""
    torch.manual_seed(recipe.seed)
    settings, (kind, _) = recipe.train, KINDS[recipe.train.kind]
    shape = dynamics.mean.shape[1], anchors, settings.num_latents, settings.k, recipe.activation
    if kind is RTSAE:
        sae = RTSAE(site, *shape)
        sae.dynamics.load_state_dict(dynamics.state_dict())
        return sae
    if kind is MixtureSAE:
        routed = round((1 - settings.shared) * settings.num_latents / settings.experts) * settings.experts
        own = {"shared_latents": settings.num_latents - routed, "num_experts": settings.experts}
        sae = MixtureSAE(site, *shape, **own, metadata=settings.metadata)
    else:
        sae = kind(site, *shape, sparsity="topk" if settings.architecture == "topk" else "threshold")
    sae.scale.copy_(dynamics.scale)
    return sae


@torch.no_grad()
def residual_code(rtsae: RTSAE, residuals: torch.Tensor, k: int) -> Code:
    """BatchTopK code of (the beginning of) normalised residuals `(rows, g, d)`."""
    shown = (residuals - rtsae.decoder_bias[: residuals.shape[1]]).flatten(1)
    return batch_topk(shown, rtsae.encoder.flatten(1)[:, : shown.shape[1]].float(), rtsae.encoder_bias.float(), k)


def _lowest(code: Code, count: int) -> torch.Tensor | float:
    """The threshold that keeps what BatchTopK kept of `count` pre-activations; 0 if there were no more to keep."""
    lowest = code.values.min() if len(code.values) == count else torch.zeros(())
    return torch.nextafter(lowest, torch.zeros_like(lowest))


@torch.no_grad()
def calibrate(sae: SparseDictionary, trajectories: torch.Tensor, k: int, layout: str = "concatenated") -> None:
    """Set the threshold (of an RTSAE that of each prefix) so that k latents are active on average on `trajectories
    (tokens, G, d)`."""
    if not isinstance(sae, RTSAE):
        steps = list(zip(trajectories.unbind(1), sae.config.anchors, strict=True))
        centred = torch.cat([sae.normalize(h, t) for h, t in steps]) - sae.decoder_bias
        gates = None
        if isinstance(sae, MixtureSAE):  # telling the router the place and the guidance moves L0 by less than 1 %
            shares = torch.cat([sae.gates(h, sae.metadata(Step(t, 0.0), 1))[0] for h, t in steps])
            gates = Gates(shares, sae.experts(torch.arange(sae.config.num_latents, device=shares.device)))
        code = batch_topk(centred, sae.encoder.float(), sae.encoder_bias, k, gates=gates)
        sae.threshold.fill_(_lowest(code, k * len(centred)))
        return
    residuals = sae.dynamics.residuals(trajectories)
    for g in range(residuals.shape[1]):
        sae.threshold[g] = _lowest(residual_code(sae, residuals[:, : g + 1], k), k * len(residuals))
    if layout == "per_step":  # at an anchor only its own latents can be active: one threshold for all
        sae.threshold.fill_(sae.threshold[-1])


def measure_activations(sae: SparseDictionary, trajectories: Iterable[torch.Tensor]) -> None:
    """Set the statistics of each latent's activation on pieces of trajectories `(tokens, G, d)`."""
    set_statistics(sae, (code for part in trajectories for code in sae.codes(part.to(sae.encoder.device))))
