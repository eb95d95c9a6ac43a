#!/usr/bin/env bash
# diffusers 0.42.1: the deep copy of a model that carries a diffusers hook computes with the original's weights.
# Expected: copy.deepcopy gives an independent model, as it does for torch's forward hooks and for accelerate's hooks
# (1.15.0, same idea: `forward` is replaced). Seen: the replaced forward keeps the original's in a closure, which
# deepcopy does not copy. The copy has weights of its own, and never reads those of a hooked module.
# It matters where one copies a model to ablate, train, quantise or average it while a cache, layerwise casting or an
# offloading hook is on: changes to the copy do nothing, changes to the original change the copy.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install -qq torch==2.13.0
"$room/venv/bin/pip" install -qq diffusers==0.42.1 accelerate==1.15.0
export OMP_NUM_THREADS=1 DIFFUSERS_VERBOSITY=error TRANSFORMERS_VERBOSITY=error
"$room/venv/bin/python" - <<'EOF'
import copy
import sys

import accelerate
import torch
import diffusers
from accelerate.hooks import ModelHook as AccelerateHook, add_hook_to_module
from diffusers import FirstBlockCacheConfig, WanTransformer3DModel
from diffusers.hooks import HookRegistry, ModelHook

print("diffusers", diffusers.__version__, "accelerate", accelerate.__version__)


def wan():
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=3, rope_max_seq_len=32,
    ).eval()


generator = torch.Generator().manual_seed(1)
latents = torch.randn(1, 4, 1, 4, 4, generator=generator)
text = torch.randn(1, 3, 16, generator=generator)


@torch.no_grad()
def predict(model):
    with model.cache_context("any"):
        return model(latents, torch.tensor([500]), text, return_dict=False)[0]


@torch.no_grad()
def scale(model):
    for parameter in model.blocks[0].parameters():
        parameter.mul_(3)


def follows(hook):
    """Does a copy follow its own weights, and does it follow the original's?"""
    model = wan()
    hook(model)
    made = copy.deepcopy(model)
    before = predict(made)
    scale(made)
    own = not torch.equal(predict(made), before)
    made = copy.deepcopy(model)
    scale(model)
    return own, not torch.equal(predict(made), before)


hooks = {
    "no hook": lambda model: None,
    "torch forward hook": lambda model: model.blocks[0].register_forward_hook(lambda *given: None),
    "accelerate hook": lambda model: add_hook_to_module(model.blocks[0], AccelerateHook()),
    "diffusers hook": lambda model: HookRegistry.check_if_exists_or_initialize(model.blocks[0]).register_hook(
        ModelHook(), "does nothing"
    ),
}
seen = {name: follows(hook) for name, hook in hooks.items()}
for name, (own, others) in seen.items():
    print(f"{name:18} the copy follows its own weights: {own}, the original's: {others}")

# under layerwise casting the copy's weights are cast, but the original's are computed with; under a cache the copy's
# state is set, but the original's is asked for
for name, begin in {
    "layerwise casting": lambda model: model.enable_layerwise_casting(torch.bfloat16, torch.float32),
    "first block cache": lambda model: model.enable_cache(FirstBlockCacheConfig(threshold=0.0)),
}.items():
    model = wan()
    begin(model)
    predict(model)
    try:
        predict(copy.deepcopy(model))
        seen[name] = "runs"
    except Exception as error:
        seen[name] = type(error).__name__
        print(f"{name}: the model runs, its copy raises {seen[name]}:", str(error).splitlines()[0])
right, wrong = (True, False), (False, True)
expected = {
    "no hook": right, "torch forward hook": right, "accelerate hook": right, "diffusers hook": wrong,
    "layerwise casting": "RuntimeError", "first block cache": "ValueError",
}
if seen != expected:
    sys.exit("this has changed")
print("as seen before: a copy of a module with a diffusers hook computes with the original's weights")
EOF
