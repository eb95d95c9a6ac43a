"""The static sparse autoencoder: one code per step, with the same latents and directions at all steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import nn

from .base import ACTIVATIONS, Directions, Memory, Reader, SparseDictionary, Step
from .sparsity import groupmax, jump_relu, picture_topk, topk

SPARSITIES = ("threshold", "topk", "batch_topk", "sample_topk", "groupmax")
INPUT_NORMS = (None, "layer", "length")
_PIECE = 2**24  # pre-activations in memory at once, when all latents are computed


class SparseAutoencoder(SparseDictionary):
    r"""
    A sparse autoencoder of the activation at one site, the same for all steps of denoising.

    z = S(W_enc (x − b_dec) + b_enc) and x̂ = W_decᵀ z + b_dec. S keeps what exceeds a threshold per latent (JumpReLU,
    2407.14435; this includes a ReLU, with threshold 0, and gated, 2404.16014, and BatchTopK autoencoders, 2412.06410,
    after training), or the k largest of each token (TopK, 2406.04093). With `activation="input"` it is a transcoder:
    x is the site's input and x̂ an estimate of its output. With a `skip` connection (2501.18823), x̂ has a second
    linear part, W_skip x, in which no latent takes part.

    Args:
        site (`str`): path of the module in the denoiser whose activation this is, e.g. `"up_blocks.1.attentions.1"`.
        in_channels (`int`): d, the width of the site.
        anchors (`list[int]`): the timesteps it was trained at, in training units, descending.
        num_latents (`int`): m, the size of the dictionary.
        k (`int`): number of latents active on a token at a step, exactly or on average, as `sparsity` says.
        activation (`str`, defaults to `"output"`): what is read at the site, its `"output"`, its `"update"`
            (output − input) or its `"input"`.
        sparsity (`str`, defaults to `"threshold"`): which latents are active. With `"threshold"` those above a
            threshold of their own, so that each can be computed alone. Otherwise the k largest of the token,
            `"topk"`; the k · N largest of the N tokens of the picture, `"batch_topk"`; the k largest of the picture,
            `"sample_topk"`; or the largest of each of k groups of neighbouring latents, `"groupmax"`. For these an
            edit that reads one latent has to compute all m of them: m · d multiplications per token and step.
        centred (`bool`, defaults to `True`): whether b_dec is subtracted from x before encoding.
        input_norm (`str`, *optional*): normalisation of each token: `"layer"` subtracts its mean and divides by its
            standard deviation, `"length"` divides by its root mean square.
        undone (`bool`, defaults to `True`): whether the normalisation is inverted on x̂.
        skip (`bool`, defaults to `False`): whether it has a skip connection.

    Example:
        ```py
        >>> sae = SparseAutoencoder("mid_block", 1280, anchors=[961, 481, 1], num_latents=20480, k=32)
        >>> latents = sae.encode(trajectories[:, :2])  # (tokens, 2, d) -> (tokens, m), at the second anchor
        ```
    """

    activations = ACTIVATIONS
    summary = (
        "A sparse autoencoder of the activation at any one step, the same for all steps; its features have one "
        "direction each. `k` latents are active on a token at a step."
    )

    @register_to_config
    def __init__(
        self, site: str, in_channels: int, anchors: list[int], num_latents: int, k: int, activation: str = "output",
        sparsity: str = "threshold", centred: bool = True, input_norm: str | None = None, undone: bool = True,
        skip: bool = False,
    ):  # fmt: skip
        super().__init__(anchors, num_latents, activation)
        if sparsity not in SPARSITIES or sparsity in ("topk", "batch_topk", "groupmax") and k > num_latents:
            raise ValueError(
                f"`sparsity` must be one of {list(SPARSITIES)}, with k up to {num_latents}, got {sparsity!r} with {k}."
            )
        if sparsity == "groupmax" and num_latents % k:
            raise ValueError(f"With 'groupmax', k must divide the number of latents, got {num_latents} with {k}.")
        flags = (centred, undone, skip)
        if not all(isinstance(flag, bool) for flag in flags) or input_norm not in INPUT_NORMS:
            raise ValueError(
                f"`centred`, `undone` and `skip` must be bools and `input_norm` one of {list(INPUT_NORMS)}, got "
                f"{centred!r}, {undone!r}, {skip!r} and {input_norm!r}."
            )
        self._allocate(in_channels, anchors, num_latents)
        if skip:
            self.skip_matrix = nn.Parameter(torch.zeros(in_channels, in_channels))

    def _allocate(self, in_channels: int, anchors: list[int], num_latents: int) -> None:
        decoder = F.normalize(torch.randn(num_latents, in_channels), dim=1)
        self.encoder = nn.Parameter(decoder.clone())
        self.encoder_bias = nn.Parameter(torch.zeros(num_latents))
        self.decoder = nn.Parameter(decoder)
        self.decoder_bias = nn.Parameter(torch.zeros(in_channels))
        self.register_buffer("threshold", torch.zeros(num_latents))
        self.register_buffer("scale", torch.ones(len(anchors)))  # spread of the activation at each anchor

    @property
    def spread(self) -> torch.Tensor:
        return self.scale

    @property
    def centre(self) -> torch.Tensor:
        """What is subtracted from the encoder's input, `(d,)`."""
        return self.decoder_bias if self.config.get("centred", True) else torch.zeros_like(self.decoder_bias)

    def normalize(self, tokens: torch.Tensor, timestep: float) -> torch.Tensor:
        """What the encoder is given of activations `(..., d)` at a step."""
        size = self._size(tokens)
        if size is None:
            return tokens
        if self.config.input_norm == "length":
            return tokens / size.clamp(min=1e-20)
        return (tokens - tokens.mean(-1, keepdim=True)) / (size + 1e-5)

    def normalizer(self, device: torch.device) -> Callable[[torch.Tensor, float], torch.Tensor]:
        """`normalize` for many steps on a device, with all that it needs there."""
        return self.normalize

    def denormalize(self, decoded: torch.Tensor, timestep: float, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """The inverse of `normalize`, of these tokens where an `input_norm` needs them."""
        size = None if tokens is None else self.gain(tokens)
        if size is None:
            return decoded
        return decoded * size + (tokens.mean(-1, keepdim=True) if self.config.input_norm == "layer" else 0)

    def gain(self, tokens: torch.Tensor) -> torch.Tensor | None:
        return self._size(tokens) if self.config.get("undone", True) else None

    def _size(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """What the `input_norm` divides each token by, `(..., 1)`."""
        norm = self.config.get("input_norm")
        if norm is None:
            return None
        return tokens.std(-1, keepdim=True) if norm == "layer" else tokens.square().mean(-1, keepdim=True).sqrt()

    def reader(self, latents: list[int], device: torch.device) -> Reader:
        readers = {"threshold": StepReader, "topk": TopKReader, "groupmax": GroupReader}
        return readers.get(self.config.sparsity, PictureReader)(self, latents, device)

    @property
    def shares_picture(self) -> bool:
        return self.config.get("sparsity") in ("batch_topk", "sample_topk")

    def active_in_picture(self, tokens: int) -> int:
        """How many latents are active in a picture of so many tokens, with the sparsity of pictures."""
        return self.config.k * (tokens if self.config.sparsity == "batch_topk" else 1)

    def directions(self, latents: list[int] | torch.Tensor, injection: str = "trajectory") -> Directions:
        return Directions(self.decoder[latents].detach().float()[:, None])

    def encode_step(self, tokens: torch.Tensor, timestep: float) -> torch.Tensor:
        """Latents `(..., m)` of activations `(..., d)` at a timestep; where their number is that of a picture, of the
        picture that the last tokens `(N, d)` are."""
        centred = self.normalize(tokens.float(), timestep) - self.centre
        pre_activations = F.linear(centred, self.encoder.float(), self.encoder_bias)
        if self.config.sparsity == "threshold":
            return jump_relu(pre_activations, self.threshold)
        if self.config.sparsity == "topk":
            return topk(pre_activations, self.config.k)
        if self.config.sparsity == "groupmax":
            return groupmax(pre_activations, self.config.k)
        return picture_topk(pre_activations, self.active_in_picture(tokens.shape[-2]))

    def encode_all(self, tokens: torch.Tensor, timestep: float) -> torch.Tensor:
        """As `encode_step`, but of all latents, whatever their rank: those that are positive, or above a threshold of
        their own. Kinds with another rule of their own keep it."""
        if self.config.get("sparsity") in (None, "threshold") or type(self).encode_step is not _ENCODE_STEP:
            return self.encode_step(tokens, timestep)
        centred = self.normalize(tokens.float(), timestep) - self.centre
        return F.linear(centred, self.encoder.float(), self.encoder_bias).relu()

    def decode_step(self, latents: torch.Tensor, timestep: float, tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Activations `(..., d)` at a timestep that latents `(..., m)` stand for, on these tokens where an
        `input_norm` or a skip connection needs them."""
        decoded = self.denormalize(latents @ self.decoder.float() + self.decoder_bias, timestep, tokens)
        if tokens is not None and self.config.get("skip"):
            decoded = decoded + tokens @ self.skip_matrix.float().T
        return decoded

    def encode(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.check_trajectories(hidden_states)
        return self.encode_step(hidden_states[..., -1, :], self.config.anchors[hidden_states.shape[-2] - 1])

    def reconstruct(self, hidden_states: torch.Tensor, teacher_forced: bool = False) -> torch.Tensor:
        self.check_trajectories(hidden_states)
        steps = zip(hidden_states.unbind(-2), self.config.anchors, strict=False)
        return torch.stack([self.decode_step(self.encode_step(h, t), t, h.float()) for h, t in steps], -2)


_ENCODE_STEP = SparseAutoencoder.encode_step


def _rows(sae: SparseAutoencoder, rows: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder rows, and the bias to add to their products with an activation."""
    encoder = sae.encoder_rows(rows)
    bias = sae.encoder_bias[rows].detach() - encoder @ sae.centre.detach()
    return encoder.to(device), bias.to(device)


class StepReader(Reader):
    """Reads latents with a threshold of their own, from their own rows alone: O(tokens · d · rows)."""

    def __init__(self, sae: SparseAutoencoder, rows: list[int], device: torch.device):
        self.sae, self.normalize = sae, sae.normalizer(device)
        self.encoder, self.bias = _rows(sae, rows, device)
        self.threshold = sae.threshold[rows].to(device)

    def read(self, memory: Memory, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        normalized = self.normalize(tokens.float(), step.timestep)
        return self.activate(normalized @ self.encoder.T + self.bias)

    def activate(self, pre_activations: torch.Tensor) -> torch.Tensor:
        """Latents from pre-activations, `(..., rows)` both."""
        return jump_relu(pre_activations, self.threshold)


class TopKReader(Reader):
    """Reads latents of which the k largest of each token are active. It computes all m: O(tokens · d · m)."""

    def __init__(self, sae: SparseAutoencoder, rows: list[int], device: torch.device):
        self.sae, self.normalize = sae, sae.normalizer(device)
        self.rows = torch.tensor(rows, dtype=torch.long, device=device)
        self.encoder, self.bias = _rows(sae, list(range(sae.config.num_latents)), device)
        self.computes = len(self.encoder)

    def _pieces(self, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Pre-activations `(tokens, m)` of normalised tokens `(N, d)`, some at once."""
        for piece in tokens.split(max(1, _PIECE // len(self.encoder))):
            yield torch.addmm(self.bias, piece, self.encoder.T)

    def read(self, memory: Memory, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        normalized, latents = self.normalize(tokens.float(), step.timestep).flatten(0, -2), []
        for pre_activations in self._pieces(normalized):
            least = pre_activations.topk(self.sae.config.k, dim=1).values[:, -1:]
            latents.append(_at_least(pre_activations[:, self.rows], least))
        return torch.cat(latents).unflatten(0, tokens.shape[:-1])


class PictureReader(TopKReader):
    """Reads latents of which a fixed number are active in each picture, see `active_in_picture`."""

    def read(self, memory: Memory, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        normalized, count = self.normalize(tokens.float(), step.timestep), self.sae.active_in_picture(tokens.shape[-2])
        return torch.stack([self._picture(picture, count) for picture in normalized])

    def _picture(self, picture: torch.Tensor, count: int) -> torch.Tensor:
        largest, read = picture.new_zeros(0), []
        for pre_activations in self._pieces(picture):
            candidates = torch.cat([largest, pre_activations.flatten()])
            largest = candidates.topk(min(count, len(candidates))).values
            read.append(pre_activations[:, self.rows])
        return _at_least(torch.cat(read), largest[-1])


class GroupReader(Reader):
    """Reads latents of which the largest of each group is active: O(tokens · d · rows of these groups)."""

    def __init__(self, sae: SparseAutoencoder, rows: list[int], device: torch.device):
        self.normalize, size = sae.normalizer(device), sae.config.num_latents // sae.config.k
        groups = sorted({row // size for row in rows})
        members = [group * size + place for group in groups for place in range(size)]
        self.encoder, self.bias = _rows(sae, members, device)
        self.groups, self.computes = len(groups), len(members)
        self.rows = torch.tensor([members.index(row) for row in rows], dtype=torch.long, device=device)

    def read(self, memory: Memory, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        pre_activations = self.normalize(tokens.float(), step.timestep) @ self.encoder.T + self.bias
        return groupmax(pre_activations, self.groups)[..., self.rows] if self.groups else pre_activations


def _at_least(pre_activations: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Keep what is at least as large, as far as it is positive."""
    return torch.where(pre_activations >= least, pre_activations, 0.0).relu()
