#!/usr/bin/env bash
# diffusers 0.42.1: LayerSkipConfig(fqn="auto") takes another stack of blocks in another process.
# Expected: the default picks the same blocks of the same model each time. Seen: the names of stacks that it looks for
# are kept in a tuple made of a set of strings, whose order Python draws anew for each process (unless PYTHONHASHSEED
# is set). Flux has two stacks, `transformer_blocks` and `single_transformer_blocks`: the same line skips a block of one
# or of the other, with the same seeds and versions.
# It matters since "auto" is the default, and what guiders use for a list of layers: an ablation does not repeat.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install -qq torch==2.13.0
"$room/venv/bin/pip" install -qq diffusers==0.42.1
export OMP_NUM_THREADS=1 DIFFUSERS_VERBOSITY=error TRANSFORMERS_VERBOSITY=error
cat > "$room/skip.py" <<'EOF'
import torch
from diffusers import FluxTransformer2DModel, LayerSkipConfig
from diffusers.hooks import apply_layer_skip

torch.manual_seed(0)
model = FluxTransformer2DModel(
    patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
).eval()
apply_layer_skip(model, LayerSkipConfig(indices=[1]))
stacks = ("transformer_blocks", "single_transformer_blocks")
print(*(stack for stack in stacks if hasattr(model.get_submodule(stack)[1], "_diffusers_hook")))
EOF
"$room/venv/bin/python" -c 'import diffusers; print("diffusers", diffusers.__version__)'
for seed in 1 2 3 4 5 6 7 8; do
    stack=$(PYTHONHASHSEED=$seed "$room/venv/bin/python" "$room/skip.py")
    echo "PYTHONHASHSEED=$seed: block 1 is skipped of $stack"
    echo "$stack" >> "$room/stacks"
done
if [ "$(sort -u "$room/stacks" | tr '\n' ' ')" != "single_transformer_blocks transformer_blocks " ]; then
    echo "this has changed" >&2
    exit 1
fi
echo "as seen before: which of the two stacks loses a block hangs on the hash seed"
