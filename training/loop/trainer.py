"""One dictionary in training: its optimizer, and one step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.adam import adam

from diffusers_rtsae import SparseDictionary
from diffusers_rtsae.analysis.statistics import set_statistics
from diffusers_rtsae.models import LinearDynamics

from ..architectures.matrix import Gradient, Matrix
from ..architectures.sparse import Code, above, decode, encode, topk
from ..common.processes import ALONE, Processes
from ..recipe import Recipe, Train
from ..registry import architecture_of, objective_of

CHECK_EVERY = 100  # steps after which the host reads from a device that is not its own, and waits for it


def geometric_median(points: torch.Tensor, iterations: int = 20) -> torch.Tensor:
    """Geometric median of `points (n, d)` (Weiszfeld)."""
    median = points.mean(0)
    for _ in range(iterations):
        weight = 1 / (points - median).norm(dim=1).clamp(min=1e-6)
        median = (points * weight[:, None]).sum(0) / weight.sum()
    return median


def auxiliary_loss(
    encoder: Matrix,
    encoder_bias: torch.Tensor,
    decoder: Matrix,
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
        dead (`torch.Tensor`): indices of the latents.
        of_these (`torch.Tensor`, *optional*): which of these indices are dead, `(dead,)` bool; all by default.
    """
    encoder, bias = encoder.part(dead, centred.shape[1]), encoder_bias[dead]
    if of_these is not None:
        bias = bias.masked_fill(~of_these, -torch.inf)
    centre = torch.zeros(centred.shape[1], device=centred.device)  # the rows are centred already
    code = encode(centred, centre, encoder, bias, topk(centred, encoder.weight, bias, k, processes=processes))
    guess = decode(code, decoder.part(dead), len(error), processes)
    return F.mse_loss(guess, error) / error.square().mean()


def normalise(rows: torch.Tensor) -> None:
    """Give rows `(latents, d)` length 1."""
    rows.div_(rows.norm(dim=1, keepdim=True).clamp(min=1e-8))


