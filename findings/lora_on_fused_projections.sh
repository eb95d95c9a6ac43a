#!/usr/bin/env bash
# diffusers 0.42.1, peft 0.21.2: a LoRA that is loaded after fuse_qkv_projections() has no effect, and nothing says so.
# Expected: an adapter on `to_q` that is listed as active changes predictions, or is refused. Seen: fusing keeps to_q,
# to_k and to_v beside the new fused layer that is called instead. The adapter is injected there, is active, and is
# never run; nor is a forward hook on to_q, nor does an edit of its weights do anything. Unfusing brings it all back.
# It matters to all who edit or watch attention's projections by name: the module that one finds is not the one that
# computes.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install -qq torch==2.13.0
"$room/venv/bin/pip" install -qq diffusers==0.42.1 peft==0.21.2
export OMP_NUM_THREADS=1 DIFFUSERS_VERBOSITY=error TRANSFORMERS_VERBOSITY=error
"$room/venv/bin/python" - <<'EOF'
import sys

import peft
import torch
import diffusers
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from peft import LoraConfig

print("diffusers", diffusers.__version__, "peft", peft.__version__)
SELF = r".*attn1?\.to_q"  # of self-attention (in a U-Net's cross-attention to_q is not fused)


def flux():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )
    return model.eval(), model.transformer_blocks[0].attn, dict(
        hidden_states=torch.randn(1, 16, 4), encoder_hidden_states=torch.randn(1, 7, 32),
        pooled_projections=torch.randn(1, 32), timestep=torch.tensor([0.5]), img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(7, 3),
    )


def unet():
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return model.eval(), model.down_blocks[0].attentions[0].transformer_blocks[0].attn1, dict(
        sample=torch.randn(1, 4, 8, 8), timestep=500, encoder_hidden_states=torch.randn(1, 7, 16)
    )


def tries(make, fused):
    """Does the prediction change with a LoRA on to_q, and with an edited weight; is a hook on to_q called?"""
    model, attention, inputs = make()
    called = []

    @torch.no_grad()
    def predict():
        return model(**inputs, return_dict=False)[0]

    def moved(since):
        return not torch.allclose(predict(), since, atol=1e-4)

    plain = predict()
    if fused:
        model.fuse_qkv_projections()
        assert not moved(plain)
    attention.to_q.register_forward_hook(lambda *given: called.append(1))
    model.add_adapter(LoraConfig(r=2, lora_alpha=16, target_modules=SELF, init_lora_weights=False), "new")
    assert model.active_adapters() == ["new"]
    by_adapter = moved(plain)
    before = predict()
    with torch.no_grad():
        attention.to_q.base_layer.weight.mul_(5)
    by_edit = moved(before)
    seen = by_adapter, by_edit, bool(called)
    if fused:
        model.unfuse_qkv_projections()
        seen += (moved(plain),)
    return seen


seen = {(make.__name__, fused): tries(make, fused) for make in (flux, unet) for fused in (False, True)}
for (name, fused), (adapter, edit, hook, *later) in seen.items():
    state = "fused" if fused else "plain"
    print(f"{name}, {state}: LoRA acts: {adapter}, edited to_q acts: {edit}, hook on to_q is called: {hook}", end="")
    print(f"; after unfusing they act: {later[0]}" if later else "")
expected = {
    (name, fused): (False, False, False, True) if fused else (True, True, True)
    for name in ("flux", "unet") for fused in (False, True)
}
if seen != expected:
    sys.exit("this has changed")
print("as seen before: on fused projections an active adapter, an edit and a hook of to_q all do nothing")
EOF
