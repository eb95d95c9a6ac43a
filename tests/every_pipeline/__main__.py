"""
A table of every pipeline class of the installed diffusers: is it steered as it should be?

    python -m tests.every_pipeline                 # all; what is in the table already is kept
    python -m tests.every_pipeline Flux Wan --anew # classes whose names begin so, measured again
    python -m tests.every_pipeline --unexact       # what is not steered exactly, after a change
    python -m tests.every_pipeline --page          # only write the page, and the README's sentence, again

Writes `pipelines.json` row by row, so that a run which was stopped goes on, and `pipelines.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "pipelines.json", HERE / "pipelines.md"
README = HERE.parents[1] / "README.md"
SECONDS = 400  # for one class


def pipeline_classes() -> dict[str, type]:
    """Every pipeline class that diffusers exports, classic and modular, but the bases themselves."""
    import diffusers
    from diffusers import DiffusionPipeline, ModularPipeline

    found = {}
    for name in sorted(dir(diffusers)):
        kind = getattr(diffusers, name, None) if "Pipeline" in name else None
        is_pipeline = isinstance(kind, type) and issubclass(kind, DiffusionPipeline | ModularPipeline)
        if is_pipeline and kind not in (DiffusionPipeline, ModularPipeline):
            found[name] = kind
    return found


def row_of(name: str, most: int | None = None) -> dict:
    """Build a class and measure it, at no more than so many sites."""
    import diffusers
    import torch

    from .builds import BUILDS, UNBUILT, load_all
    from .measure import measure

    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity(100)  # modular pipelines print what is raised
    torch.set_num_threads(1)
    load_all()
    if name in UNBUILT:
        return {"class": name, "verdict": "untold", "why": UNBUILT[name]}
    if name not in BUILDS:
        return {"class": name, "verdict": "untold", "why": "nobody has written how to build it"}

    def too_long(*_):
        raise TimeoutError(f"took over {SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        return measure(name, BUILDS[name](pipeline_classes()[name]), most)
    except Exception as error:
        return {"class": name, "verdict": "untold", "why": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        signal.alarm(0)


def write(rows: dict[str, dict]) -> None:
    ordered = [rows[name] for name in sorted(rows)]
    partial = ROWS.with_suffix(".part")
    partial.write_text(json.dumps(ordered, indent=1) + "\n")
    partial.replace(ROWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", help="beginnings of class names; all by default")
    parser.add_argument("--anew", action="store_true", help="measure again what is in the table")
    parser.add_argument("--unexact", action="store_true", help="measure again what is in the table as not exact")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    rows = {row["class"]: row for row in json.loads(ROWS.read_text())} if ROWS.exists() else {}
    if not arguments.page:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        wanted = [n for n in pipeline_classes() if not arguments.names or n.startswith(tuple(arguments.names))]
        again = {name for name, row in rows.items() if arguments.unexact and row["verdict"] != "exact"}
        wanted = [name for name in wanted if arguments.anew or name in again or name not in rows]
        with ProcessPoolExecutor(arguments.processes) as pool:
            for name, row in zip(wanted, pool.map(row_of, wanted), strict=True):
                rows[name] = row
                write(rows)
                print(f"{name}: {row['verdict']} {row.get('why', '')[:300]}", flush=True)
        rows = {name: row for name, row in rows.items() if name in pipeline_classes()}
        write(rows)
    from .page import into_readme, page

    ordered = [rows[name] for name in sorted(rows)]
    PAGE.write_text(page(ordered))
    README.write_text(into_readme(README.read_text(), ordered))


if __name__ == "__main__":
    main()
