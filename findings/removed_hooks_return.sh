#!/usr/bin/env bash
# diffusers 0.42.1: removing a hook that is not the last one switches the next one off, and may bring a hook back.
# Expected (as HookFunctionReference says): hooks of a module can be removed in any order, the others go on. Seen with
# hooks that replace the forward, as those for caches and skipped layers do: taking away the inner one also bypasses
# the outer, which stays listed; taking away the outer one afterwards puts the removed inner one back to work.
# It matters to all who put a hook of their own on a block that a cache or an ablation also hooks: after
# `disable_cache()` an ablation has stopped, and after the ablation's end the cache is on again and says it is off.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install -qq torch==2.13.0
"$room/venv/bin/pip" install -qq diffusers==0.42.1
export OMP_NUM_THREADS=1 DIFFUSERS_VERBOSITY=error TRANSFORMERS_VERBOSITY=error
"$room/venv/bin/python" - <<'EOF'
import sys

import torch
import diffusers
from diffusers import FirstBlockCacheConfig, LayerSkipConfig, WanTransformer3DModel
from diffusers.hooks import HookRegistry, ModelHook, apply_layer_skip

print("diffusers", diffusers.__version__)
seen = {}


class Doubled(ModelHook):
    def new_forward(self, module, *args, **kwargs):
        return 2 * self.fn_ref.original_forward(*args, **kwargs)


class PlusOne(ModelHook):
    def new_forward(self, module, *args, **kwargs):
        return self.fn_ref.original_forward(*args, **kwargs) + 1


module = torch.nn.Identity()
registry = HookRegistry.check_if_exists_or_initialize(module)
registry.register_hook(Doubled(), "doubled")
registry.register_hook(PlusOne(), "plus one")
ten = torch.tensor(10)
seen["both"] = int(module(ten))
registry.remove_hook("doubled")
seen["without the inner"] = int(module(ten)), list(registry.hooks)
registry.remove_hook("plus one")
seen["without any"] = int(module(ten)), list(registry.hooks)
print("identity of 10, doubled, then plus one:", seen["both"])
print("inner one removed: 11 expected, now (and listed):", *seen["without the inner"])
print("both removed: 10 expected, now (and listed):", *seen["without any"])

# the same with a cache and an ablation
torch.manual_seed(0)
model = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
    num_layers=4, rope_max_seq_len=32,
).eval()
inputs = (torch.randn(1, 4, 1, 4, 4), torch.tensor([500]), torch.randn(1, 3, 16))
ran = []
model.blocks[1].attn1.register_forward_hook(lambda *given: ran.append(1))


@torch.no_grad()
def attention_runs():
    ran.clear()
    with model.cache_context("any"):
        model(*inputs)
    return len(ran)


model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
apply_layer_skip(model, LayerSkipConfig(indices=[1], fqn="blocks"))
seen["cache and skip"] = attention_runs()
model.disable_cache()
hooks = model.blocks[1]._diffusers_hook
seen["cache off"] = attention_runs(), list(hooks.hooks)
hooks.remove_hook("layer_skip_hook")
try:
    with torch.no_grad():
        model(*inputs)
    seen["skip off"] = "runs"
except ValueError as error:  # raised by the cache, which was removed
    seen["skip off"] = "ValueError", model.is_cache_enabled, list(hooks.hooks)
    print("block 1 skipped, under a cache: its attention runs", seen["cache and skip"], "times")
    print("disable_cache(): 0 expected, now (and listed):", *seen["cache off"])
    print("skip removed too: no hook is listed, the cache is off, and a call raises ValueError:", error)
expected = {
    "both": 21, "without the inner": (10, ["plus one"]), "without any": (20, []), "cache and skip": 0,
    "cache off": (1, ["layer_skip_hook"]), "skip off": ("ValueError", False, []),
}
if seen != expected:
    sys.exit("this has changed")
print("as seen before: the outer hook stops with the inner one, and the inner one is back when the outer one goes")
EOF
