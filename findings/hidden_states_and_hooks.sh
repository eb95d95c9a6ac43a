#!/usr/bin/env bash
# transformers 5.24.0: `hidden_states` may leave out what a forward hook changed, depending on which came first.
# Expected: with output_hidden_states=True, hidden_states[i] is what layer i receives; a forward hook that changes what
# layer i-1 returns changes both. Seen: the tuple is filled by hooks that the library installs at the first call that
# asks for it, and torch runs hooks in the order of registration. On a model that was asked before, the library's hook
# comes first: the tuple holds the unchanged output, although the next layer receives the changed one.
# It matters since pipelines condition on `hidden_states[-2]` of a text encoder (SDXL, clip_skip) or on layers of a
# language model: a hook that steers such a layer works in a fresh process, and does nothing after a first picture.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install -qq torch==2.13.0
"$room/venv/bin/pip" install -qq transformers==5.24.0
export OMP_NUM_THREADS=1 DIFFUSERS_VERBOSITY=error TRANSFORMERS_VERBOSITY=error
"$room/venv/bin/python" - <<'EOF'
import sys

import torch
import transformers
from transformers import CLIPTextConfig, CLIPTextModel, Qwen2Config, Qwen2Model, T5Config, T5EncoderModel

print("transformers", transformers.__version__)
SMALL = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)


def clip():
    model = CLIPTextModel(CLIPTextConfig(**SMALL))
    return model, model.encoder.layers


def t5():
    model = T5EncoderModel(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=3, num_heads=2))
    return model, model.encoder.block


def qwen():
    model = Qwen2Model(Qwen2Config(**SMALL, num_key_value_heads=2))
    return model, model.layers


def louder(module, inputs, output):
    """Doubles what a layer returns."""
    return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2


@torch.no_grad()
def agree(make, asked_before):
    """Whether hidden_states[2] is what layer 2 received, with a hook on layer 1."""
    torch.manual_seed(0)
    model, layers = make()
    model.eval()
    words = torch.tensor([[1, 5, 6, 2]])
    if asked_before:
        model(input_ids=words, output_hidden_states=True)
    received = []
    layers[1].register_forward_hook(louder)
    layers[2].register_forward_pre_hook(
        lambda module, args, kwargs: received.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    told = model(input_ids=words, output_hidden_states=True).hidden_states[2]
    if not torch.equal(told, received[0]):
        assert torch.equal(told * 2, received[0])  # it is the output without the hook's change
        return False
    return True


seen = {}
for make in (clip, t5, qwen):
    for asked_before in (False, True):
        seen[make.__name__, asked_before] = agree(make, asked_before)
        order = "asked for hidden states, then hooked" if asked_before else "hooked, then asked for hidden states"
        print(f"{make.__name__:5} {order}: hidden_states has the hook's change: {seen[make.__name__, asked_before]}")
expected = {(name, before): not before for name in ("clip", "t5", "qwen") for before in (False, True)}
if seen != expected:
    sys.exit("this has changed")
print("as seen before: hidden_states leave out the change of a hook that came after the first time they were asked for")
EOF
