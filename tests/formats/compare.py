"""
The table of what other packages say of their own dictionaries, and what is read here of the same files:

    python -m tests.formats.compare [--environments FOLDER]

makes an environment for each package (some minutes; they stay in FOLDER, if one is given), has the package itself
make, save and reload dictionaries with random weights, encode and decode the same activations and raise two latents,
and writes `compare.json` and `compare.md` beside this file. Fails if something differs by more than rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffusers_rtsae import Dictionary, Edit, SparseAutoencoder
from diffusers_rtsae.dictionary import convertible
from diffusers_rtsae.files import write_json, write_text
from diffusers_rtsae.steering import PlanState, SitePlan

HERE = Path(__file__).parent
TORCH = "torch==2.13.0"
PACKAGES = {
    "saelens": ["sae-lens==6.54.12"],
    "sparsify": ["eai-sparsify==1.3.3"],
    "dictionary_learning": ["dictionary-learning==0.1.0"],
    "overcomplete": ["overcomplete==0.3.0", "matplotlib<3.9"],
}
MOVED, RAISED = [3, 77], 0.7  # as in peers/common.py
EXACT = 2e-5  # of the largest value
IN_BFLOAT16 = (
    "jumprelu, bfloat16",
)  # as the package computes there, where latents near their threshold go either way


SITE, D, M, K = "up_blocks.1.attentions.1", 32, 128, 8  # as there
TRANSCODES = {"activation": "input", "centred": False}
EXPORTED = {  # to SAELens
    "ReLU": {},
    "JumpReLU, not centred": {"centred": False},
    "TopK": {"sparsity": "topk"},
    "JumpReLU, layer norm": {"input_norm": "layer"},
    "ReLU, constant norm": {"input_norm": "length"},
    "transcoder": TRANSCODES,
    "skip transcoder, JumpReLU, layer norm": TRANSCODES | {"skip": True, "input_norm": "layer", "undone": False},
}


@torch.no_grad()
def export(out: Path) -> None:
    """Write autoencoders of this package in the format of SAELens."""
    for name, options in EXPORTED.items():
        torch.manual_seed(0)
        sae = SparseAutoencoder(SITE, D, [1], M, K, **options)
        for parameter in sae.parameters():
            parameter.normal_(0, D**-0.5)
        if "JumpReLU" in name:
            sae.threshold.uniform_(0, 0.8)
        Dictionary({SITE: sae}).export("saelens", out / f"exported {name}" / "files")


def environment(folder: Path, requirements: list[str]) -> Path:
    """The Python of an environment with these packages."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        for wanted in ([TORCH], [TORCH, *requirements]):  # the build that the first one chooses is kept
            subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
        # whose build for GPUs does not load beside a torch for processors, and which no autoencoder uses
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    return python


@torch.no_grad()
def compare(case: Path) -> dict:
    """A row of the table: largest differences, relative to the largest value."""
    expected, about = load_file(case / "expected.safetensors"), json.loads((case / "about.json").read_text())
    site, sae = next(iter(convertible(case / "files").sites.items()))
    x, t = expected["x"], 481.0
    count = expected["z"].shape[-1]

    def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
        return float((ours - theirs).abs().max() / theirs.abs().max())

    z = sae.encode_step(x, t)
    decoded = sae.decode_step(z, t, x)
    folded = z[:, :count] - z[:, count:] if z.shape[-1] == 2 * count else z  # of latents that may be negative
    edit = Edit(latents=tuple(MOVED), weights=(1.0, 1.0), strength=RAISED, clip=False)
    moved = SitePlan(sae, [edit], None).conditional(PlanState(), x[None], t, None)[0].expand_as(x)
    return about | {
        "kind": type(sae).__name__,
        "site": site,
        "l0": round(float((expected["z"] != 0).float().sum(1).mean()), 2),
        "encode": difference(folded, expected["z"]),
        "decode": difference(decoded, expected["decoded"]),
        "moved": difference(moved, expected["moved"]),
    }


def page(rows: list[dict]) -> str:
    lines = [
        "# Other people's dictionaries, read here and by their own packages",
        "",
        "Made by `python -m tests.formats.compare`: each dictionary has random weights and was made, saved and loaded",
        "by the package itself. The columns are the largest difference of the latents, of what they decode to, and of",
        "what raising two latents by 0.7 adds, relative to the largest value. L0 is the number of active latents of a",
        "token, of 128. Arithmetic here is float32 whatever a file holds: where a package computes in bfloat16,",
        "latents near their threshold are active in the one and not in the other.",
        "",
        "| package | dictionary | read as | L0 | encode | decode | steered move |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        figures = [f"{row[name]:.1e}" for name in ("encode", "decode", "moved")]
        cells = [
            f"{row['package']} {row['version']}",
            row["architecture"],
            f"`{row['kind']}`",
            f"{row['l0']:g}",
            *figures,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, help="Where the packages are installed, and stay.")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "To read some latents")
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, requirements in PACKAGES.items():
            python = environment((arguments.environments or Path(temporary)) / name, requirements)
            out = Path(temporary, "made", name)
            out.mkdir(parents=True)
            if name == "saelens":
                export(out)
            script = HERE / "peers" / f"{name}.py"
            run = subprocess.run([python, script, out], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
            if run.returncode:
                sys.exit(run.stderr.decode())
            rows += [compare(case) for case in sorted(out.iterdir())]
    write_json(HERE / "compare.json", rows)
    write_text(HERE / "compare.md", page(rows))
    exact = [row for row in rows if row["architecture"] not in IN_BFLOAT16]
    differing = [row for row in exact if max(row["encode"], row["decode"], row["moved"]) > EXACT]
    print(f"{len(rows)} dictionaries compared")
    sys.exit(f"these differ: {differing}" if differing else 0)


if __name__ == "__main__":
    main()
