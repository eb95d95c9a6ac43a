"""The size of a sample, and the token grid of an activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..models import TokenGrid
from .arguments import Arguments
from .blocks import is_text

if TYPE_CHECKING:
    from .call import Call

_OVER_TIME = ("motion_modules", "temp_attentions", "temp_convs", "temporal_transformer_blocks", "transformer_in")


@dataclass(frozen=True)
class Grid:
    """
    The size of a sample.

    Args:
        frames, height, width (`int`): size of the sample; zeros if it is not known.
        pixels (`int`): number of pixels per latent, if height and width are in pixels; a remainder is cut off.
    """

    frames: int = 0
    height: int = 0
    width: int = 0
    pixels: int = 1

    def tokens(self, count: int, frames: int) -> tuple[int, int, int] | None:
        """Frames, height and width of a grid of `count` tokens, if these are patches of `frames` frames."""
        latents = self.height // self.pixels, self.width // self.pixels
        for patch in range(1, 17):
            height, width = latents[0] // patch, latents[1] // patch
            if self.pixels == 1 and (latents[0] % patch or latents[1] % patch):
                continue
            for depth in (1, 2, 4, 8):  # frames per token
                if frames % depth == 0 and frames // depth * height * width == count:
                    return frames // depth, height, width
        return None


def grid_of(arguments: Arguments, variables: dict[str, Any], scale: int = 8) -> Grid:
    """The [`Grid`] of a call's sample; `scale` is the number of pixels per latent."""
    shape = arguments.shape
    if len(shape) == 4:
        return Grid(1, shape[2], shape[3])
    if len(shape) == 5:  # (rows, channels, frames, ...) or (rows, frames, channels, ...)
        frames = shape[1] if shape[2] == arguments.channels != shape[1] else shape[2]
        return Grid(frames, shape[3], shape[4])
    sizes = [arguments.by_name.get(name) for name in ("num_frames", "height", "width")]
    if all(isinstance(size, int) for size in sizes):
        return Grid(*sizes)
    height, width = (variables.get(name) for name in ("height", "width"))
    if isinstance(height, int) and isinstance(width, int):
        return Grid(1, height, width, pixels=scale)
    return Grid()


def token_grid(call: Call, site: str, batch: int, space: tuple[int, ...]) -> TokenGrid | None:
    """
    The token grid of an activation; `None` if it is not known, or the tokens have no position in the picture: those of
    text, and the frames that attention over time has as tokens.

    Args:
        call (`Call`): the denoiser call.
        site (`str`): the site of the activation.
        batch (`int`): number of rows of the activation; frames may be separate rows.
        space (`tuple[int, ...]`): shape of a row without channels: `(height, width)`, `(frames, height, width)` or
            `(tokens,)`.
    """
    frames = call.grid.frames
    if is_text(site) or call.view or any(part in _OVER_TIME for part in site.split(".")):
        return None
    if batch == call.images < call.rows:
        rows_per_video = 1  # a cache skipped the unconditional rows
    elif batch not in (call.rows, call.rows * frames):
        return None
    else:
        rows_per_video = batch // call.rows
    if len(space) == 2:
        return TokenGrid(*space, 1, rows_per_video)
    if len(space) == 3:
        return TokenGrid(*space[1:], space[0], rows_per_video)
    size = call.grid.tokens(space[0], 1 if rows_per_video > 1 else frames) if frames else None
    return None if size is None else TokenGrid(size[1], size[2], size[0], rows_per_video)
