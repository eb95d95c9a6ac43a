"""A disk that is full, for as long as a test needs it, and whether two dictionaries hold the same."""

import contextlib
import resource
import signal

import torch


@contextlib.contextmanager
def full_disk(size: int):
    """No file can grow beyond `size` bytes, as on a disk with no more room: writing more is an `OSError`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def state(sae) -> dict[str, torch.Tensor]:
    """Copies, so that they outlive the file."""
    return {name: tensor.clone() for name, tensor in sae.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
