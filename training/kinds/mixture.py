"""Mixtures of experts: a router opens the latents of a few experts for each row (2509.10919)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffusers_rtsae import MixtureSAE
from diffusers_rtsae.models import METADATA, LinearDynamics, Step

from ..architectures.sparse import Gates
from ..common.processes import Processes
from ..data.store import NOWHERE
from ..recipe import Train
from .static import Steps

BALANCE, UNMASKED = 0.5, 0.1  # weights in the loss: of an even use of experts, and of the channels that are not hidden
DROPPED = 0.1  # chance that a value of the metadata is kept from the router, and that all of them are


class RoutedSteps(Steps):
    """Standardised activations, routed to experts, and reconstructed from a part of the channels."""

    model = MixtureSAE
    draws = True

    def __init__(self, sae: MixtureSAE, dynamics: LinearDynamics, settings: Train, processes: Processes):
        super().__init__(sae, dynamics, settings, processes)
        places = [METADATA.index(name) for name in sae.config.metadata]
        self.places = torch.tensor(places, dtype=torch.long, device=sae.encoder.device)

    @classmethod
    def options(cls, settings):
        routed = round((1 - settings.shared) * settings.num_latents / settings.experts) * settings.experts
        experts = {"shared_latents": settings.num_latents - routed, "num_experts": settings.experts}
        return experts | {"metadata": settings.metadata}

    def gates(self, rows, metadata=None):
        sae, count = self.sae, len(self.anchors)
        values = {"time": (self.anchors / sae.duration).repeat(len(rows) // count)}
        if metadata is not None:
            columns = zip(METADATA[1:], metadata.T, strict=True)
            values |= {name: column.repeat_interleave(count) for name, column in columns}
        encoded = sae.encode_metadata(values).to(rows)
        if metadata is not None:  # a value that some of the rows lack counts as zeros for all
            known = F.pad((metadata != NOWHERE).all(0), (1, 0), value=True)
            encoded = encoded * known[self.places].repeat_interleave(2)
        if sae.training:  # so that the router can do with less
            kept = torch.rand(len(rows), 1 + len(sae.config.metadata), device=rows.device) >= DROPPED
            encoded = encoded * (kept[:, :1] & kept[:, 1:]).repeat_interleave(2, 1)
        shares, imbalance = sae.gates(rows, encoded)
        return Gates(shares, self.processes.share(self._owners())), 0.0 if imbalance is None else BALANCE * imbalance

    def _owners(self) -> torch.Tensor:
        """The expert of each latent."""
        return self.sae.experts(torch.arange(self.sae.config.num_latents, device=self.sae.encoder.device))

    def hide(self, centred, unit):
        share = self.settings.masked
        if not share:
            return centred, unit
        hidden = torch.rand_like(centred) < share
        # such that the mean square error is L_masked + 0.1 L_unmasked
        weight = torch.where(hidden, 1 / share, UNMASKED / (1 - share))
        return centred * ~hidden / (1 - share), weight.rsqrt()

    @torch.no_grad()
    def finish(self):
        super().finish()
        width = len(self.mean)
        for layer in (self.sae.router, self.sae.noise):
            layer.weight[:, :width].div_(self.scale)
            layer.bias.sub_(layer.weight[:, :width] @ self.mean)

    def gates_of(self, trajectories):
        """Without place and guidance, which move L0 by less than 1 %."""
        steps = zip(trajectories.unbind(1), self.sae.config.anchors, strict=True)
        shares = [self.sae.gates(h, self.sae.metadata(Step(timestep, 0.0), 1))[0] for h, timestep in steps]
        return Gates(torch.cat(shares), self._owners())
