#!/usr/bin/env bash
# sae-lens 6.54.12: what `decode` returns hangs on what was encoded last, where activations are normalised at run time.
# Expected: decode(codes) is a function of the codes, as it is without normalisation. Seen with normalize_activations
# "layer_norm" and "constant_norm_rescale": encode keeps the norm of its input on the module, the next decode uses it
# up. Codes of one batch are decoded to the scale of another if that was encoded in between; a second decode raises
# AttributeError, and so does a decode without an encode.
# It matters to all who decode edited codes, twice, or a feature alone, as for steering: the scale is another input's.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install -qq torch==2.13.0
"$room/venv/bin/pip" install -qq sae-lens==6.54.12
export OMP_NUM_THREADS=1 DIFFUSERS_VERBOSITY=error TRANSFORMERS_VERBOSITY=error
"$room/venv/bin/python" -W ignore - <<'EOF'
import sys
from importlib.metadata import version

import torch
from sae_lens import StandardSAE, StandardSAEConfig

print("sae-lens", version("sae-lens"))


@torch.no_grad()
def tries(normalisation):
    """Is decode the same after another encode; what does a second decode do; and one of a feature alone?"""
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=32, normalize_activations=normalisation))
    small = torch.randn(5, 8)
    large = 10 * small
    codes = sae.encode(small)
    once = sae.decode(codes)
    assert torch.allclose(once, sae(small), atol=1e-5)
    ends = []
    codes = sae.encode(small)
    sae.encode(large)
    again = sae.decode(codes)
    same = torch.allclose(again, once, atol=1e-5)
    ends.append("the same" if same else f"{float(again.norm() / once.norm()):.1f} times")
    for given in (codes, torch.eye(32)[:5]):
        try:
            sae.decode(given)
            ends.append("runs")
        except AttributeError as error:
            ends.append(type(error).__name__)
            print("   ", error)
    return tuple(ends)


seen = {}
for name in ("none", "constant_norm_rescale", "layer_norm"):
    seen[name] = tries(name)
    after, twice, alone = seen[name]
    print(f"{name}: decode after 10 times the input was encoded: {after}; again: {twice}; a feature alone: {alone}")
broken = ("10.0 times", "AttributeError", "AttributeError")
if seen != {"none": ("the same", "runs", "runs"), "constant_norm_rescale": broken, "layer_norm": broken}:
    sys.exit("this has changed")
print("as seen before: decode takes its scale from the last encode, and works once after each")
EOF
