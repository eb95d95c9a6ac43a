"""A disk that is full, for as long as a test needs it."""

import contextlib
import resource
import signal


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