class DictionaryTrainer:
    """
    A dictionary with its optimizer. Each of several processes trains its share of the latents, on the same rows.

    Args:
        sae (`SparseDictionary`): the whole dictionary, which is moved to `device`. Until `finish` it holds only this
            process' share of the latents.
        settings (`Train`): of the recipe. With `layout` `"per_step"` each latent of an RTSAE reads and writes one
            anchor only.
        dynamics (`LinearDynamics`): of the trajectories, which standardise them.
        sample (`torch.Tensor`): trajectories `(rows, G, d)`; the decoder's bias starts at the median of their inputs.
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
        self.architecture = architecture_of(settings.architecture)(settings, device, processes)
        self.objective = objective_of(settings.kind)(sae, dynamics, settings, processes)
        blocks = None
        with torch.no_grad():
            points, _ = self.objective.rows(self.inputs(sample.to(device)))
            sae.decoder_bias.copy_(geometric_median(points).view_as(sae.decoder_bias))
            if settings.layout == "per_step":
                m, anchors, _ = sae.decoder.shape
                anchor = torch.arange(m, device=device) * anchors // m
                blocks = F.one_hot(anchor, anchors).to(sae.decoder.dtype)
                sae.decoder.mul_(blocks[:, :, None])
                normalise(sae.decoder.flatten(1))
                sae.encoder.copy_(sae.decoder)
            self.architecture.start(points - sae.decoder_bias.flatten(), sae.encoder.flatten(1), sae.encoder_bias)
        per_latent = {name: getattr(sae, name) for name in ("encoder", "encoder_bias", "decoder")}
        self.shares = per_latent | self.architecture.parameters()
        for parameter in self.shares.values():
            if processes.count > 1:  # the whole is let go
                parameter.data = processes.share(parameter.data).clone()
        self.common = {name: value for name, value in sae.named_parameters() if name not in per_latent}
        self.parameters = self.shares | self.common
        blocks = None if blocks is None else processes.share(blocks)
        self.encoder, self.decoder = Matrix(sae.encoder, blocks), Matrix(sae.decoder, blocks)
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=settings.learning_rate, fused=True)
        for matrix in (sae.encoder, sae.decoder):  # whose gradients the optimizer never sees
            moments = {name: torch.zeros_like(matrix) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[matrix] = {"step": torch.zeros((), device=device)} | moments
        # trajectories since each latent fired
        self.quiet = torch.zeros(len(sae.encoder), dtype=torch.long, device=device)
        self.threshold = torch.zeros(1, device=device)  # running mean of the smallest active value of a batch
        self.done, self.parts = 0, 0  # steps that are finished, and parts of the present batch
        # the first step whose loss was not finite, and that loss; -1 if there was none
        self.broken = torch.tensor([-1.0, 0.0], device=device)
        self.failure: tuple[int, float] | None = None  # `broken`, when the host last read it
        self.perhaps_dead: torch.Tensor | None = None  # indices of latents that may die before the next reading
        self.some_perhaps_dead, self.margin = 0, 0  # their number in all processes; trajectories until others may die

    def inputs(self, trajectories: torch.Tensor) -> torch.Tensor:
        """The standardised inputs `(rows, G, d)` of trajectories `(rows, G, d)`."""
        return self.objective.inputs(trajectories)

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that a checkpoint holds, beside those of the optimizer."""
        return self.parameters | {"quiet": self.quiet, "threshold": self.threshold} | self.architecture.state()

    @property
    def dead(self) -> torch.Tensor:
        """Which of this process' latents are dead: they have not fired for `dead_after` trajectories."""
        return self.quiet > self.settings.dead_after

    @torch.no_grad()
    def read_device(self) -> None:
        """
        Read from the device whether a loss was not finite, and which latents are dead or may die before the next
        reading. The host waits for the device.

        On a CPU this is done for every batch, elsewhere seldom, at steps that do not depend on when a run was resumed.
        """
        ahead = 0 if self.broken.device.type == "cpu" else CHECK_EVERY * self.settings.batch_size
        perhaps = self.quiet > self.settings.dead_after - ahead
        counts = torch.stack([perhaps.sum(), self.processes.sum(perhaps.sum())])
        *broken, here, everywhere = torch.cat([self.broken.double(), counts.double()]).tolist()
        self._note_failure(*broken)
        self.perhaps_dead = torch.argsort(perhaps, descending=True, stable=True)[: int(here)]
        self.some_perhaps_dead, self.margin = int(everywhere), ahead

    def check(self) -> None:
        """Read from the device only whether a loss was not finite."""
        self._note_failure(*self.broken.tolist())

    def _note_failure(self, step: float, loss: float) -> None:
        self.failure = None if step < 0 else (int(step), loss)

    def backward(
        self, inputs: torch.Tensor, prefix: int | None, share: float = 1.0, metadata: torch.Tensor | None = None
    ) -> dict[str, float]:
        """
        Add the gradients of `inputs (rows, G, d)`, of which the encoder of an RTSAE sees the first `prefix` anchors.

        Args:
            share (`float`): the share of the batch that these rows make up.
            metadata (`torch.Tensor`, *optional*): row, column and guidance of each, `(rows, 3)` from 0 to 1.

        Returns:
            `dict`: loss, FVU of the inputs (per unit of their normalised variance) and L0, on the device.
        """
        sae, prefix = self.sae.train(), prefix if self.objective.prefixes else None
        due = self.parts == 0 and (self.done % CHECK_EVERY == 0 or self.done % self.settings.checkpoint_every == 0)
        if due or self.perhaps_dead is None or self.margin <= 0:
            self.read_device()
        self.margin -= len(inputs)
        draws = self.objective.draws or self.architecture.draws
        devices = [inputs.device] if inputs.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=draws):  # random numbers depend on the step alone
            if draws:
                torch.manual_seed(1_000_003 * self.done + self.parts)
            target, unit, code, centred, gate_loss = self._encode(inputs, prefix, metadata)
        self.parts += 1
        shared_target, centre = target, sae.decoder_bias.flatten()
        if self.processes.rank > 0:  # `update` sums these gradients, so only the first process makes them
            shared_target, centre, gate_loss = target.detach(), centre.detach(), 0.0
            unit = None if unit is None else unit.detach()
        loss, fvu, reconstruction = self.architecture.loss(shared_target, code, self.decoder, centre, unit)
        loss = loss + gate_loss
        if prefix is None and self.some_perhaps_dead:
            k, dead = min(inputs.shape[2] // 2, self.some_perhaps_dead), self.dead[self.perhaps_dead]
            error = (target - reconstruction).detach()
            chosen = self.perhaps_dead, k, self.processes, dead
            matrices = self.encoder, sae.encoder_bias, self.decoder
            auxiliary = auxiliary_loss(*matrices, error, centred.detach(), *chosen)
            loss = loss + self.settings.auxiliary * auxiliary * (self.processes.sum(dead.sum()) > 0)
        (loss * share).backward()
        values, loss = code.values.detach(), loss.detach()
        active = values > 0
        fired = torch.zeros_like(self.quiet).index_add_(0, code.latents, active.long())
        self.quiet.add_(len(inputs)).masked_fill_(fired > 0, 0)
        lowest = torch.cat([values.masked_fill(~active, torch.inf), values.new_full((1,), torch.inf)]).min()
        gathered = self.processes.gather(torch.stack([active.sum(), lowest]))
        lowest = gathered[:, 1].min()
        if prefix is None:
            weight = torch.ones_like(self.threshold).masked_fill_(self.threshold > 0, 0.02)
            mean = self.threshold.lerp(lowest, weight)
            self.threshold.copy_(torch.where(lowest.isfinite(), mean, self.threshold))
        here = torch.stack([loss.new_full((), self.done), loss])
        self.broken = torch.where((self.broken[0] < 0) & ~loss.isfinite(), here, self.broken)
        return {"loss": loss, "fvu": fvu.detach(), "l0": gathered[:, 0].sum() / len(target)}

    def _encode(
        self, inputs: torch.Tensor, prefix: int | None, metadata: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, Code, torch.Tensor, torch.Tensor | float]:
        """The rows to reconstruct, the unit of their error, their code, the centred part of them that the encoder saw,
        and the loss of the gates."""
        target, unit = self.objective.rows(inputs)
        visible = slice(None if prefix is None else prefix * inputs.shape[2])
        centre, encoder = self.sae.decoder_bias.flatten(), self.encoder.part(columns=visible.stop)
        centred = target[:, visible] - centre[visible].detach()
        gates, gate_loss = self.objective.gates(target, metadata)
        if self.sae.training:
            centred, unit = self.objective.hide(centred, unit)
        code = self.architecture.encode(
            centred, centre[visible], encoder, self.sae.encoder_bias, gates, self.sae.training
        )
        return target, unit, code, centred, gate_loss

    @torch.no_grad()
    def measure(self, inputs: torch.Tensor) -> dict[str, float]:
        """FVU and L0 of held-out `inputs (rows, G, d)`, and the share of dead latents."""
        sae = self.sae.eval()
        target, unit, code, centred, _ = self._encode(inputs, None)
        _, fvu, _ = self.architecture.loss(target, code, self.decoder, sae.decoder_bias.flatten(), unit)
        if self.architecture.shares_budget:
            gates, _ = self.objective.gates(target)
            code = above(centred, self.encoder.weight, sae.encoder_bias, self.threshold, gates=gates)
        l0 = self.processes.sum((code.values > 0).sum()).item() / len(target)
        dead = self.processes.sum(self.dead.sum()).item() / self.settings.num_latents
        return {"fvu_validation": fvu.item(), "l0_validation": l0, "dead": dead}

    def _step(self, parameter: nn.Parameter, gradient: Gradient) -> None:
        """What `optimizer.step` does to a matrix whose gradient is there as a whole."""
        (options,) = self.optimizer.param_groups
        beta1, beta2 = options["betas"]
        same = {name: options[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize", "fused")}
        state = self.optimizer.state[parameter]
        for own, piece in gradient.pieces():
            rows, mean, square = (
                whole.detach().flatten(1)[own] for whole in (parameter, state["exp_avg"], state["exp_avg_sq"])
            )
            adam(
                [rows], [piece], [mean], [square], [], [state["step"].clone()], beta1=beta1, beta2=beta2,
                grad_scale=self.optimizer.grad_scale, **same,
            )  # fmt: skip
            if gradient.along is not None:
                normalise(rows)
        state["step"] += 1

    @torch.no_grad()
    def update(self, step: int) -> None:
        """One step of the optimizer; decoder rows keep length 1."""
        settings = self.settings
        rate = min(1.0, (step + 1) / 100, 5 * (settings.steps - step) / settings.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        # gradients have norm 1 at every step: the large ones of the beginning would make Adam's steps small for long
        gradients = {"encoder": self.encoder.gradient(), "decoder": self.decoder.gradient()}
        squares = [gradient.square() for gradient in gradients.values()]
        squares += [own.grad.square().sum() for name, own in self.shares.items() if name not in gradients]
        common = list(self.common.values())
        sums = [*(parameter.grad.flatten() for parameter in common), torch.stack(squares).sum()[None]]
        summed = self.processes.sum(torch.cat(sums))
        for parameter, gradient in zip(common, summed.split([len(part) for part in sums])[:-1], strict=True):
            parameter.grad = gradient.view_as(parameter)
        norm = torch.cat([summed[:-1].square(), summed[-1:]]).sum().sqrt()
        self.optimizer.grad_scale = norm.clamp(min=1e-12)  # which the fused step divides by
        for name, gradient in gradients.items():
            self._step(self.shares[name], gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done, self.parts = step + 1, 0

    def finish(self) -> SparseDictionary:
        """The whole dictionary, rounded as it will be stored, but without its thresholds and statistics."""
        sae = self.sae.eval()
        self.architecture.finish(sae)
        for parameter in (sae.encoder, sae.encoder_bias, sae.decoder):
            parameter.data = self.processes.whole(parameter.data, self.settings.num_latents)
        self.objective.finish()
        for tensor in (sae.encoder, sae.decoder):
            tensor.data = tensor.data.half().float()
        return sae


def new_dictionary(site: str, anchors: list[int], recipe: Recipe, dynamics: LinearDynamics) -> SparseDictionary:
    """An untrained dictionary of the recipe's kind, for trajectories with the given dynamics."""
    torch.manual_seed(recipe.seed)
    return objective_of(recipe.train.kind).untrained(site, anchors, recipe, dynamics)


def measure_activations(sae: SparseDictionary, trajectories: Iterable[torch.Tensor]) -> None:
    """Set the statistics of each latent's activation, from parts of trajectories `(tokens, G, d)`."""
    set_statistics(sae, (code for part in trajectories for code in sae.codes(part.to(sae.encoder.device))))
