"""Builds classes and calls them plainly: `python -m tests.every_pipeline.try_builds FluxPipeline ...` (all without)."""

from __future__ import annotations

import sys
import time
import traceback
import warnings

import diffusers
import torch

from .builds import BUILDS, Ask, load_all


def first_tensor(output) -> torch.Tensor:
    """What a pipeline returned, as one flat float tensor."""
    if torch.is_tensor(output):
        return output.detach().float().flatten()
    if isinstance(output, dict) or hasattr(output, "values") and not hasattr(output, "shape"):
        output = list(output.values())
    if isinstance(output, list | tuple):
        parts = [first_tensor(part) for part in output if part is not None and not isinstance(part, bool | str)]
        return torch.cat(parts) if parts else torch.zeros(0)
    if hasattr(output, "__array__") or hasattr(output, "tobytes"):
        import numpy as np

        return torch.from_numpy(np.array(output, dtype="float32")).flatten()
    return torch.zeros(0)


def main(names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    load_all()
    for name in names or sorted(BUILDS):
        started = time.time()
        try:
            built = BUILDS[name](getattr(diffusers, name))

            def run(ask, built=built):
                torch.manual_seed(0)
                with torch.no_grad():
                    return first_tensor(built.pipe(**built.call(ask)))

            plain = run(Ask())
            same = torch.equal(plain, run(Ask()))
            facts = {"numbers": len(plain), "finite": bool(plain.isfinite().all()), "same": same}
            if built.text:
                facts["text"] = not torch.equal(plain, run(Ask(prompts=(3,))))
            if built.guided:
                facts["guided"] = not torch.equal(plain, run(Ask(guided=False)))
            if built.negative:
                facts["negative"] = not torch.equal(plain, run(Ask(negative=4)))
            if built.many:
                facts["many"] = len(run(Ask(prompts=(1, 3)))) == 2 * len(plain)
            if built.images:
                facts["images"] = len(run(Ask(images=2))) == 2 * len(plain)
            bad = [key for key, value in facts.items() if value is False or key == "numbers" and not value]
            print(f"{name}: {'ok' if not bad else 'BAD ' + str(bad)} {facts} {time.time() - started:.1f} s", flush=True)
        except Exception as error:
            print(f"{name}: FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
            if len(names) == 1:
                traceback.print_exc()


if __name__ == "__main__":
    main(sys.argv[1:])
