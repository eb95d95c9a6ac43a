"""What a dictionary of Stable Diffusion 1.5's size costs to open, and to steer with, in bytes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from diffusers_rtsae import RTSAE, Dictionary, Edit, SparseDictionary, load_dictionary
from diffusers_rtsae.steering import PlanState, SitePlan

from .timing import DEVICE, seconds

SITE, LATENTS, ANCHORS, WIDTH = "up_blocks.1.attentions.1", 20_480, [961, 721, 481, 241, 1], 1280


def tensor_bytes(thing, seen: set[int]) -> int:
    """Bytes of the storages reachable from `thing`, without the dictionary itself."""
    if torch.is_tensor(thing):
        storage = thing.untyped_storage()
        if storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(thing, SparseDictionary):
        return 0
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple) else ()
    parts = vars(thing).values() if hasattr(thing, "__dict__") and not callable(thing) else parts
    return sum(tensor_bytes(part, seen) for part in parts)


def held(rtsae: RTSAE, edits: list[Edit]) -> int:
    """Bytes that a plan and its run keep after 50 steps of one picture of 16x16 tokens."""
    plan, state = SitePlan(rtsae, edits, torch.linspace(0.999, 0.005, 1000)), PlanState()
    for step in range(50):
        tokens = torch.randn(1, 256, WIDTH, device=DEVICE, dtype=torch.float16)
        plan.conditional(state, tokens, 981 - 20 * step, None)
        state.memories[None].continue_with(tokens)
    return tensor_bytes([plan.reader, plan.folds, state], set())


def measure(budget: float) -> list[dict]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        rtsae = RTSAE(SITE, WIDTH, ANCHORS, LATENTS, k=32)
        for matrix in (rtsae.encoder, rtsae.decoder):
            matrix.data = matrix.data.half()
        Dictionary({SITE: rtsae}).save(folder)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
        found.append({"what": "a dictionary of 20,480 latents on disk", "megabytes": size / 1e6})
        opened = []
        took = seconds(lambda: opened.append(load_dictionary(folder).sites[SITE]))
        found.append({"what": "opening it", "seconds": took})
        for count in (5, 50):
            edits = [Edit(latents=(100 * i,), weights=(1.0,), strength=1.0) for i in range(count)]
            found.append(
                {"what": f"steering {count} of its features keeps", "megabytes": held(opened[0], edits) / 1e6}
            )
    return found
