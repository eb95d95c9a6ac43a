"""What each script here writes: a package's own files of a dictionary, and what the package itself makes of them."""

import importlib.metadata
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SITE, D, M, K, TOKENS = "up_blocks.1.attentions.1", 32, 128, 8, 64
MOVED = [3, 77]  # latents that are raised by `RAISED` each
RAISED = 0.7


def randomise(module: torch.nn.Module, scale: float = 0.3) -> None:
    """Fill all parameters, so that each matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan = parameter.shape[-1] if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn(parameter.shape) * (scale if fan == 1 else fan**-0.5))


def activations(shape: tuple[int, ...] = (TOKENS, D)) -> torch.Tensor:
    return 1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.2


def write(folder: Path, package: str, name: str, x, z, decoded, decode) -> None:
    """
    Save what a package says of activations.

    Args:
        x, z, decoded (`torch.Tensor`): activations, their latents, and what these decode to.
        decode (`Callable`): latents → activations; what it adds beside them is subtracted.
    """
    raised = z.clone()
    raised[..., MOVED] += RAISED
    tensors = {"x": x, "z": z, "decoded": decoded, "moved": decode(raised) - decode(z)}
    tensors = {key: value.detach().float().reshape(-1, value.shape[-1]).contiguous() for key, value in tensors.items()}
    save_file(tensors, folder / "expected.safetensors")
    about = {"package": package, "version": importlib.metadata.version(package), "architecture": name}
    (folder / "about.json").write_text(json.dumps(about))
