"""What a training step frees is there for the next."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="other systems manage memory in other ways")
def test_memory_of_freed_tensors_is_kept_for_the_next_ones():
    text = """
        import torch; from resource import RUSAGE_SELF, getrusage; from training.run import keep_freed_memory
        def faults():
            before = getrusage(RUSAGE_SELF).ru_minflt
            torch.ones(25_000_000)
            return getrusage(RUSAGE_SELF).ru_minflt - before
        usual = min(faults() for _ in range(3))
        keep_freed_memory(); faults()
        assert usual > 20 and min(faults() for _ in range(5)) < usual / 10  # the system may take pages meanwhile
        """
    command = [sys.executable, "-c", textwrap.dedent(text)]
    subprocess.run(command, cwd=Path(__file__).parents[3], check=True)
