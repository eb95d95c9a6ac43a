"""What a dictionary of Stable Diffusion 1.5's size costs to open and to steer with: seconds and bytes.

python tests/benchmarks/memory.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from diffusers_rtsae import RTSAE, Dictionary, Edit, load_dictionary
from diffusers_rtsae.steering import PlanState, SitePlan

SITE, LATENTS, ANCHORS, WIDTH = "up_blocks.1.attentions.1", 20_480, [961, 721, 481, 241, 1], 1280


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def tensor_bytes(thing, seen: set[int]) -> int:
    """Bytes of the storages reachable from `thing`, without the dictionary itself."""
    if torch.is_tensor(thing):
        storage = thing.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(thing, RTSAE):
        return 0
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else ()
    parts = vars(thing).values() if hasattr(thing, "__dict__") and not callable(thing) else parts
    return sum(tensor_bytes(part, seen) for part in parts)


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        rtsae = RTSAE(SITE, WIDTH, ANCHORS, LATENTS, k=32)
        for matrix in (rtsae.encoder, rtsae.decoder):
            matrix.data = matrix.data.half()
        Dictionary({SITE: rtsae}).save(folder)
        del rtsae
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
        before, started = resident_bytes(), time.perf_counter()
        dictionary = load_dictionary(folder)
        seconds = time.perf_counter() - started
        print(
            f"dictionary of {size / 1e6:.0f} MB opened in {seconds:.3f} s, {(resident_bytes() - before) / 1e6:.0f} MB"
        )
        alphas = torch.linspace(0.999, 0.005, 1000)
        for options in ({}, {"clip": False}):
            edits = [Edit(latents=(100 * i,), weights=(1.0,), strength=1.0, **options) for i in range(5)]
            plan, state = SitePlan(dictionary.sites[SITE], edits, alphas), PlanState()
            for step in range(50):  # a batch of one picture, 16x16 tokens
                tokens = torch.randn(1, 256, WIDTH, device=device, dtype=torch.float16)
                plan.conditional(state, tokens, 981 - 20 * step, None)
                state.conditional.continue_with(tokens)
            held = tensor_bytes([plan.encoder, plan.folds, state], set())
            print(f"steering 5 features for 50 steps keeps {held / 1e6:.2f} MB on {device} {options or ''}")


if __name__ == "__main__":
    main()
