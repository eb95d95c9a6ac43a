"""Everything that is measured, in one command and within ten minutes, on whatever device is there.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.all                    # writes tests/benchmarks/results.json and .md
    python -m tests.benchmarks.all --only overhead --minutes 3 --out runs/mine
    python -m tests.benchmarks.all --only app --out tests/benchmarks/app            # in Chromium
    python -m tests.benchmarks.peers --environments peers               # a training step beside other packages

Every figure is a ratio to a baseline of the same run, taken in turns, or a size. On a CPU times are the processor's.
Waits for the device and copies to and from it are those that the package makes in a step after the first, counted by
the simulated device of the tests.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from training.commands import Adding

from . import app, collection, memory, overhead, startup, training
from .timing import CUDA

PARTS = {
    "overhead": (overhead, 0.65),
    "training": (training, 0.2),
    "collection": (collection, 0.15),
    "memory": (memory, 0),
    "startup": (startup, 0),
    "app": (app, 0),
}
USUAL = [part for part in PARTS if part != "app"]  # which needs a browser


def device_name() -> str:
    if CUDA:
        return torch.cuda.get_device_name()
    found = [line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{found[0] if found else platform.processor()}, {torch.get_num_threads()} of {len(found)} cores"


def table(results: dict) -> str:
    lines = [f"{results['device']}, torch {results['torch']}, {results['minutes']:.1f} minutes.", ""]
    for part, found in results["parts"].items():
        lines += [f"**{part}**", "", "| what | ratio | quartiles | | baseline |", "| --- | --- | --- | --- | --- |"]
        for one in found:
            told = [f"{one['megabytes']:.1f} MB"] if "megabytes" in one else []
            told += [f"{one['seconds']:.4g} s"] if "seconds" in one else []
            told += [f"{1000 * one['hooks_seconds']:.2f} ms in hooks"] if "hooks_seconds" in one else []
            told += [f"{one['steps_per_second']:.1f} steps/s"] if "steps_per_second" in one else []
            if "waits" in one:
                told += [f"{one['waits']:g} waits and {one['copies']:g} copies a step"]
            exact = 4 if one.get("ratio", 2) < 1.05 else 3
            ratio = [f"{x:.{exact}f}" for x in (one["ratio"], *one["quartiles"])] if "ratio" in one else ["", "", ""]
            ratio = [ratio[0], f"{ratio[1]} to {ratio[2]}" if ratio[1] else ""]
            baseline = f"{one['baseline']}, {one['baseline_seconds']:.4g} s" if "ratio" in one else ""
            lines.append(f"| {one['what']} | {ratio[0]} | {ratio[1]} | {', '.join(told)} | {baseline} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", action=Adding, choices=list(PARTS), default=USUAL)
    parser.add_argument("--minutes", type=float, default=7.0, help="to spend; a slow device may take longer")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="without its ending")
    a = parser.parse_args()
    started, parts = time.perf_counter(), {}
    for name in a.only:
        part, share = PARTS[name]
        parts[name] = part.measure(60 * a.minutes * share)
        print(json.dumps(parts[name], indent=1), flush=True)
    results = {
        "device": device_name(), "torch": torch.__version__, "minutes": (time.perf_counter() - started) / 60,
        "parts": parts,
    }  # fmt: skip
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    a.out.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
